"""The account of what the target holds, against a model that keeps whole contents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.core.batches import page_addresses
from transport.core.dedup import CHUNK_PAGES, UNCHANGED, PageHashes
from transport.core.frames import PAGE_BYTES
from transport.core.tables import RunKind
from transport.errors import TableFullError

SEED = 0x1234567890ABCDEF
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
ZERO_PAGE = bytes(PAGE_BYTES)


def content(number: int) -> bytes:
    """Page content: number 0 is the zero page."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


def addresses_of(*pages: int) -> np.ndarray:
    return np.array(pages, dtype=np.uint64) * np.uint64(PAGE_BYTES)


def digests_of(hashes: PageHashes, numbers: list[int]) -> np.ndarray:
    return hashes.digest([memoryview(content(number)) for number in numbers], len(numbers))


def offer(hashes: PageHashes, task: int, pages: list[int], numbers: list[int]) -> list[int]:
    kinds, _ = hashes.offer(task, addresses_of(*pages), digests_of(hashes, numbers))
    return kinds.tolist()


def deliver(hashes: PageHashes, task: int, pages: list[int], numbers: list[int]) -> list[int]:
    """Offer and commit, as when the frame was acknowledged."""
    digests = digests_of(hashes, numbers)
    kinds, places = hashes.offer(task, addresses_of(*pages), digests)
    travelling = kinds != UNCHANGED
    hashes.commit(places[travelling], digests[travelling])
    return kinds.tolist()


def missing(hashes: PageHashes, task: int, first: int, pages: int) -> list[int]:
    runs = np.array([[first * PAGE_BYTES, pages]], dtype=np.uint64)
    left = hashes.never_delivered(task, runs)
    return (page_addresses(left) // np.uint64(PAGE_BYTES)).tolist() if len(left) else []


def test_a_page_travels_once_and_again_when_it_changed() -> None:
    hashes = PageHashes(SEED)
    assert deliver(hashes, 1, [5, 6, 700], [1, 2, 3]) == [RunKind.DATA] * 3
    assert deliver(hashes, 1, [5, 6, 700], [1, 2, 3]) == [UNCHANGED] * 3
    assert deliver(hashes, 1, [5, 6, 700], [1, 9, 3]) == [UNCHANGED, RunKind.DATA, UNCHANGED]


def test_tasks_have_nothing_in_common() -> None:
    hashes = PageHashes(SEED)
    deliver(hashes, 1, [5], [1])
    assert deliver(hashes, 2, [5], [1]) == [RunKind.DATA]


def test_zero_pages_are_known_and_remembered() -> None:
    hashes = PageHashes(SEED)
    assert deliver(hashes, 1, [5, 6], [0, 1]) == [RunKind.ZERO, RunKind.DATA]
    assert deliver(hashes, 1, [5, 6], [0, 0]) == [UNCHANGED, RunKind.ZERO]


def test_a_page_in_doubt_is_never_taken_for_unchanged() -> None:
    """Sent, perhaps applied, never acknowledged: then even the old content must travel again."""
    hashes = PageHashes(SEED)
    deliver(hashes, 1, [5], [1])
    assert offer(hashes, 1, [5], [2]) == [RunKind.DATA]
    assert offer(hashes, 1, [5], [2]) == [RunKind.DATA]
    assert deliver(hashes, 1, [5], [1]) == [RunKind.DATA]


def test_only_acknowledged_pages_count_as_delivered() -> None:
    hashes = PageHashes(SEED)
    offer(hashes, 1, [5, 6], [1, 2])
    assert missing(hashes, 1, 4, 4) == [4, 5, 6, 7]
    deliver(hashes, 1, [6], [2])
    assert missing(hashes, 1, 4, 4) == [4, 5, 7]


def test_a_delivered_page_stays_delivered_while_it_is_in_doubt() -> None:
    hashes = PageHashes(SEED)
    deliver(hashes, 1, [5], [1])
    offer(hashes, 1, [5], [2])
    assert missing(hashes, 1, 5, 1) == []


def test_never_delivered_over_full_partial_and_unknown_chunks() -> None:
    hashes = PageHashes(SEED)
    first = [*range(CHUNK_PAGES)]
    deliver(hashes, 1, first, [1] * CHUNK_PAGES)
    deliver(hashes, 1, [CHUNK_PAGES + 3], [1])
    runs = np.array([[0, CHUNK_PAGES + 5], [2 * CHUNK_BYTES, 2]], dtype=np.uint64)
    left = hashes.never_delivered(1, runs)
    expected = [CHUNK_PAGES + at for at in (0, 1, 2, 4)] + [2 * CHUNK_PAGES, 2 * CHUNK_PAGES + 1]
    assert (page_addresses(left) // np.uint64(PAGE_BYTES)).tolist() == expected
    assert hashes.never_delivered(1, np.empty((0, 2), dtype=np.uint64)).shape == (0, 2)
    assert missing(hashes, 99, 0, 3) == [0, 1, 2]


def test_beyond_the_digests_pages_always_travel_but_stay_delivered() -> None:
    hashes = PageHashes(SEED, table_bytes=CHUNK_PAGES * 8)  # one chunk
    inside, outside = 3, 5 * CHUNK_PAGES
    deliver(hashes, 1, [inside, outside], [1, 2])
    assert deliver(hashes, 1, [inside, outside], [1, 2]) == [UNCHANGED, RunKind.DATA]
    assert missing(hashes, 1, outside, 2) == [outside + 1]


def test_without_any_digests_everything_travels() -> None:
    hashes = PageHashes(SEED, table_bytes=0)
    deliver(hashes, 1, [1, 2], [1, 0])
    assert deliver(hashes, 1, [1, 2], [1, 0]) == [RunKind.DATA, RunKind.ZERO]


def test_forgetting_a_task_frees_its_chunks_clean() -> None:
    hashes = PageHashes(SEED, slots_max=1)
    deliver(hashes, 1, [5], [1])
    with pytest.raises(TableFullError):
        offer(hashes, 2, [5], [1])
    hashes.forget(1)
    assert missing(hashes, 1, 5, 1) == [5]
    assert offer(hashes, 2, [5], [1]) == [RunKind.DATA]  # in the slot that task 1 had
    assert missing(hashes, 2, 5, 1) == [5]
    hashes.forget(99)


def test_the_bits_grow_and_keep_what_they_hold() -> None:
    hashes = PageHashes(SEED, table_bytes=0)
    chunks = 1000
    for chunk in range(0, chunks, 100):
        pages = [each * CHUNK_PAGES for each in range(chunk, chunk + 100)]
        deliver(hashes, 1, pages, [7] * 100)
    assert missing(hashes, 1, 0, 1) == []
    left = missing(hashes, 1, 0, chunks * CHUNK_PAGES)
    assert len(left) == chunks * (CHUNK_PAGES - 1)


def test_digests_depend_on_the_seed() -> None:
    assert digests_of(PageHashes(1), [5])[0] != digests_of(PageHashes(2), [5])[0]


@settings(max_examples=60)  # other work on the machine is no failure
@given(
    st.lists(
        st.tuples(
            st.dictionaries(  # page -> content
                st.one_of(st.integers(0, 6), st.integers(510, 516), st.integers(10**6, 10**6 + 3)),
                st.integers(0, 3),
                min_size=1,
            ),
            st.booleans(),  # acknowledged
        ),
        max_size=12,
    ),
    st.sampled_from([0, CHUNK_PAGES * 8, 1 << 20]),
)
def test_against_a_model(rounds: list[tuple[dict[int, int], bool]], table_bytes: int) -> None:
    """The model applies what travels, at the latest possible moment and at the earliest."""
    hashes = PageHashes(SEED, table_bytes=table_bytes)
    possible: dict[int, set[int]] = {}  # contents that the target may hold
    delivered: set[int] = set()
    for contents, acknowledged in rounds:
        pages = sorted(contents)
        numbers = [contents[page] for page in pages]
        kinds = (deliver if acknowledged else offer)(hashes, 1, pages, numbers)
        for page, number, kind in zip(pages, numbers, kinds, strict=True):
            if kind == UNCHANGED:
                assert possible[page] == {number}, "a page did not travel though it had to"
            elif acknowledged:
                assert kind == (RunKind.ZERO if number == 0 else RunKind.DATA)
                possible[page] = {number}
                delivered.add(page)
            else:
                possible.setdefault(page, set()).add(number)
        for page in possible:
            assert missing(hashes, 1, page, 1) == ([] if page in delivered else [page])
