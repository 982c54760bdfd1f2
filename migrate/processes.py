"""Small matters of processes and their logs that both sides need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


_STEP_S = 0.01
_SOURCE = Path(__file__).resolve().parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project, whatever environment it is given."""
    python_path = f"PYTHONPATH={_SOURCE}"
    return ["/usr/bin/env", python_path, sys.executable, "-P", "-m", module, *arguments]


class Outliving:
    """A process of a session of its own, which may outlive this one: it is never killed by going
    out of sight.

    One of asyncio's is: its transport kills what still runs when it is closed, which the end of the
    interpreter does (`asyncio/base_subprocess.py: BaseSubprocessTransport.__del__`). Streams are
    descriptors or subprocess.DEVNULL. `groups`: supplementary ones, None for this process's. Raises
    OSError when it can't be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int | None = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        groups: Sequence[int] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
            extra_groups=groups,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, None while it runs; as subprocess says it."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL; nothing to one that has ended."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait for its end. May be cancelled, and called by several at a time."""
        if self._process.poll() is None:
            # Its number is not given away before poll.
            await wait_ended(self._process.pid)
        return self._process.wait()


async def wait_ended(pid: int) -> None:
    """Wait for the end of any process. May be cancelled."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        # Readable when it has ended (pidfd_open(2)).
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        loop.add_reader(pidfd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not just a zombie that nobody has waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Running(NamedTuple):
    """A process and the words of its command line, as it was when it was looked at."""

    process: psutil.Process
    words: tuple[str, ...]


def running() -> Iterator[Running]:
    """Every process that is not a zombie.

    `psutil.process_iter` gives all threads the same objects, whose `info` is what the last thread
    asked for: it must not be used here, where the sessions of an agent have threads.
    """
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            yield Running(process, tuple(process.cmdline()))


def users_of(directory: Path) -> list[Running]:
    """Processes that were started for a session: its directory is in their command line."""
    return [one for one in running() if any(str(directory) in word for word in one.words)]


def waited(is_so: Callable[[], bool], deadline_s: float) -> bool:
    """Whether something came true within the deadline. Blocking."""
    limit_s = time.monotonic() + deadline_s
    while not is_so():
        if time.monotonic() > limit_s:
            return False
        time.sleep(_STEP_S)
    return True


def kill_tree(pid: int) -> None:
    """Kill a process that we started and what it started."""
    try:
        top = psutil.Process(pid)
        # Stopped, it starts nothing that would not be in the list.
        top.suspend()
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def tail(path: Path, bytes_max: int) -> str:
    """The end of a text file, nothing if there is none."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - bytes_max))
            return file.read(bytes_max).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_message(log: str) -> str:
    """The last message of a runtime's log, in one line; an object of JSON a line (`{"msg": "…"}`),
    of which the first may be cut off."""
    for line in reversed(log.splitlines()):
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and said.get("msg"):
                return " ".join(str(said["msg"]).split())
    return ""
