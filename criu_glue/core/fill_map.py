"""What of a task's memory is still to be filled, and where its content is in the page store.

A set of runs: addresses [start, end) whose content is in the store at address - shift. At the
restore every shift is 0; mremap moves a run and gives it one; munmap and madvise(MADV_DONTNEED)
take runs out; a forked child starts with a copy. What is not in the map reads as zeros or is
there already.

Pure. Three parallel lists searched by bisection: a container has up to some 100,000 runs, nearly
always taken out front to back, and a page fault in the middle of one costs a memmove.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from criu_glue.core.pagemap import PageRuns

PAGE_BYTES: Final = 4096
# Emptied runs stay in the lists until they are this many, and half of all: deleting each at once
# would move the whole list every time.
_EMPTY_MAX: Final = 256
# Distances of mremap that needs_stored looks at, at a microsecond each.
_SHIFTS_MAX: Final = 64


class Run(NamedTuple):
    """Addresses [start, end); the content of `address` is in the store at `address - shift`."""

    start: int
    end: int
    shift: int


class FillMap:
    """The runs of one address space. All addresses and sizes are whole pages."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._shifts: list[int] = []
        self._empty = 0
        # How many runs have each shift; nearly always all have 0.
        self._shifted: dict[int, int] = {}
        self.bytes = 0

    @classmethod
    def of(cls, runs: PageRuns) -> FillMap:
        """From page runs (columns [address, pages], sorted, disjoint)."""
        new = cls()
        new._starts = runs[:, 0].tolist()
        pages: list[int] = runs[:, 1].tolist()
        new._ends = [
            start + count * PAGE_BYTES for start, count in zip(new._starts, pages, strict=True)
        ]
        new._shifts = [0] * len(pages)
        new._shifted = {0: len(pages)}
        new.bytes = sum(pages) * PAGE_BYTES
        return new

    def copy(self) -> FillMap:
        """What a forked child begins with."""
        self._compact()
        new = FillMap()
        new._starts, new._ends = self._starts.copy(), self._ends.copy()
        new._shifts, new._shifted = self._shifts.copy(), self._shifted.copy()
        new.bytes = self.bytes
        return new

    def __iter__(self) -> Iterator[Run]:
        for start, end, shift in zip(self._starts, self._ends, self._shifts, strict=True):
            if start < end:
                yield Run(start, end, shift)

    def __bool__(self) -> bool:
        return self.bytes > 0

    def find(self, address: int) -> Run | None:
        """The run that holds `address`."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or self._ends[index] <= address:
            return None
        return Run(self._starts[index], self._ends[index], self._shifts[index])

    def first_from(self, address: int) -> Run | None:
        """The part at or above `address` of the first run that has one; after the last run, the
        first of all. None when nothing is left."""
        if not self.bytes:
            return None
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and self._ends[index] > address:
            return Run(address, self._ends[index], self._shifts[index])
        for places in (range(index + 1, len(self._starts)), range(index + 1)):
            for at in places:
                if self._starts[at] < self._ends[at]:
                    return Run(self._starts[at], self._ends[at], self._shifts[at])
        return None

    def next_start(self, address: int) -> int | None:
        """Where the first run that begins above `address` begins."""
        for index in range(bisect_right(self._starts, address), len(self._starts)):
            if self._starts[index] < self._ends[index]:
                return self._starts[index]
        return None

    def remove(self, start: int, end: int) -> None:
        """Take out [start, end): it is filled, gone, or reads as zeros from now on."""
        index = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        # At most the first run keeps a head and the last one a tail: the indexes between hold.
        while index < last:
            run_start, run_end = self._starts[index], self._ends[index]
            low, high = max(run_start, start), min(run_end, end)
            if low < high:
                self.bytes -= high - low
                self._cut(index, low, high)
            index += 1
        if self._empty > _EMPTY_MAX and self._empty * 2 > len(self._starts):
            self._compact()

    def _cut(self, index: int, low: int, high: int) -> None:
        """Take [low, high), which is inside run `index`, out of it."""
        start, end = self._starts[index], self._ends[index]
        if low > start:
            self._ends[index] = low
            if high < end:
                self._insert(index + 1, Run(high, end, self._shifts[index]))
        elif high < end:
            self._starts[index] = high
        else:
            self._ends[index] = start
            self._empty += 1
            shift = self._shifts[index]
            self._shifted[shift] -= 1
            if not self._shifted[shift]:
                del self._shifted[shift]

    def _insert(self, index: int, run: Run) -> None:
        self._starts.insert(index, run.start)
        self._ends.insert(index, run.end)
        self._shifts.insert(index, run.shift)
        self._shifted[run.shift] = self._shifted.get(run.shift, 0) + 1

    def move(self, start: int, to: int, bytes_: int) -> None:
        """mremap(2): [start, start + bytes_) is now at `to`, in place of whatever was there."""
        end, by = start + bytes_, to - start
        moving = [
            Run(max(run.start, start) + by, min(run.end, end) + by, run.shift + by)
            for run in self.overlapping(start, end)
        ]
        self.remove(start, end)
        self.remove(to, to + bytes_)
        # Bisection would stumble over an emptied run inside of one that is put there.
        self._compact()
        for run in moving:
            self._insert(bisect_left(self._starts, run.start), run)
            self.bytes += run.end - run.start

    def overlapping(self, start: int, end: int) -> list[Run]:
        """Runs that have a page in [start, end), whole."""
        found = []
        first = max(bisect_right(self._starts, start) - 1, 0)
        for index in range(first, bisect_left(self._starts, end)):
            run = Run(self._starts[index], self._ends[index], self._shifts[index])
            if max(run.start, start) < min(run.end, end):
                found.append(run)
        return found

    def needs_stored(self, start: int, end: int) -> bool:
        """Whether content of [start, end) of the *store* may still have to be filled from.

        True means maybe, once so much was moved here and there that looking would take long.
        """
        if len(self._shifted) > _SHIFTS_MAX:
            return True
        return any(
            run.shift == shift
            for shift in self._shifted
            for run in self.overlapping(start + shift, end + shift)
        )

    def _compact(self) -> None:
        if self._empty:
            runs = list(self)
            self._starts = [run.start for run in runs]
            self._ends = [run.end for run in runs]
            self._shifts = [run.shift for run in runs]
            self._empty = 0
