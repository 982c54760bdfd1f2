"""A runtime and its CRIU, as real processes that are killed: whose end is seen, what is said."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.criu_run import RuntimeOrCriu
from migrate.processes import Outliving

DEADLINE_S = 20.0


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    (tmp_path / "hold").mkdir()
    return tmp_path


@pytest.fixture
def runtime() -> Iterator[Outliving]:
    yield from _process("sleep")


@pytest.fixture
def criu(tmp_path: Path) -> Iterator[Outliving]:
    """What tells a CRIU from others is its name."""
    shutil.copy2(shutil.which("sleep") or "", tmp_path / "criu")
    yield from _process(str(tmp_path / "criu"))


def _process(program: str) -> Iterator[Outliving]:
    process = Outliving([program, "600"])
    yield process
    process._process.kill()
    process._process.wait()


def begun(work_dir: Path, criu: Outliving) -> None:
    """As the gate says it."""
    (work_dir / "hold" / "criu.pid").write_text(f"{criu.pid} 1\n")


def kill(process: Outliving) -> None:
    process._process.send_signal(signal.SIGKILL)


async def test_it_ends_with_the_runtime(work_dir: Path, runtime: Outliving) -> None:
    waiting = asyncio.create_task(RuntimeOrCriu(runtime, work_dir).wait())
    await asyncio.sleep(0)
    kill(runtime)
    assert await asyncio.wait_for(waiting, DEADLINE_S) == -signal.SIGKILL


async def test_it_ends_with_a_criu_that_its_runtime_survives(
    work_dir: Path, runtime: Outliving, criu: Outliving
) -> None:
    begun(work_dir, criu)
    run = RuntimeOrCriu(runtime, work_dir)
    waiting = asyncio.create_task(run.wait())
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    assert run.why("restore.log").line == "the runtime or CRIU hangs"
    kill(criu)
    await asyncio.wait_for(waiting, DEADLINE_S)
    assert runtime.returncode is None
    why = run.why("restore.log")
    assert why.line == "CRIU ended without a word, and its runtime waits for it"
    assert why.remedy


async def test_it_has_ended_when_criu_had(
    work_dir: Path, runtime: Outliving, criu: Outliving
) -> None:
    begun(work_dir, criu)
    kill(criu)
    await criu.wait()
    await asyncio.wait_for(RuntimeOrCriu(runtime, work_dir).wait(), DEADLINE_S)
    assert runtime.returncode is None


async def test_a_gate_that_has_not_written_yet_is_no_dead_criu(
    work_dir: Path, runtime: Outliving
) -> None:
    (work_dir / "hold" / "criu.pid").touch()
    waiting = asyncio.create_task(RuntimeOrCriu(runtime, work_dir).wait())
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    waiting.cancel()


async def test_what_was_written_says_more(work_dir: Path, runtime: Outliving) -> None:
    kill(runtime)
    await runtime.wait()
    run = RuntimeOrCriu(runtime, work_dir)
    assert run.why("dump.log").line == "it ended without a word"
    (work_dir / "runtime.log").write_text('{"level":"error","msg":"no such file"}\n')
    assert run.why("dump.log").line == "no such file"
    (work_dir / "dump.log").write_text("(00.1) Error (criu/files.c:1): Can't open the file\n")
    assert "Can't open the file" in run.why("dump.log").line
