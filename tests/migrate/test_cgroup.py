"""The freezer of a real cgroup, with a process in it that counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cgroup import freeze, refreeze, thaw, thawed
from tests.freezer import cgroup_of_its_own
from tests.lab.waiting import wait_until

COUNT = "while True: pass"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with cgroup_of_its_own() as path:
        yield path


@pytest.fixture
def counter(cgroup: Path) -> Iterator[int]:
    """A process in the cgroup that never rests."""
    with subprocess.Popen([sys.executable, "-c", COUNT]) as process:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        yield process.pid
        (cgroup / "cgroup.freeze").write_text("0")
        process.kill()


def executed_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def test_frozen_tasks_execute_nothing_until_they_are_thawed(cgroup: Path, counter: int) -> None:
    wait_until("it counts", lambda: executed_ns(counter) > 0)
    before_us = time.monotonic_ns() // 1000
    frozen_us = freeze(cgroup, 5.0)
    assert before_us <= frozen_us <= time.monotonic_ns() // 1000
    assert "frozen 1" in (cgroup / "cgroup.events").read_text()
    executed = executed_ns(counter)
    # Another process gets its turn meanwhile, so the time is not just too short.
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert executed_ns(counter) == executed
    thaw(cgroup)
    wait_until("it counts again", lambda: executed_ns(counter) > executed)


def test_what_is_frozen_already_is_frozen(cgroup: Path, counter: int) -> None:
    first_us = freeze(cgroup, 5.0)
    assert freeze(cgroup, 5.0) >= first_us
    os.kill(counter, signal.SIGTERM)
    # A signal waits for the thaw (or the kernel lets the killed one out, and it is gone).
    thaw(cgroup)
    wait_until("it is gone", lambda: not (cgroup / "cgroup.procs").read_text())


def test_tasks_run_while_they_are_thawed_for_a_while(cgroup: Path, counter: int) -> None:
    freeze(cgroup, 5.0)
    executed = executed_ns(counter)
    with thawed(cgroup):
        wait_until("it counts", lambda: executed_ns(counter) > executed)
    freeze(cgroup, 5.0)
    executed = executed_ns(counter)
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert executed_ns(counter) == executed


def test_a_cgroup_that_does_not_freeze_is_thawed(tmp_path: Path) -> None:
    """Its files say what a task in an uninterruptible wait makes them say."""
    (tmp_path / "cgroup.freeze").write_text("0")
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(TimeoutError, match=r"was not frozen within 0\.05 s"):
        freeze(tmp_path, 0.05)
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


def test_thawing_a_cgroup_that_is_gone(tmp_path: Path) -> None:
    thaw(tmp_path / "gone")
    refreeze(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        freeze(tmp_path / "gone", 1.0)
