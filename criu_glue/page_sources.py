"""Where the pages of a container's rounds come from: which ones, and their content.

    round 1..n   collect() -> read(…) by the sender's threads -> delivered()      the container runs
    freeze       final()   -> read(…) -> CRIU dumps -> dumped(…) -> read(…) -> delivered()

There are two kinds. A `TaskSource` is told by a dirty tracker which pages were written and reads
them out of the tasks; CRIU's dump is to leave all of that out (`--lazy-pages`). With `predump` CRIU
itself finds and copies what was written, and its dump is to do so once more
(`trackers/predump.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from criu_glue.errors import TaskGoneError
from criu_glue.kernel import PAGE_BYTES
from criu_glue.mappings import Task, parse_maps, private_anonymous
from criu_glue.memory import TaskMemory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns
    from criu_glue.trackers.base import DirtyTracker, TaskPages


class PageSource(Protocol):
    """See the module. Pages are [(task, page runs)], each task once. For one thread at a time,
    except `read`, which many call between one of the other methods and the next."""

    @property
    def name(self) -> str:
        """Of the tracker, as the user names it and the report shows it."""

    @property
    def parent(self) -> Path | None:
        """The images that CRIU's final dump is to build upon; None: it is to be a lazy one."""

    def collect(self) -> list[tuple[int, PageRuns]]:
        """What was written since the last time; at first, everything."""

    def final(self) -> FinalDelta:
        """Once: the tasks are frozen, and are given back untouched so that CRIU can dump them."""

    def dumped(self, image_dir: Path) -> list[tuple[int, PageRuns]]:
        """What is nowhere but in the images of the dump, which is complete and held."""

    def watched(self, task: int, runs: PageRuns) -> tuple[PageRuns, PageRuns]:
        """Pages that the dump has left out, parted: of the first every write was noticed until the
        freeze, of the others not."""

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """Content of pages that were named last, as `TaskMemory.read`."""

    def delivered(self) -> None:
        """The target has all that was named last: its content here may go."""

    def close(self) -> None:
        """Let go of the tasks and of everything else. Idempotent."""


class TaskSource:
    """The tasks' own memory, and a tracker that says what of it was written."""

    parent: None = None

    def __init__(self, tracker: DirtyTracker) -> None:
        self._tracker = tracker
        self._memories: dict[int, TaskMemory] = {}
        self._pids: dict[int, int] = {}
        self._watched: dict[int, list[tuple[int, int]]] = {}

    @property
    def name(self) -> str:
        """The tracker's."""
        return self._tracker.name

    def collect(self) -> list[tuple[int, PageRuns]]:
        """What the tracker reports, of tasks that live."""
        return [(item.task, item.runs) for item in self._open(self._tracker.collect())]

    def final(self) -> FinalDelta:
        """The pages of executable mappings come apart: CRIU writes a few bytes of code into a task
        while it dumps it (`compel/src/lib/infect.c`), so they must be read before CRIU starts. The
        others may be read while it works.
        """
        pages = self._open(self._tracker.collect(last=True))
        self._tracker.detach()
        first, rest = [], []
        for item in pages:
            maps = _maps(item.pid)
            self._watched[item.task] = private_anonymous(maps)
            code, other = split_runs(item.runs, executable_ranges(maps))
            if len(code):
                first.append((item.task, code))
            if len(other):
                rest.append((item.task, other))
        return FinalDelta(first, rest)

    def dumped(self, image_dir: Path) -> list[tuple[int, PageRuns]]:
        """Nothing: a lazy dump leaves out what was read here."""
        return []

    def watched(self, task: int, runs: PageRuns) -> tuple[PageRuns, PageRuns]:
        """By the mappings that trackers look at, as they were in the freeze: a file may be mapped
        where memory was."""
        return split_runs(runs, self._watched.get(task, ()))

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """Out of the task as it is now, which may be newer than what was reported."""
        return self._memories[task].read(runs, out)

    def delivered(self) -> None:
        """Nothing was kept here."""

    def close(self) -> None:
        """Give the tasks back untouched."""
        self._tracker.detach()
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()

    def _open(self, pages: Sequence[TaskPages]) -> list[TaskPages]:
        """Open what is new; without the tasks that have exited since they were scanned."""
        living = []
        for item in pages:
            if self._pids.get(item.task) != item.pid:
                stale = self._memories.pop(item.task, None)
                if stale is not None:
                    stale.close()
                try:
                    self._memories[item.task] = TaskMemory(item.pid)
                except TaskGoneError:
                    self._pids.pop(item.task, None)
                    continue
                self._pids[item.task] = item.pid
            living.append(item)
        return living


class FinalDelta:
    """What is sent while the container is frozen: `code` before CRIU starts, `rest` beside it."""

    def __init__(self, code: list[tuple[int, PageRuns]], rest: list[tuple[int, PageRuns]]) -> None:
        self.code = code
        self.rest = rest

    @property
    def size_bytes(self) -> int:
        """Bytes of memory in it."""
        return PAGE_BYTES * sum(int(runs[:, 1].sum()) for _, runs in self.code + self.rest)


def executable_ranges(maps: bytes) -> list[tuple[int, int]]:
    """The executable mappings in the text of a maps file, [start, end), in their order."""
    return [
        (mapping.start, mapping.end) for mapping in parse_maps(maps) if "x" in mapping.permissions
    ]


def _maps(pid: int) -> bytes:
    task = Task(pid)
    try:
        return task.read("maps")
    finally:
        task.close()


def split_runs(runs: PageRuns, ranges: Sequence[tuple[int, int]]) -> tuple[PageRuns, PageRuns]:
    """Split page runs into those inside and those outside of address ranges [start, end).

    Both are ascending; so are the results. It happens while the container stands still, so its cost
    is numpy's, whatever the number of runs.
    """
    if not len(runs) or not len(ranges):
        return runs[:0], runs
    edges = np.array(ranges, dtype=np.uint64).reshape(-1)
    starts, ends = runs[:, 0], runs[:, 0] + runs[:, 1] * np.uint64(PAGE_BYTES)
    # Cut every run at the edges that lie within it, then ask of each piece where it begins.
    first = np.searchsorted(edges, starts, side="right")
    last = np.searchsorted(edges, ends, side="left")
    cuts = [edges[low:high] for low, high in zip(first, last, strict=True) if low < high]
    begins = np.unique(np.concatenate([starts, *cuts]))
    run_of = np.searchsorted(starts, begins, side="right") - 1
    followers = np.append(begins[1:], ends[-1])
    stops = np.minimum(ends[run_of], followers)
    pieces = np.stack([begins, (stops - begins) // np.uint64(PAGE_BYTES)], axis=1)
    is_inside = np.searchsorted(edges, begins, side="right") % 2 == 1
    return pieces[is_inside], pieces[~is_inside]
