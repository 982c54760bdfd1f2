"""The pager's journal: replaying it gives the maps that the worker had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_glue.core.fill_journal import RECORD_BYTES, FillJournalError, Kind, encode, replay
from criu_glue.core.fill_map import PAGE_BYTES, FillMap
from criu_glue.pager_journal import Journal


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


@given(operations, st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_replay_gives_what_the_worker_had(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int, int, int]],
    finished: bool,
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal(path)
    maps: dict[int, FillMap] = {}
    origins: dict[int, tuple[int, int]] = {}
    for what, which, page, to, pages in steps:
        if what == "open" or not maps:
            number = journal.opened(which + 1)
            maps[number], origins[number] = initial(which + 1), (which + 1, number)
            continue
        number = sorted(maps)[which % len(maps)]
        start, end = page * PAGE_BYTES, (page + pages) * PAGE_BYTES
        if what == "fork":
            child = journal.forked(number)
            maps[child], origins[child] = maps[number].copy(), origins[number]
        elif what == "remove":
            journal.removed(number, start, end)
            maps[number].remove(start, end)
        elif what == "move" and abs(page - to) >= pages:
            journal.moved(number, start, to * PAGE_BYTES, end - start)
            maps[number].move(start, to * PAGE_BYTES, end - start)
        elif what == "close":
            journal.closed(number)
            del maps[number]
    if finished:
        journal.finished()
    found = replay(path.read_bytes() + b"half a record"[:7], initial)
    assert found.finished == finished
    assert found.number_max == max(origins, default=0)
    assert {n: list(space.missing) for n, space in found.spaces.items()} == {
        n: list(missing) for n, missing in maps.items()
    }
    assert {n: (space.task, space.root) for n, space in found.spaces.items()} == {
        n: origins[n] for n in maps
    }


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    assert first.opened(5) == 1
    second = Journal(tmp_path / "journal", number_max=1)
    assert second.forked(1) == 2
    assert set(replay((tmp_path / "journal").read_bytes(), initial).spaces) == {1, 2}


@pytest.mark.parametrize(
    "data",
    [
        encode(Kind.REMOVED, 1, 0, PAGE_BYTES),
        encode(Kind.FORKED, 2, 1),
        encode(Kind.OPENED, 1, 5) + encode(Kind.CLOSED, 1) + encode(Kind.CLOSED, 1),
        bytes(RECORD_BYTES),
        b"\xff" * RECORD_BYTES,
    ],
)
def test_a_journal_that_contradicts_itself_is_refused(data: bytes) -> None:
    with pytest.raises(FillJournalError):
        replay(data, initial)
