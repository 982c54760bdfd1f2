"""The dirty tracker `soft-dirty`: the kernel's soft-dirty bits, read and cleared from outside.

    still     all tasks stand still: for as long as their page tables are read, and no longer
    look      every entry of /proc/PID/pagemap of the private anonymous mappings (`page_entries`)
    clear     4 to /proc/PID/clear_refs: the next write to each page sets its bit again
    (run on)  the pages are read while the tasks run: one that is written meanwhile is in the next
              round, with all that is torn of it

Nothing can be read and cleared in one step, so a write between the two would be lost: hence the
standing still. The first write to a page after that costs the task a fault, as with every tracker.
Nothing is done inside the tasks and nothing stays there, so there is nothing to undo. It needs
CONFIG_MEM_SOFT_DIRTY (Linux 3.11; distributions have it on x86-64), and keeps 8 bytes for each page
of a task's mappings (pieces of 128 MiB without a page at all aside).

What it reports too much: a mapping that is new, or has grown, is dirty as a whole, with what it was
merged with (brk(2): the heap; mm/mmap.c: do_brk_flags), and a huge page is dirty as one. The sender
leaves out what has not changed. Blind spot: a device that writes by DMA to a page pinned before
(write-protection shares it).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Final

from criu_glue.errors import TaskGoneError
from criu_glue.mappings import Task, check_count, private_anonymous
from criu_glue.trackers.base import TaskPages
from criu_glue.trackers.page_entries import (
    PLACE,
    SOFT_DIRTY,
    entry_of,
    own_page,
    read_pieces,
    written_runs,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from criu_glue.trackers.page_entries import Piece

# Documentation/admin-guide/mm/soft-dirty.rst
CLEAR_SOFT_DIRTY: Final = b"4"


class SoftDirtyTracker:
    """See the module. `pids` returns the host pids of the container's tasks at this moment; within
    `still()` none of them executes anything, and no new one comes.

    Not for several threads at once; each collect may come from another thread. A descriptor for
    each task.
    """

    name: Final = "soft-dirty"

    def __init__(
        self, pids: Callable[[], list[int]], still: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._pids = pids
        self._still = still
        self._tasks: dict[int, _NotedTask] = {}

    def collect(self, *, last: bool = False) -> list[TaskPages]:
        """See `DirtyTracker.collect`. Raises what `still` does, then all is dirty again."""
        try:
            if last:
                self._look()
            else:
                with self._still():
                    self._look()
                    # After all have been looked at: some may share a memory (vfork(2)).
                    self._each(_NotedTask.clear)
        except BaseException:
            # Bits may be cleared that nobody has seen.
            self.detach()
            raise
        return [task.written(keep=not last) for task in self._tasks.values()]

    def detach(self) -> None:
        """Nothing is in the tasks; see `DirtyTracker.detach`."""
        for pid in list(self._tasks):
            self._drop(pid)

    def _look(self) -> None:
        pids = self._pids()
        check_count(pids)
        for pid in self._tasks.keys() - set(pids):
            self._drop(pid)
        for pid in pids:
            # A number that belongs to another task by now.
            if pid in self._tasks and not self._tasks[pid].is_alive():
                self._drop(pid)
            if pid not in self._tasks:
                try:
                    self._tasks[pid] = _NotedTask(pid)
                except TaskGoneError:
                    continue
        self._each(_NotedTask.look)

    def _each(self, act: Callable[[_NotedTask], None]) -> None:
        for pid, task in list(self._tasks.items()):
            try:
                act(task)
            except TaskGoneError:
                self._drop(pid)

    def _drop(self, pid: int) -> None:
        self._tasks.pop(pid).close()


class _NotedTask:
    """One task, what its pages are, and what they were when its bits were last cleared."""

    __slots__ = ("_before", "_now", "_task", "_thread", "_vpid", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = self._thread = pid
        self._before: list[Piece] = []
        self._now: list[Piece] = []
        self._task = Task(pid)
        try:
            self._vpid = self._task.vpid()
        except TaskGoneError:
            self.close()
            raise

    def is_alive(self) -> bool:
        return self._task.alive()

    def look(self) -> None:
        """Read its entries. Raises TaskGoneError if it has no memory (any more)."""
        self._thread = self._task.living_thread()
        ranges = private_anonymous(self._task.read(f"task/{self._thread}/maps"))
        fd = self._task.open(f"task/{self._thread}/pagemap")
        try:
            self._now = read_pieces(fd, ranges)
        finally:
            os.close(fd)

    def clear(self) -> None:
        """Clear its bits. Raises TaskGoneError."""
        self._task.write(f"task/{self._thread}/clear_refs", CLEAR_SOFT_DIRTY)

    def written(self, *, keep: bool) -> TaskPages:
        """What was written; `keep`: since then the bits were cleared."""
        runs = written_runs(self._now, self._before)
        if keep:
            self._before = self._now
        return TaskPages(self._vpid, self.pid, runs)

    def close(self) -> None:
        self._task.close()


def supported() -> str | None:
    """None if this kernel notes soft-dirty pages and shows which frames they are, else the reason.

    Proved by a round trip with a page of our own: a kernel without them takes the order to clear
    them and does nothing.
    """
    try:
        with own_page() as page:
            page[0] = 1
            _clear_own()
            cleared = entry_of(page)
            page[0] = 2
            written = entry_of(page)
    except OSError as error:
        return f"soft-dirty bits can't be read: {error}"
    if not written & SOFT_DIRTY:
        return "this kernel does not note soft-dirty pages (CONFIG_MEM_SOFT_DIRTY)"
    if cleared & SOFT_DIRTY:
        return "this kernel does not clear soft-dirty bits"
    return None if written & PLACE else "page frames are hidden from this process (CAP_SYS_ADMIN)"


@functools.cache
def is_noted() -> bool:
    """Whether this kernel notes soft-dirty pages; what it says once it says always."""
    return supported() is None


def _clear_own() -> None:
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:  # noqa: PTH123
        file.write(CLEAR_SOFT_DIRTY)
