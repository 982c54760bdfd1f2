"""The container's memory on its way: a dirty tracker, the tasks' memory and the sender, joined.

Blocking; the coordinator runs each call in its own executor thread. Knows neither CRIU's dump nor
the handover: it is told when the tasks are frozen.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from criu_glue.errors import TaskGoneError
from criu_glue.mappings import Task, parse_maps
from criu_glue.memory import TaskMemory
from migrate.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from criu_glue.trackers.base import DirtyTracker, TaskPages
    from transport.sender import PageSender, RoundStats

    Runs = npt.NDArray[np.uint64]

PAGE_BYTES = 4096


class MemorySource:
    """Rounds of one container's memory.

    `make_sender` is given the function that reads pages of a task and returns the sender; the
    sender's threads call that function concurrently. While the tracker is at work in running tasks
    they are `undisturbed` by whatever slows them.
    """

    def __init__(
        self,
        tracker: DirtyTracker,
        make_sender: Callable[
            [Callable[[int, Runs, memoryview], npt.NDArray[np.bool_]]], PageSender
        ],
        undisturbed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.tracker = tracker
        self._undisturbed = undisturbed
        self._memories: dict[int, TaskMemory] = {}
        self._pids: dict[int, int] = {}
        self.sender = make_sender(self._read)
        self.round_bytes_total = 0
        self.rounds = 0
        # A collection that nobody waits for any more must be over before the tasks are given back.
        self._tracking = threading.Lock()
        self._is_closed = False

    def round(self) -> RoundStats:
        """Send what was written since the last round (the first time: everything)."""
        return self.send(self._collect())

    def final_delta(self) -> FinalDelta:
        """Collect the final delta of a frozen container and give its tasks back to CRIU.

        The pages of executable mappings come apart: CRIU writes a few bytes of code into a task
        while it dumps it (`compel/src/lib/infect.c`), so they must be read before CRIU starts. The
        others may be read while it works.
        """
        with self._tracking:
            self._check_open()
            pages = self._open_memories(self.tracker.collect(last=True))
            self.tracker.detach()
        first, rest = [], []
        for item in pages:
            code, other = split_runs(item.runs, executable_ranges(item.pid))
            if len(code):
                first.append((item.task, code))
            if len(other):
                rest.append((item.task, other))
        return FinalDelta(first, rest)

    def send(self, runs: Sequence[tuple[int, Runs]]) -> RoundStats:
        """Send these pages of tasks that are known already."""
        self.rounds += 1
        self.round_bytes_total = PAGE_BYTES * sum(int(r[:, 1].sum()) for _, r in runs)
        return self.sender.send_round(self.rounds, runs)

    def undelivered(self, needed: Mapping[int, Runs]) -> list[tuple[int, Runs]]:
        """Of the pages that the final images name, those that the target never got.

        Every page should have been seen by the tracker; this is the check that none was missed.
        """
        missing = []
        for task, runs in needed.items():
            left = self.sender.never_delivered(task, runs)
            if len(left):
                missing.append((task, left))
        return missing

    def close(self) -> None:
        """Give the tasks back untouched and end the streams. Idempotent."""
        self.sender.close()
        with self._tracking:
            self._is_closed = True
            self.tracker.detach()
            for memory in self._memories.values():
                memory.close()
            self._memories.clear()

    def _collect(self) -> list[tuple[int, Runs]]:
        with self._tracking:
            self._check_open()
            with self._undisturbed():
                pages = self.tracker.collect()
            living = self._open_memories(pages)
        return [(item.task, item.runs) for item in living]

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferFailed("the transfer was aborted")

    def _open_memories(self, pages: Sequence[TaskPages]) -> list[TaskPages]:
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

    def _read(self, task: int, runs: Runs, out: memoryview) -> npt.NDArray[np.bool_]:
        return self._memories[task].read(runs, out)


class FinalDelta:
    """What is sent while the container is frozen: `code` before CRIU starts, `rest` beside it."""

    def __init__(self, code: list[tuple[int, Runs]], rest: list[tuple[int, Runs]]) -> None:
        self.code = code
        self.rest = rest

    @property
    def size_bytes(self) -> int:
        """Bytes of memory in it."""
        return PAGE_BYTES * sum(int(runs[:, 1].sum()) for _, runs in self.code + self.rest)


def executable_ranges(pid: int) -> list[tuple[int, int]]:
    """The executable mappings of a task, [start, end), in their order."""
    task = Task(pid)
    try:
        return [
            (mapping.start, mapping.end)
            for mapping in parse_maps(task.read("maps"))
            if "x" in mapping.permissions
        ]
    finally:
        task.close()


def split_runs(runs: Runs, ranges: Sequence[tuple[int, int]]) -> tuple[Runs, Runs]:
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
