"""What the pager's tests are made of: tasks with missing memory, and a restore in which the test
plays CRIU and the agent, with a real pager in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from criu_glue import pager, pager_watch
from criu_glue.core.pagemap import PAGE_BYTES, PE_LAZY, PE_PARENT
from criu_glue.kernel import pidfd_getfd
from criu_glue.lazy_pages_socket import RESTORE_FINISHED, SOCKET_NAME
from criu_glue.page_store import PageStore
from criu_glue.pager_state import PagerState, PagerStateError, Phase
from tests.criu_glue.checkpoint_images import write_task
from tests.criu_glue.uffd_child import page_content

PROJECT = Path(__file__).parents[2]
BASE = 0x10_0000_0000
ELSEWHERE = 0x20_0000_0000
BASE_PAGE = BASE // PAGE_BYTES
DEADLINE_S = 60.0


class Task:
    """One child process and its commands."""

    def __init__(self, address: int, pages: int) -> None:
        child = Path(__file__).parent / "uffd_child.py"
        self.process = subprocess.Popen(
            [sys.executable, str(child), hex(address), str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        uffd = json.loads(self._line())["uffd"]
        pidfd = os.pidfd_open(self.process.pid)
        self.uffd = pidfd_getfd(pidfd, uffd)
        os.close(pidfd)
        self._send("close")
        assert self._line().strip() == '"closed"'

    def _send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the task has died"
        return line

    def start(self, *operations: list[Any]) -> None:
        """Tell what to do without waiting for it."""
        self._send(json.dumps(operations))

    def results(self) -> list[Any]:
        """Wait for what was started."""
        return json.loads(self._line())

    def do(self, *operations: list[Any]) -> list[Any]:
        """Do it and wait for it."""
        self.start(*operations)
        return self.results()

    def is_waiting(self, threads: int = 1) -> bool:
        """Whether so many threads sleep in a page fault, or until a change is heard of."""
        wchans = Path(f"/proc/{self.process.pid}/task").glob("*/wchan")
        return sum("userfault" in wchan.read_text() for wchan in wchans) == threads

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Restore:
    """One restore: images and store in a directory, a pager process, CRIU played by the test."""

    def __init__(self, directory: Path, store: Path | None = None) -> None:
        self.work = directory / "work"
        self.images = directory / "img"
        for path in (self.work, self.images):
            path.mkdir()
        self.store = PageStore(store or directory / "mem", quota_bytes=1 << 30)
        self.tasks: list[Task] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._criu: socket.socket | None = None

    def fill_store(self, task: int, page: int, pages: int) -> None:
        """Store pages number `page` on, each with its content."""
        for first in range(page, page + pages, 1024):
            count = min(1024, page + pages - first)
            data = b"".join(page_content(first + n) for n in range(count))
            self.store.write(task, first * PAGE_BYTES, data)

    def has_task(
        self,
        number: int,
        lazy: list[tuple[int, int]],
        mapped: list[tuple[int, int]] | None = None,
        *,
        content: bool = True,
    ) -> None:
        """A task of the checkpoint: runs of (page number, pages) that are lazy, and mapped."""
        if content:
            for page, pages in lazy:
                self.fill_store(number, page, pages)
        self.store.add_task(number)
        entries = [(page * PAGE_BYTES, pages, PE_PARENT | PE_LAZY) for page, pages in lazy]
        vmas = [(page * PAGE_BYTES, pages) for page, pages in mapped or lazy]
        write_task(self.images, number, entries, vmas)

    def start_pager(self, *, on_demand: bool = False) -> None:
        where = self.store.directory
        self.process = subprocess.Popen(
            pager.command(work=self.work, images=self.images, store=where, on_demand=on_demand),
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        self.wait_for(Phase.LISTENING)

    @property
    def state(self) -> PagerState:
        """What the pager says now."""
        return PagerState.read(self.work)

    def is_alive(self) -> bool:
        """Whether any process of the pager is there."""
        fd = pager_watch.open_alive(self.work)
        try:
            return pager_watch.heard(fd)
        finally:
            os.close(fd)

    def _pid(self, role: str) -> int:
        """The one that is alive; 0 when the pager has ended."""
        found = 0

        def is_there() -> bool:
            nonlocal found
            state = self.state
            pid, ticks = getattr(state, role), getattr(state, f"{role}_ticks")
            found = pid if is_running(pid) and pager_watch.start_ticks(pid) == ticks else 0
            return bool(found) or not self.is_alive()

        wait_until(is_there)
        return found

    def worker_pid(self) -> int:
        """The worker, when there is one again; 0 when the pager has ended."""
        return self._pid("worker")

    def keeper_pid(self) -> int:
        """The keeper, likewise."""
        return self._pid("keeper")

    def kill_worker(self) -> None:
        """Returns when there is another one, or the pager has ended."""
        self._kill("worker")

    def kill_keeper(self) -> None:
        """Likewise."""
        self._kill("keeper")

    def _kill(self, role: str) -> None:
        pid, count = self._pid(role), getattr(self.state, f"{role}s")
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: getattr(self.state, f"{role}s") > count or not self.is_alive())

    def kill_both(self) -> None:
        """At once: nobody is left to replace anybody."""
        os.killpg(self.state.group, signal.SIGKILL)

    def connect(self) -> None:
        self._criu = socket.socket(socket.AF_UNIX)
        self._criu.connect(str(self.work / SOCKET_NAME))

    def announce(self, number: int, address: int = BASE, pages: int = 256) -> Task:
        """A task gets as far as to send its userfaultfd."""
        task = self.make_task(address, pages)
        self.send_task(number, task.uffd)
        os.close(task.uffd)
        return task

    def make_task(self, address: int = BASE, pages: int = 256) -> Task:
        """A task whose userfaultfd nobody has but the test."""
        task = Task(address, pages)
        self.tasks.append(task)
        return task

    def send_task(self, number: int, descriptor: int) -> None:
        self.send_number(number)
        self.send_descriptor(descriptor)

    def send_descriptor(self, descriptor: int) -> None:
        assert self._criu
        socket.send_fds(self._criu, [b"\0"], [descriptor])

    def send_number(self, number: int) -> None:
        assert self._criu
        self._criu.send(struct.pack("<i", number))

    def finish(self) -> None:
        """CRIU says that the restore is finished, and goes."""
        self.send_number(RESTORE_FINISHED)
        self.disconnect()

    def disconnect(self) -> None:
        assert self._criu
        self._criu.close()

    def wait_for(self, *phases: Phase) -> PagerState:
        """Until it is in one of these phases; that it failed is an error unless it is wanted."""
        found: list[PagerState] = []

        def is_there() -> bool:
            with contextlib.suppress(PagerStateError):
                found[:] = [self.state]
            if not found:
                return False
            assert Phase.FAILED in phases or not found[0].error, found[0].error
            return found[0].phase in phases

        wait_until(is_there)
        return found[0]

    def wait_for_error(self) -> str:
        wait_until(lambda: bool(self.state.error))
        return self.state.error

    def wait_for_tasks(self, count: int) -> None:
        wait_until(lambda: self.state.tasks == count)

    def wait_until_gone(self) -> None:
        wait_until(lambda: not self.is_alive())

    def wait_until_done(self) -> PagerState:
        self.wait_for(Phase.DONE)
        self.wait_until_gone()
        return self.state

    def end(self) -> None:
        for task in self.tasks:
            task.end()
        if self.process:
            pager_watch.kill(self.work, DEADLINE_S)
            self.process.wait()
        if self._criu:
            self._criu.close()
        self.store.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not just a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "did not become true"
        time.sleep(0.001)


@contextlib.contextmanager
def new_restore(store: Path | None = None) -> Iterator[Restore]:
    """A restore in a directory on a tmpfs; everything ends with it, but another one's store."""
    directory = Path(tempfile.mkdtemp(prefix="pager-", dir="/dev/shm"))
    restore = Restore(directory, store)
    try:
        yield restore
    finally:
        restore.end()
        shutil.rmtree(directory)
