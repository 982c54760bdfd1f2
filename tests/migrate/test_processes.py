"""Processes that outlive us, and trees of them that must not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from migrate.processes import Outliving, is_alive, kill_tree, last_message, tail, users_of
from tests.lab.waiting import wait_until

# A program that starts a process and ends by an error, as a coordinator does that leaves a hold.
STARTER = """
import asyncio
from migrate.processes import Outliving

async def main():
    global process
    process = Outliving(["sleep", "1000"])
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    print(process.pid, flush=True)
    raise RuntimeError

asyncio.run(main())
"""


def test_it_outlives_whoever_started_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTER], capture_output=True, text=True, check=False
    )
    assert "RuntimeError" in done.stderr
    process = psutil.Process(int(done.stdout))
    try:
        assert process.is_running()
        assert process.status() != psutil.STATUS_ZOMBIE
        assert os.getsid(process.pid) == process.pid
    finally:
        process.kill()


async def test_several_wait_and_one_gives_up() -> None:
    read_fd, write_fd = os.pipe()
    process = Outliving(["cat"], stdin=read_fd)
    os.close(read_fd)
    waiting = [asyncio.create_task(process.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    os.close(write_fd)
    assert await asyncio.gather(*waiting[1:], process.wait()) == [0, 0, 0]
    assert waiting[0].cancelled()
    assert await process.wait() == 0


async def test_its_end_is_told_as_subprocess_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = Outliving(
            ["sh", "-c", "pwd; echo $WORD >&2; kill -TERM $$"],
            cwd=tmp_path,
            env={**os.environ, "WORD": "said"},
            stdout=file.fileno(),
            stderr=file.fileno(),
        )
    assert await process.wait() == -signal.SIGTERM
    assert tail(log, 1000) == f"{tmp_path}\nsaid\n"


def test_what_can_not_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        Outliving(["/nowhere/at-all"])


def test_a_tree_is_killed_though_it_grows() -> None:
    """A parent that starts a new child for each that dies, as the pager's keeper does."""
    script = "while :; do sh -c 'sleep 1000; :'; done"
    with subprocess.Popen(["sh", "-c", script]) as parent:
        top = psutil.Process(parent.pid)
        wait_until("the tree has grown", lambda: len(top.children(recursive=True)) == 2)
        tree = top.children(recursive=True)
        kill_tree(parent.pid)
        assert parent.wait() == -signal.SIGKILL
        # Whoever inherits them may not wait for them.
        wait_until("they are gone", lambda: not any(is_alive(one.pid) for one in tree))
    kill_tree(parent.pid)


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.pid_exists(process.pid)
        assert not is_alive(process.pid)
    assert not is_alive(process.pid)
    assert is_alive(os.getpid())


def test_who_uses_a_session_stays_what_was_seen(tmp_path: Path) -> None:
    """Another thread looks at the same processes meanwhile, and finds one of them dead."""
    with subprocess.Popen(["sh", "-c", "read _", f"{tmp_path}/work"], stdin=subprocess.PIPE) as one:
        seen = users_of(tmp_path)
        one.kill()
        os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
        assert users_of(tmp_path) == []
        assert [(process.pid, words[-1]) for process, words in seen] == [
            (one.pid, f"{tmp_path}/work")
        ]
    assert users_of(tmp_path / "none") == []


def test_the_end_of_a_log(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 10) == ""
    (tmp_path / "log").write_bytes(b"first\nsecond \xff\n")
    assert tail(tmp_path / "log", 9) == "second �\n"


def test_the_last_message_of_a_runtime() -> None:
    log = (
        '"level":"warning","msg":"first"}\n'
        '{"level":"error","msg":"say \\"no\\"\\nand go","time":"now"}\n[1]\n{"level":"error"}\n'
    )
    assert last_message(log) == 'say "no" and go'
    assert last_message("something else") == ""
