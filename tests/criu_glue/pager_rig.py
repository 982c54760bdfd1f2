"""What the pager's tests are made of: tasks with missing memory, and a restore in which the test
plays CRIU and the agent, with a real pager in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
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

from criu_glue import pager
from criu_glue.core.pagemap import PAGE_BYTES, PE_LAZY, PE_PARENT
from criu_glue.kernel import pidfd_getfd
from criu_glue.lazy_pages_socket import RESTORE_FINISHED, SOCKET_NAME
from criu_glue.page_store import PageStore
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

    def __init__(self, directory: Path) -> None:
        self.work = directory / "work"
        self.images = directory / "img"
        for path in (self.work, self.images):
            path.mkdir()
        self.store = PageStore(directory / "mem", quota_bytes=1 << 30)
        self.tasks: list[Task] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.events: list[dict[str, Any]] = []
        self._seen = 0
        self._criu: socket.socket | None = None
        self._partial = b""
        self._progress = -1

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

    def start_pager(self) -> None:
        self._progress, theirs = os.pipe()
        self.process = subprocess.Popen(
            pager.command(
                work=self.work, images=self.images, store=self.store.directory, progress_fd=theirs
            ),
            pass_fds=[theirs],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        os.close(theirs)
        self.wait_for("listening")

    def worker_pid(self) -> int:
        """The worker, when there is one again; 0 when the pager has ended."""
        assert self.process
        process = self.process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: process.poll() is not None or children.read_text() != "")
        return 0 if process.poll() is not None else int(children.read_text().split()[0])

    def kill_worker(self) -> None:
        pid = self.worker_pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

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
        assert self._criu
        self._criu.send(struct.pack("<i", number))
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

    def stop_listening_to_pager(self) -> None:
        """The agent dies."""
        os.close(self._progress)
        self._progress = -1

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of this kind; those before it are passed over, but not an error."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            while self._seen < len(self.events):
                found = self.events[self._seen]
                self._seen += 1
                if found["event"] == event:
                    return found
                assert found["event"] != "error", found
            ready, _, _ = select.select([self._progress], [], [], end_s - time.monotonic())
            assert ready, f"no {event} in {DEADLINE_S} s; had {self.events}"
            data = os.read(self._progress, 65536)
            assert data, f"the pager ended without {event}; had {self.events}"
            *lines, self._partial = (self._partial + data).split(b"\n")
            self.events += [json.loads(line) for line in lines]

    def wait_until_done(self) -> dict[str, Any]:
        done = self.wait_for("done")
        assert self.process
        assert self.process.wait(DEADLINE_S) == 0
        return done

    def end(self) -> None:
        for task in self.tasks:
            task.end()
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._criu:
            self._criu.close()
        if self._progress >= 0:
            os.close(self._progress)
        self.store.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "did not become true"
        time.sleep(0.001)


@contextlib.contextmanager
def new_restore() -> Iterator[Restore]:
    """A restore in a directory on a tmpfs; everything ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="pager-", dir="/dev/shm"))
    restore = Restore(directory)
    try:
        yield restore
    finally:
        restore.end()
        shutil.rmtree(directory)
