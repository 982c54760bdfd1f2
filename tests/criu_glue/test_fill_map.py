"""FillMap against a dictionary of single pages."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from criu_glue.core.fill_map import PAGE_BYTES, FillMap, Run

PAGES = 96  # a small address space, so that things collide

pages = st.integers(0, PAGES - 1)
sizes = st.integers(1, 24)


class AgainstPages(RuleBasedStateMachine):
    """The model: page number -> page number of its content in the store."""

    def __init__(self) -> None:
        super().__init__()
        self.map = FillMap()
        self.model: dict[int, int] = {}

    @initialize(at=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), max_size=12))
    def begin(self, at: list[tuple[int, int]]) -> None:
        runs, page = [], 0
        for gap, count in at:
            page += gap
            runs.append((page * PAGE_BYTES, count))
            self.model |= {number: number for number in range(page, page + count)}
            page += count
        self.map = FillMap.of(np.array(runs, dtype=np.uint64).reshape(-1, 2))

    @rule(page=pages, count=sizes)
    def remove(self, page: int, count: int) -> None:
        self.map.remove(page * PAGE_BYTES, (page + count) * PAGE_BYTES)
        for number in range(page, page + count):
            self.model.pop(number, None)

    @rule(page=pages, to=pages, count=sizes)
    def move(self, page: int, to: int, count: int) -> None:
        """mremap refuses overlapping places, so they do not occur."""
        if abs(page - to) < count:
            return
        self.map.move(page * PAGE_BYTES, to * PAGE_BYTES, count * PAGE_BYTES)
        moved = {number: self.model.pop(number, None) for number in range(page, page + count)}
        for number, content in moved.items():
            self.model.pop(number - page + to, None)
            if content is not None:
                self.model[number - page + to] = content

    @rule(page=pages)
    def fill_forward(self, page: int) -> None:
        """As the background fill does: take from a place on, part of a run at a time."""
        found = self.map.first_from(page * PAGE_BYTES)
        assert (found is None) == (not self.model)
        if found is not None:
            above = [number for number in self.model if number >= page]
            assert found.start == min(above or self.model) * PAGE_BYTES
            self.remove(found.start // PAGE_BYTES, min(2, (found.end - found.start) // PAGE_BYTES))

    @rule()
    def fork(self) -> None:
        child = self.map.copy()
        self.map.remove(0, 8 * PAGES * PAGE_BYTES)
        assert not self.map
        self.map = child

    @rule(page=pages, count=sizes)
    def ask_for_stored(self, page: int, count: int) -> None:
        needed = any(page <= content < page + count for content in self.model.values())
        assert self.map.needs_stored(page * PAGE_BYTES, (page + count) * PAGE_BYTES) == needed

    @rule(page=pages)
    def ask_for_next(self, page: int) -> None:
        found = self.map.next_start(page * PAGE_BYTES)
        starts = [run.start for run in self.map if run.start > page * PAGE_BYTES]
        assert found == min(starts, default=None)

    @invariant()
    def same_pages(self) -> None:
        listed = {
            address // PAGE_BYTES: (address - run.shift) // PAGE_BYTES
            for run in self.map
            for address in range(run.start, run.end, PAGE_BYTES)
        }
        assert listed == self.model
        assert self.map.bytes == len(self.model) * PAGE_BYTES
        assert bool(self.map) == bool(self.model)
        for number in range(PAGES + 30):
            found = self.map.find(number * PAGE_BYTES)
            assert (found is not None) == (number in self.model)
            if found is not None:
                assert number * PAGE_BYTES - found.shift == self.model[number] * PAGE_BYTES


TestAgainstPages = AgainstPages.TestCase
TestAgainstPages.settings = settings(max_examples=150, stateful_step_count=30)


def test_many_emptied_runs_do_not_hide_the_others() -> None:
    count = 2000
    runs = np.column_stack(
        (np.arange(count, dtype=np.uint64) * 8192, np.ones(count, dtype=np.uint64))
    )
    fill = FillMap.of(runs)
    for index in range(count - 1):
        fill.remove(index * 8192, index * 8192 + 4096)
    assert list(fill) == [Run((count - 1) * 8192, (count - 1) * 8192 + 4096, 0)]
    assert fill.first_from(0) == fill.first_from(1 << 40) == next(iter(fill))
