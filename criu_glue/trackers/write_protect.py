"""The dirty tracker `write-protect`: userfaultfd in asynchronous write-protect mode.

    open      a userfaultfd per task (`tracked_task`)
    register  each private anonymous mapping, mode WP
    collect   PAGEMAP_SCAN per mapping (`scan`): report the written pages and protect them again,
              atomically
    fault     a write to a protected page: the kernel drops the protection itself and goes on,
              nobody is asked (UFFD_FEATURE_WP_ASYNC); the page is "written" by that

What the kernel takes from us without a word (mmap, brk growth, mremap, fork, execve: a mapping
without our protection) is met by the scan as EPERM, then registered and wholly dirty. Whatever
can't be tracked (MAP_DROPPABLE memory, a task that somebody traces) is wholly dirty each time: a
tracker may report too much, never too little.

Blind spot: a device that writes by DMA to a page pinned before the scan (O_DIRECT reads in flight,
registered buffers); soft-dirty tracking shares it. Knows nothing of images or transfer.
"""

from __future__ import annotations

import errno
import functools
import os
import subprocess
from typing import TYPE_CHECKING, Final

from criu_glue import kernel
from criu_glue.errors import (
    CriuGlueError,
    InjectionError,
    TaskGoneError,
    TrackerUnsupportedError,
)
from criu_glue.mappings import check_count, private_anonymous
from criu_glue.memory import TaskMemory
from criu_glue.trackers import soft_dirty
from criu_glue.trackers.base import TaskPages
from criu_glue.trackers.scan import PageScanner
from criu_glue.trackers.tracked_task import TrackedTask

if TYPE_CHECKING:
    from collections.abc import Callable

# Turns of the round trip of `supported` until a program that only waits has no more dirty pages.
_QUIET_TURNS_MAX: Final = 20
# Of a task's memory. To clear the bits is a walk over all of its page tables, and to dump what has
# one takes CRIU several times as long for each page.
_SOFT_DIRTY_SHARE_MAX: Final = 1 / 16


class WriteProtectTracker:
    """See the module. `pids` returns the host pids of the container's tasks at this moment.

    `untracked` has, after a collect, the reason for each task (by host pid) that could not be
    opened and is reported whole. Not for several threads at once; each collect may come from
    another thread. Descriptors: two for each task.
    """

    name: Final = "write-protect"

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self._tasks: dict[int, TrackedTask] = {}
        self._scanner = PageScanner()
        self.untracked: dict[int, str] = {}

    def collect(self, *, last: bool = False) -> list[TaskPages]:
        """See `DirtyTracker.collect`. With `last` no task is stopped to open a userfaultfd in it
        (CRIU may hold it already), new ones are just reported whole.

        Tasks that share one memory (vfork children before their execve) are reported once, by
        the first; CRIU can't dump them. Raises TrackerUnsupportedError, LimitExceededError.
        """
        self._update_tasks()
        self.untracked = {}
        result: list[TaskPages] = []
        for tracked in _one_per_memory(list(self._tasks.values())):
            try:
                result.append(self._collect_task(tracked, last=last))
            except TaskGoneError:
                self._scanner.take()
                self._drop(tracked.task.pid)
        return result

    def detach(self) -> None:
        """See `DirtyTracker.detach`. Takes the kernel a walk over each task's page tables."""
        for pid in list(self._tasks):
            self._drop(pid)

    def _drop(self, pid: int) -> None:
        self._tasks.pop(pid).close()

    def _update_tasks(self) -> None:
        pids = self._pids()
        check_count(pids)
        for pid in self._tasks.keys() - set(pids):
            self._drop(pid)
        for pid in pids:
            # A number that belongs to another task by now.
            if pid in self._tasks and not self._tasks[pid].task.alive():
                self._drop(pid)
            try:
                if pid in self._tasks:
                    self._tasks[pid].begin()
                else:
                    self._tasks[pid] = TrackedTask(pid)
            except TaskGoneError:
                if pid in self._tasks:
                    self._drop(pid)

    def _collect_task(self, tracked: TrackedTask, *, last: bool) -> TaskPages:
        task = tracked.task
        if tracked.uffd < 0 and not last:
            try:
                tracked.reopen()
            except InjectionError as error:
                self.untracked[task.pid] = str(error)
        # Opened anew each time: they belong to the memory that the task had when they were opened.
        pagemap_fd = task.open(f"task/{tracked.thread}/pagemap")
        try:
            for start, end in private_anonymous(task.read(f"task/{tracked.thread}/maps")):
                self._collect_mapping(tracked, pagemap_fd, start, end, last=last)
        except InjectionError as error:
            self.untracked[task.pid] = str(error)
            raise
        finally:
            os.close(pagemap_fd)
        if not tracked.seen_protected and not last:
            # Not one mapping is under this userfaultfd: it must be of another memory than the
            # task's (the task was a vfork child when it was opened). A new one next time.
            tracked.close_uffd()
        task.living_thread()
        found = TaskPages(task=tracked.vpid, pid=task.pid, runs=self._scanner.take())
        if not last and soft_dirty.is_noted():
            _bound_soft_dirty(tracked, found.pages)
        return found

    def _collect_mapping(
        self, tracked: TrackedTask, pagemap_fd: int, start: int, end: int, *, last: bool
    ) -> None:
        walk = functools.partial(self._scanner.walk, pagemap_fd)
        reached = walk(start, end, written=True, tracked=True, protect=not last)
        if reached < end and not last and self._register(tracked, start, end):
            # From here on pages may have been protected in the walk that came to nothing, so
            # that being written says nothing: all of them.
            begun = reached
            reached = walk(begun, end, written=False, tracked=True, protect=True)
        if reached > start:
            tracked.seen_protected = True
        if reached < end:
            walk(reached, end, written=False, tracked=False, protect=False)

    def _register(self, tracked: TrackedTask, start: int, end: int) -> bool:
        try:
            return tracked.register(start, end)
        except InjectionError as error:
            self.untracked[tracked.task.pid] = str(error)
            return False


def _bound_soft_dirty(tracked: TrackedTask, pages: int) -> None:
    """These bits are set for what was written since somebody cleared them, and CRIU's final dump
    takes hold of pages that have one (`known_pages.py`): kept few, by a walk of the kernel now and
    then. What is written between the scan and this is reported by the next one."""
    tracked.soft_dirty_pages += pages
    thread = f"task/{tracked.thread}"
    _, resident, shared, *_ = map(int, tracked.task.read(f"{thread}/statm").split())
    if tracked.soft_dirty_pages > (resident - shared) * _SOFT_DIRTY_SHARE_MAX:
        tracked.task.write(f"{thread}/clear_refs", soft_dirty.CLEAR_SOFT_DIRTY)
        tracked.soft_dirty_pages = 0


def _one_per_memory(tasks: list[TrackedTask]) -> list[TrackedTask]:
    """Of tasks that share a memory only one, which is tracked already if any of them is.

    Two trackers of one memory would take each other's pages away.
    """
    if len(tasks) < 2:
        return tasks

    def compare(one: TrackedTask, other: TrackedTask) -> int:
        try:
            return kernel.kcmp_memory(one.thread, other.thread)
        except OSError as error:
            if error.errno == errno.ESRCH:
                # One of them has just exited: where it stands doesn't matter, it will be
                # dropped when it is opened.
                return -1
            raise TrackerUnsupportedError(f"kcmp(2): {error}") from error

    chosen: list[TrackedTask] = []
    ordered = sorted(tasks, key=functools.cmp_to_key(compare))
    for tracked in ordered:
        if chosen and compare(chosen[-1], tracked) == 0:
            if (tracked.uffd < 0, tracked.task.pid) < (chosen[-1].uffd < 0, chosen[-1].task.pid):
                chosen[-1] = tracked
        else:
            chosen.append(tracked)
    return sorted(chosen, key=lambda tracked: tracked.task.pid)


def supported() -> str | None:
    """None if this kernel can track, else the reason.

    Proved by a round trip, not by a version: a child (`cat`) is tracked until it is quiet, then
    made to write, and what it wrote must be in a page that is reported.
    """
    try:
        with subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as child:
            try:
                return _round_trip(child)
            finally:
                child.kill()
    except (OSError, CriuGlueError) as error:
        return str(error)


def _round_trip(child: subprocess.Popen[bytes]) -> str | None:
    _through(child, b"\n")
    tracker = WriteProtectTracker(lambda: [child.pid])
    try:
        first = tracker.collect()
        if tracker.untracked:
            return tracker.untracked[child.pid]
        if not sum(task.pages for task in first):
            return "PAGEMAP_SCAN does not report the pages of a task"
        if all(sum(task.pages for task in tracker.collect()) for _ in range(_QUIET_TURNS_MAX)):
            return "PAGEMAP_SCAN reports pages that nobody writes"
        mark = os.urandom(16)
        _through(child, mark)
        if not any(mark in _content(task) for task in tracker.collect()):
            return "userfaultfd write-protection misses a write"
    finally:
        tracker.detach()
    return None


def _through(child: subprocess.Popen[bytes], data: bytes) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(data)
    child.stdout.read(len(data))


def _content(task: TaskPages) -> bytes:
    memory = TaskMemory(task.pid)
    try:
        content = bytearray(task.pages * kernel.PAGE_BYTES)
        memory.read(task.runs, memoryview(content))
        return bytes(content)
    finally:
        memory.close()
