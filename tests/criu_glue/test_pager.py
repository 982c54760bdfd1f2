"""The pager against the real kernel: processes that register a userfaultfd themselves and do to
their memory whatever a restored task may do, while this test plays CRIU."""

from __future__ import annotations

import contextlib
import json
import os
import resource
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

import pytest

from criu_glue import pager
from criu_glue.core.fill_journal import RECORD_BYTES
from criu_glue.core.pagemap import PAGE_BYTES, PE_LAZY, PE_PARENT
from criu_glue.kernel import UFFD_MSG_BYTES, pidfd_getfd
from criu_glue.lazy_pages_socket import RESTORE_FINISHED, SOCKET_NAME
from criu_glue.page_store import PageStore
from tests.criu_glue.checkpoint_images import write_task
from tests.criu_glue.uffd_child import page_content

PROJECT = Path(__file__).parents[2]
BASE = 0x10_0000_0000
ELSEWHERE = 0x20_0000_0000
BASE_PAGE = BASE // PAGE_BYTES
DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


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

    def is_waiting(self) -> bool:
        """Whether it sleeps in a page fault."""
        wchan = Path(f"/proc/{self.process.pid}/wchan").read_text()
        return "userfault" in wchan

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
        """The next event of this kind; those before it are passed over."""
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


@pytest.fixture
def restore() -> Iterator[Restore]:
    directory = Path(tempfile.mkdtemp(prefix="pager-", dir="/dev/shm"))
    restore = Restore(directory)
    yield restore
    restore.end()
    shutil.rmtree(directory)


def test_faults_are_served_before_the_restore_is_finished(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    assert restore.wait_for("tasks")["count"] == 1
    assert task.do(["walk_down", BASE, 256, BASE_PAGE]) == [[]]
    restore.finish()
    restore.wait_for("restored")
    done = restore.wait_until_done()
    assert done["faults"] == 256
    assert done["unplaced_bytes"] == 0


def test_the_background_fills_what_nobody_touches(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 4096)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=4096)
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == 4096 * PAGE_BYTES
    assert task.do(["resident", BASE, 4096]) == [4096]
    assert task.do(["wrong", BASE, 4096, BASE_PAGE]) == [[]]


def test_what_is_filled_leaves_the_store(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    assert restore.store.stored_bytes() == 2048 * PAGE_BYTES
    restore.start_pager()
    restore.connect()
    restore.announce(5, pages=2048)
    restore.finish()
    restore.wait_until_done()
    assert restore.store.stored_bytes() == 0


def test_zeros_take_no_memory(restore: Restore) -> None:
    """Holes of the store, zeros that it holds, and memory that was never lazy."""
    restore.has_task(5, [(BASE_PAGE, 64), (BASE_PAGE + 128, 64)], [(BASE_PAGE, 256)], content=False)
    restore.fill_store(5, BASE_PAGE + 10, 1)
    restore.fill_store(5, BASE_PAGE + 130, 3)
    restore.store.write(5, BASE + 20 * PAGE_BYTES, bytes(8 * PAGE_BYTES))
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    assert task.do(["wrong", BASE, 10, None], ["wrong", BASE + 64 * PAGE_BYTES, 64, None]) == [
        [],
        [],
    ]
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == 4 * PAGE_BYTES
    assert done["zero_bytes"] == 124 * PAGE_BYTES
    assert task.do(
        ["wrong", BASE + 10 * PAGE_BYTES, 1, BASE_PAGE + 10],
        ["wrong", BASE + 11 * PAGE_BYTES, 119, None],
        ["wrong", BASE + 130 * PAGE_BYTES, 3, BASE_PAGE + 130],
        ["wrong", BASE + 133 * PAGE_BYTES, 123, None],
    ) == [[], [], [], []]


def test_several_tasks_and_a_zombie(restore: Restore) -> None:
    for number in (1, 2, 300):
        restore.has_task(number, [(BASE_PAGE, 32)], content=False)
        restore.fill_store(number, BASE_PAGE + number % 32, 1)
    restore.start_pager()
    restore.connect()
    tasks = {number: restore.announce(number, pages=32) for number in (1, 300)}
    restore.send_number(-17)
    tasks[2] = restore.announce(2, pages=32)
    restore.finish()
    done = restore.wait_until_done()
    assert done["tasks"] == 3
    for number, task in tasks.items():
        own = number % 32
        wrong = task.do(["wrong", BASE, 32, BASE_PAGE])[0]
        assert wrong == [n for n in range(32) if n != own]


def test_threads_fault_at_the_same_time(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.start(["hash_in_threads", BASE, 2048, 6])
    restore.finish()
    first = task.results()[0]
    restore.wait_until_done()
    assert len(set(first)) == 1
    assert task.do(["wrong", BASE, 2048, BASE_PAGE]) == [[]]
    assert task.do(["hash_in_threads", BASE, 2048, 1])[0] == first[:1]


def test_what_the_task_wrote_is_not_overwritten(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.do(*[["write", BASE + n * PAGE_BYTES, 7] for n in range(0, 2048, 100)])
    restore.finish()
    restore.wait_until_done()
    held = task.do(*[["holds", BASE + n * PAGE_BYTES, 7] for n in range(0, 2048, 100)])
    assert all(held)
    assert task.do(["wrong", BASE + PAGE_BYTES, 99, BASE_PAGE + 1]) == [[]]


def test_pages_given_up_read_as_zeros(restore: Restore) -> None:
    """madvise(MADV_DONTNEED) of pages that are missing, there, or written."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["write", BASE + 40 * PAGE_BYTES, 9], ["wrong", BASE, 4, BASE_PAGE])
    task.do(["dontneed", BASE + 2 * PAGE_BYTES, 100])
    checks = [
        ["wrong", BASE + 2 * PAGE_BYTES, 100, None],
        ["wrong", BASE, 2, BASE_PAGE],
        ["wrong", BASE + 102 * PAGE_BYTES, 154, BASE_PAGE + 102],
    ]
    assert task.do(*checks[:2]) == [[], []]
    restore.finish()
    restore.wait_until_done()
    assert task.do(*checks) == [[], [], []]


def test_unmapped_and_mapped_again_reads_as_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["unmap", BASE + 100 * PAGE_BYTES, 50], ["map", BASE + 100 * PAGE_BYTES, 50])
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == 206 * PAGE_BYTES
    assert done["unplaced_bytes"] == 0
    assert task.do(
        ["wrong", BASE, 100, BASE_PAGE],
        ["wrong", BASE + 100 * PAGE_BYTES, 50, None],
        ["wrong", BASE + 150 * PAGE_BYTES, 106, BASE_PAGE + 150],
    ) == [[], [], []]


@pytest.mark.parametrize("keep_old", [False, True])
def test_moved_memory_keeps_its_content(restore: Restore, keep_old: bool) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    middle = BASE + 64 * PAGE_BYTES
    task.do(["wrong", middle, 1, BASE_PAGE + 64], ["move", middle, 32, ELSEWHERE, 32, keep_old])
    moved = ["wrong", ELSEWHERE + 20 * PAGE_BYTES, 12, BASE_PAGE + 84]
    assert task.do(moved) == [[]]
    if keep_old:
        assert task.do(["wrong", middle, 32, None]) == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == 256 * PAGE_BYTES
    assert task.do(
        ["wrong", ELSEWHERE, 32, BASE_PAGE + 64],
        ["wrong", BASE, 64, BASE_PAGE],
        ["wrong", BASE + 96 * PAGE_BYTES, 160, BASE_PAGE + 96],
    ) == [[], [], []]


def test_moved_and_grown_memory_ends_in_zeros(restore: Restore) -> None:
    """realloc of a large block: mremap to somewhere else with more room."""
    restore.has_task(5, [(BASE_PAGE, 64)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=64)
    task.do(["move", BASE, 64, ELSEWHERE, 256, False])
    task.do(["move", ELSEWHERE, 256, BASE + 4096 * PAGE_BYTES, 300, False])
    restore.finish()
    restore.wait_until_done()
    assert task.do(
        ["wrong", BASE + 4096 * PAGE_BYTES, 64, BASE_PAGE],
        ["wrong", BASE + 4160 * PAGE_BYTES, 236, None],
    ) == [[], []]


def test_shrunk_and_grown_in_place_reads_as_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 64)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=64)
    task.do(["grow", BASE, 64, 20], ["grow", BASE, 20, 80])
    assert task.do(["wrong", BASE + 20 * PAGE_BYTES, 60, None]) == [[]]
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 20, BASE_PAGE]) == [[]]


def test_a_forked_child_has_all_of_its_parents_memory(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["wrong", BASE, 10, BASE_PAGE])
    assert task.do(["in_child", [["wrong", BASE, 256, BASE_PAGE]]]) == [[[]]]
    assert task.do(
        ["in_child", [["in_child", [["wrong", BASE, 256, BASE_PAGE]]]]],
        ["in_child", [["dontneed", BASE, 256], ["wrong", BASE, 256, None]]],
    ) == [[[[]]], [None, []]]
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]


def test_a_child_needs_what_its_parent_had_filled_or_dropped(restore: Restore) -> None:
    """The store keeps what only the child still misses, and the child outlives the fill."""
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=1024)
    task.do(["fork_waiting", [["wrong", BASE, 1024, BASE_PAGE]]], ["dontneed", BASE, 512])
    assert task.do(["wrong", BASE, 512, None]) == [[]]
    assert task.do(["wrong", BASE + 512 * PAGE_BYTES, 512, BASE_PAGE + 512]) == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == (512 + 1024) * PAGE_BYTES
    assert task.do(["child_results"]) == [[[]]]
    assert restore.store.stored_bytes() <= 512 * PAGE_BYTES


def test_moves_faults_and_fill_at_the_same_time(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.start(["move_while_others_read", BASE, 512, ELSEWHERE, BASE_PAGE, 400])
    restore.finish()
    assert task.results() == [[]]
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 2048, BASE_PAGE]) == [[]]


def test_a_task_that_ends_does_not_keep_the_others_waiting(restore: Restore) -> None:
    for number in (1, 2):
        restore.has_task(number, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    first = restore.announce(1)
    second = restore.announce(2)
    first.end()
    restore.finish()
    done = restore.wait_until_done()
    assert done["filled_bytes"] == 256 * PAGE_BYTES
    assert second.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]


def test_the_pager_outlives_the_agent(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    assert os.getsid(restore.process.pid) == restore.process.pid
    restore.stop_listening_to_pager()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        restore.process.send_signal(number)
    assert task.do(["wrong", BASE, 16, BASE_PAGE]) == [[]]
    restore.finish()
    assert restore.process.wait(DEADLINE_S) == 0
    assert task.do(["wrong", BASE, 1024, BASE_PAGE]) == [[]]


def test_the_pager_has_no_network(restore: Restore) -> None:
    restore.start_pager()
    assert restore.process
    theirs = Path(f"/proc/{restore.process.pid}/ns/net").readlink()
    assert theirs != Path("/proc/self/ns/net").readlink()


def test_the_fill_can_begin_while_the_restore_is_held(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    restore.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: task.do(["resident", BASE, 1024]) == [1024])
    # Held all the same: only the end of the restore may close it.
    assert task.do(["dontneed", BASE, 4], ["wrong", BASE, 4, None])[1] == []
    restore.finish()
    restore.wait_until_done()


def test_a_restore_that_fails_is_reported_and_nothing_is_given_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    restore.disconnect()
    error = None
    with pytest.raises(AssertionError, match="CRIU closed the connection"):
        error = restore.wait_for("done")
    assert error is None
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert restore.process.poll() is None
    task.end()
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_stranger_on_the_socket_is_refused(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    with Path("/dev/null").open() as null:
        restore.send_task(5, null.fileno())
    with pytest.raises(AssertionError, match="not a userfaultfd"):
        restore.wait_for("done")
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_task_without_images_waits_and_the_others_go_on(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    bad = restore.announce(6, pages=16)
    with pytest.raises(AssertionError, match=r"pagemap-6\.img"):
        restore.wait_for("done")
    good = restore.announce(5)
    bad.start(["wrong", BASE, 1, BASE_PAGE])
    restore.finish()
    restore.wait_for("restored")
    with pytest.raises(AssertionError, match="1 tasks can't be filled"):
        restore.wait_for("done")
    assert good.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]
    assert bad.is_waiting()
    bad.end()
    assert restore.process
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_pager_that_nobody_used_can_be_told_to_end(restore: Restore) -> None:
    restore.start_pager()
    assert restore.process
    restore.process.send_signal(signal.SIGTERM)
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_deep_directory_is_no_obstacle(restore: Restore) -> None:
    restore.work = restore.work / ("d" * 100) / ("e" * 100)
    restore.work.mkdir(parents=True)
    restore.start_pager()
    assert (restore.work / SOCKET_NAME).is_socket()


# -- a worker that dies --


def test_another_worker_goes_on(restore: Restore) -> None:
    """Some pages are there, some are not, and a thread waits for one that nobody brings."""
    restore.has_task(5, [(BASE_PAGE, 512)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=512)
    assert task.do(["wrong", BASE, 100, BASE_PAGE]) == [[]]
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.start(["wrong", BASE + 200 * PAGE_BYTES, 312, BASE_PAGE + 200])
    wait_until(task.is_waiting)
    restore.kill_worker()
    assert restore.wait_for("restarted")["count"] == 1
    assert task.results() == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done["tasks"] == 1
    assert task.do(["wrong", BASE, 512, BASE_PAGE]) == [[]]


def test_another_worker_wakes_whom_the_first_had_heard(restore: Restore) -> None:
    """A page fault is told once; its thread must ask again."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.make_task()
    restore.send_task(5, task.uffd)
    restore.wait_for("tasks")
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert len(os.read(task.uffd, 4096)) == UFFD_MSG_BYTES
    os.close(task.uffd)
    restore.kill_worker()
    assert task.results() == [[]]
    restore.finish()
    restore.wait_until_done()


def test_another_worker_knows_what_was_moved_dropped_and_forked(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 512)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=512)
    task.do(
        ["write", BASE, 3],
        ["dontneed", BASE + 10 * PAGE_BYTES, 10],
        ["unmap", BASE + 30 * PAGE_BYTES, 10],
        ["move", BASE + 100 * PAGE_BYTES, 50, ELSEWHERE, 60, False],
        ["fork_waiting", [["wrong", BASE + 40 * PAGE_BYTES, 60, BASE_PAGE + 40]]],
        ["dontneed", BASE + 40 * PAGE_BYTES, 30],
    )
    # Opened, removed, removed, moved and its old place removed, forked, removed.
    journal = restore.store.directory / "pager.journal"
    wait_until(lambda: journal.stat().st_size == 7 * RECORD_BYTES)
    restore.kill_worker()
    restore.wait_for("restarted")
    restore.finish()
    done = restore.wait_until_done()
    assert done["unplaced_bytes"] == 0
    assert task.do(
        ["holds", BASE, 3],
        ["wrong", BASE + PAGE_BYTES, 9, BASE_PAGE + 1],
        ["wrong", BASE + 10 * PAGE_BYTES, 10, None],
        ["wrong", BASE + 20 * PAGE_BYTES, 10, BASE_PAGE + 20],
        ["wrong", BASE + 40 * PAGE_BYTES, 30, None],
        ["wrong", BASE + 70 * PAGE_BYTES, 30, BASE_PAGE + 70],
        ["wrong", BASE + 150 * PAGE_BYTES, 362, BASE_PAGE + 150],
        ["wrong", ELSEWHERE, 50, BASE_PAGE + 100],
        ["wrong", ELSEWHERE + 50 * PAGE_BYTES, 10, None],
        ["child_results"],
    ) == [True, [], [], [], [], [], [], [], [], [[]]]


@pytest.mark.parametrize("after_ms", [0, 3, 10])
def test_workers_may_die_in_the_middle_of_the_fill(restore: Restore, after_ms: int) -> None:
    restore.has_task(5, [(BASE_PAGE, 8192)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=8192)
    task.start(["walk_down", BASE, 8192, BASE_PAGE])
    restore.finish()
    restore.wait_for("restored")
    for _ in range(2):
        end_s = time.monotonic() + after_ms / 1000
        while time.monotonic() < end_s:
            os.sched_yield()
        restore.kill_worker()
    assert task.results() == [[]]
    restore.wait_until_done()
    assert restore.store.stored_bytes() == 0


def test_criu_does_not_notice_that_a_worker_died(restore: Restore) -> None:
    """Its last word must arrive: CRIU kills what it restored when it can't send it."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    restore.finish()
    restore.kill_worker()
    restore.wait_for("restored")
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]


def test_a_worker_that_dies_before_criu_comes_is_replaced(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.kill_worker()
    restore.connect()
    task = restore.announce(5)
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]
    restore.finish()
    restore.wait_until_done()


def test_a_worker_goes_on_without_its_keeper(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    restore.process.kill()
    restore.process.wait()
    task.do(["in_child", [["wrong", BASE, 1024, BASE_PAGE]]])
    restore.finish()
    restore.wait_for("done")
    assert task.do(["wrong", BASE, 1024, BASE_PAGE]) == [[]]


def test_nothing_is_held_after_the_end(restore: Restore) -> None:
    """Fresh memory works without anybody's help then."""
    restore.has_task(5, [(BASE_PAGE, 128)], [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["in_child", [["wrong", BASE, 128, BASE_PAGE]]])
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE + 128 * PAGE_BYTES, 128, None]) == [[]]


def test_a_worker_without_its_journal_gives_no_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    (restore.store.directory / "pager.journal").unlink()
    restore.kill_worker()
    with pytest.raises(AssertionError, match=r"pager\.journal"):
        restore.wait_for("restored")
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    task.end()
    assert restore.process
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_pager_whose_workers_all_die_gives_no_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=16)
    restore.wait_for("tasks")
    for _ in range(9):
        restore.kill_worker()
        restore.wait_for("restarted")
    task.start(["wrong", BASE + PAGE_BYTES, 1, BASE_PAGE + 1])
    assert task.results() == [[]]
    restore.kill_worker()
    with pytest.raises(AssertionError, match="10 workers died"):
        restore.wait_for("restarted")
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)


def test_a_worker_that_can_write_no_journal_goes_on_alone(restore: Restore) -> None:
    """What the next one would need is not there, so it gives nothing rather than old content."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    # RLIMIT_FSIZE is to a file what a full tmpfs is.
    resource.prlimit(restore.worker_pid(), resource.RLIMIT_FSIZE, (RECORD_BYTES, RECORD_BYTES))
    restore.connect()
    task = restore.announce(5)
    task.do(["dontneed", BASE, 16], ["dontneed", BASE + 32 * PAGE_BYTES, 16])
    assert task.do(["wrong", BASE, 16, None], ["wrong", BASE + 16 * PAGE_BYTES, 16, BASE_PAGE + 16])
    assert not (restore.store.directory / "pager.journal").exists()
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE + 48 * PAGE_BYTES, 208, BASE_PAGE + 48]) == [[]]
