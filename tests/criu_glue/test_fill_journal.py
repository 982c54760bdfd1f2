"""The pager's journal: replaying it gives the maps that the worker had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_glue.core.fill_journal import UNIT, UNIT_BYTES, FillJournalError, Kind, encode, replay
from criu_glue.core.fill_map import PAGE_BYTES, FillMap
from criu_glue.pager_journal import Journal
from criu_glue.pager_state import PagerState


def initial(task: int) -> FillMap:
    """What is missing of a task: 40 pages, at a place that tells the task."""
    return FillMap.of(np.array([[task * 16 * PAGE_BYTES, 40]], dtype=np.uint64))


operations = st.lists(
    st.tuples(
        st.sampled_from(["open", "fork", "remove", "move", "close"]),
        st.integers(0, 7),
        st.integers(0, 90),
        st.integers(0, 90),
        st.integers(1, 30),
    ),
    max_size=40,
)


def message(kind: Kind, first: int = 0, second: int = 0, third: int = 0) -> bytes:
    """As the kernel writes it."""
    return UNIT.pack(kind, 0, first, second, third)


class Uffd:
    """What a journal reads from: a pipe with the messages of one read."""

    def __init__(self) -> None:
        self.ours, self._theirs = os.pipe2(os.O_NONBLOCK)

    def tell(self, *messages: bytes) -> None:
        os.write(self._theirs, b"".join(messages))

    def close(self) -> None:
        os.close(self.ours)
        os.close(self._theirs)


@pytest.fixture
def state(tmp_path: Path) -> PagerState:
    return PagerState.create(tmp_path)


@pytest.fixture
def uffd() -> Iterator[Uffd]:
    made = Uffd()
    yield made
    made.close()


@given(operations, st.booleans())
@settings(max_examples=150)
def test_a_replay_gives_what_the_worker_had(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int, int, int]],
    finished: bool,
) -> None:
    """Page faults come between and behind all messages, and are overwritten or not."""
    journal = Journal(PagerState.create(tmp_path_factory.mktemp("state")))
    uffd = Uffd()
    fault = message(Kind.PAGEFAULT, 1, 2)
    maps: dict[int, FillMap] = {}
    origins: dict[int, tuple[int, int, int]] = {}
    for what, which, page, to, pages in steps:
        if what == "open" or not maps:
            number = journal.opened(which + 1, 100 + which)
            maps[number] = initial(which + 1)
            origins[number] = (which + 1, number, 100 + which)
            continue
        number = sorted(maps)[which % len(maps)]
        start, end = page * PAGE_BYTES, (page + pages) * PAGE_BYTES
        uffd.tell(fault, fault)
        assert len(journal.read(number, uffd.ours)) == 2
        if what == "fork":
            uffd.tell(message(Kind.FORK, page), fault)
            assert [kind for kind, *_ in journal.read(number, uffd.ours)] == [0x13, 0x12]
            child = journal.next_number()
            maps[child] = maps[number].copy()
            origins[child] = (*origins[number][:2], page)
        elif what == "remove":
            uffd.tell(fault, message(Kind.REMOVE, start, end))
            journal.read(number, uffd.ours)
            maps[number].remove(start, end)
        elif what == "move" and abs(page - to) >= pages:
            moved = message(Kind.REMAP, start, to * PAGE_BYTES, end - start)
            uffd.tell(moved, message(Kind.UNMAP, start, end), fault)
            journal.read(number, uffd.ours)
            maps[number].move(start, to * PAGE_BYTES, end - start)
        elif what == "close":
            journal.closed(number)
            del maps[number]
    if finished:
        journal.finished()
    uffd.close()
    found = journal.resume(initial)
    assert found.finished == finished
    assert found.numbers == max(origins, default=0)
    assert {n: list(space.missing) for n, space in found.spaces.items()} == {
        n: list(missing) for n, missing in maps.items()
    }
    spaces = found.spaces.items()
    assert {n: (space.task, space.root, space.uffd) for n, space in spaces} == {
        n: origins[n] for n in maps
    }


def test_the_late_note_of_a_move_is_left_out_by_another_worker_too(
    state: PagerState, uffd: Uffd
) -> None:
    """Moved away, then something else moved there, and only then told to be unmapped."""
    journal = Journal(state)
    number = journal.opened(1, 7)
    first, other, away = (n * PAGE_BYTES for n in (16, 30, 200))
    size = 10 * PAGE_BYTES
    uffd.tell(message(Kind.REMAP, first, away, size))
    journal.read(number, uffd.ours)
    uffd.tell(message(Kind.REMAP, other, first, size))
    journal.read(number, uffd.ours)
    space = journal.resume(initial).spaces[number]
    before = list(space.missing)
    space.apply(Kind.UNMAP, first, first + size, 0)
    assert list(space.missing) == before
    space.apply(Kind.UNMAP, first, first + size, 0)
    assert list(space.missing) != before


def test_a_read_without_messages_leaves_nothing(state: PagerState, uffd: Uffd) -> None:
    journal = Journal(state)
    number = journal.opened(5, 9)
    assert journal.read(number, uffd.ours) == []
    journal.closed(number)
    assert journal.opened(6, 9) == 2
    assert set(journal.resume(initial).spaces) == {2}


def test_a_journal_without_room_is_not_gone_by(state: PagerState, uffd: Uffd) -> None:
    journal = Journal(state, bytes_max=128 * UNIT_BYTES)
    number = journal.opened(5, 9)
    uffd.tell(*[message(Kind.REMOVE, 0, PAGE_BYTES)] * 63)
    assert len(journal.read(number, uffd.ours)) == 63
    assert journal.is_complete
    uffd.tell(message(Kind.REMOVE, 0, PAGE_BYTES))
    assert journal.read(number, uffd.ours) == [(Kind.REMOVE, 0, PAGE_BYTES, 0)]
    assert not journal.is_complete
    with pytest.raises(FillJournalError, match="not complete"):
        Journal(state).resume(initial)


def test_half_a_unit_and_what_is_behind_the_end_mean_nothing() -> None:
    opened = encode(Kind.OPENED, 1, 5, 9)
    for behind in (b"half a unit"[:7], bytes(UNIT_BYTES) + encode(Kind.CLOSED, 1)):
        found = replay(opened + behind, initial)
        assert (set(found.spaces), found.end) == ({1}, UNIT_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        encode(Kind.READING, 1) + message(Kind.REMOVE, 0, PAGE_BYTES),
        encode(Kind.READING, 1) + message(Kind.FORK, 3),
        encode(Kind.OPENED, 1, 5) + encode(Kind.CLOSED, 1) + encode(Kind.CLOSED, 1),
        encode(Kind.OPENED, 2, 5),
        encode(Kind.OPENED, 1, 5) + encode(Kind.READING, 1) + b"\xff" * UNIT_BYTES,
    ],
)
def test_a_journal_that_contradicts_itself_is_refused(data: bytes) -> None:
    with pytest.raises(FillJournalError):
        replay(data, initial)
