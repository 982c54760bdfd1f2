"""The dirty tracker `none`: no tracking at all, for kernels and containers that allow nothing else.

Every collect reports every page present. Only one collect makes sense, the last one, in the
freeze: whatever is copied while the container runs may have changed by then, unseen. The downtime
is that of all the memory, so whoever falls back to this has to say so loudly. It works on every
kernel.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from criu_glue.errors import TaskGoneError
from criu_glue.mappings import Task, check_count, private_anonymous
from criu_glue.trackers.base import TaskPages
from criu_glue.trackers.page_entries import present_runs, read_pieces

if TYPE_CHECKING:
    from collections.abc import Callable


class StopAndCopyTracker:
    """See the module. `pids` returns the host pids of the container's tasks at this moment."""

    name: Final = "none"

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids

    def collect(self, *, last: bool = False) -> list[TaskPages]:
        """All pages present, whether or not it is the last time."""
        pids = self._pids()
        check_count(pids)
        result: list[TaskPages] = []
        for pid in pids:
            try:
                task = Task(pid)
            except TaskGoneError:
                continue
            try:
                result.append(self._collect_task(task))
            except TaskGoneError:
                continue
            finally:
                task.close()
        return result

    def detach(self) -> None:
        """Nothing to give back."""

    def _collect_task(self, task: Task) -> TaskPages:
        thread = task.living_thread()
        ranges = private_anonymous(task.read(f"task/{thread}/maps"))
        pagemap_fd = task.open(f"task/{thread}/pagemap")
        try:
            runs = present_runs(read_pieces(pagemap_fd, ranges))
        finally:
            os.close(pagemap_fd)
        return TaskPages(task=task.vpid(), pid=task.pid, runs=runs)
