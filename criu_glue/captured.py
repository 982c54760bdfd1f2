"""Pages of frozen tasks, copied so that they can be sent when the tasks run again.

Copying memory is ten times as fast as sending it, so the tasks stand still for that much less. The
copy is in this process's own memory; whoever captures says how much that may be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from criu_glue.errors import LimitExceededError
from criu_glue.kernel import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns

# A call of `read` takes 1 GiB at most (`memory.py`), and a run may be longer.
_PART_PAGES: Final = (1 << 26) // PAGE_BYTES


class _Reader(Protocol):
    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """As `TaskMemory.read`."""


class _Pages(NamedTuple):
    """Of one task: addresses, ascending, shape (n,); content, (n, PAGE_BYTES); which were there."""

    addresses: npt.NDArray[np.uint64]
    content: npt.NDArray[np.uint8]
    present: npt.NDArray[np.bool_]


class CapturedPages:
    """See the module. `runs` is what was captured: [(task, page runs)], each task once."""

    def __init__(self, runs: Sequence[tuple[int, PageRuns]]) -> None:
        self.runs = list(runs)
        self._tasks: dict[int, _Pages] = {}

    @classmethod
    def of(
        cls, reader: _Reader, runs: Sequence[tuple[int, PageRuns]], limit_bytes: int
    ) -> CapturedPages:
        """Copy these pages. Raises LimitExceededError before anything is copied."""
        self = cls(runs)
        if self.size_bytes > limit_bytes:
            raise LimitExceededError(
                f"{self.size_bytes >> 20} MiB of memory are to be kept here while they are sent,"
                f" and there is room for {limit_bytes >> 20}"
            )
        for task, of_task in runs:
            self._tasks[task] = _read(reader, task, of_task)
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of memory in it."""
        return PAGE_BYTES * sum(int(runs[:, 1].sum()) for _, runs in self.runs)

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """As `TaskMemory.read`, of pages that were captured; others count as not there."""
        captured = self._tasks[task]
        wanted = page_addresses(runs)
        at = np.searchsorted(captured.addresses, wanted).clip(max=len(captured.addresses) - 1)
        buffer = np.frombuffer(out, dtype=np.uint8)[: len(wanted) * PAGE_BYTES]
        np.take(captured.content, at, axis=0, out=buffer.reshape(-1, PAGE_BYTES), mode="clip")
        found: npt.NDArray[np.bool_] = captured.present[at] & (captured.addresses[at] == wanted)
        return found


def _read(reader: _Reader, task: int, runs: PageRuns) -> _Pages:
    addresses = page_addresses(runs)
    content = np.empty((len(addresses), PAGE_BYTES), dtype=np.uint8)
    present = np.zeros(len(addresses), dtype=np.bool_)
    for begin in range(0, len(addresses), _PART_PAGES):
        part = slice(begin, begin + _PART_PAGES)
        out = content[part].reshape(-1).data
        present[part] = reader.read(task, page_runs(addresses[part]), out)
    return _Pages(addresses, content, present)


def page_addresses(runs: PageRuns) -> npt.NDArray[np.uint64]:
    """Of every page of the runs."""
    counts = runs[:, 1].astype(np.int64)
    firsts = np.repeat(runs[:, 0], counts)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return firsts + within.astype(np.uint64) * np.uint64(PAGE_BYTES)


def page_runs(addresses: npt.NDArray[np.uint64]) -> PageRuns:
    """The shortest runs that are these pages."""
    begins = np.flatnonzero(np.diff(addresses, prepend=np.uint64(0)) != PAGE_BYTES)
    if len(addresses) and (not len(begins) or begins[0] != 0):
        begins = np.insert(begins, 0, 0)
    counts = np.diff(np.append(begins, len(addresses)))
    return np.stack([addresses[begins], counts.astype(np.uint64)], axis=1)
