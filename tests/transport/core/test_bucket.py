"""No more bytes leave than a rate lets, and no fewer than it would."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.core.bucket import BURST_S, Bucket

RATE = 1000.0
PIECES = st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=40)


@given(PIECES)
def test_in_no_time_more_leaves_than_the_rate_lets(pieces: list[tuple[int, float]]) -> None:
    """Each piece leaves as soon as it may, and then nobody asks for a while."""
    bucket, now_s, left = Bucket(), 0.0, []
    for count, idle_s in pieces:
        now_s += bucket.take(count, now_s, RATE)
        left.append((now_s, count))
        now_s += idle_s
    largest = max(count for _, count in left)
    for first, (begin_s, _) in enumerate(left):
        totals = accumulate(count for _, count in left[first:])
        for (end_s, _), total in zip(left[first:], totals, strict=True):
            assert total <= RATE * (end_s - begin_s + BURST_S) + largest + 1e-6


@given(PIECES, st.lists(st.floats(10, 1e6), min_size=40, max_size=40))
def test_each_piece_takes_as_long_as_the_rate_of_its_time_says(
    pieces: list[tuple[int, float]], rates: list[float]
) -> None:
    bucket, now_s, taken_s = Bucket(), 0.0, 0.0
    for (count, idle_s), rate in zip(pieces, rates, strict=False):
        now_s += bucket.take(count, now_s, rate)
        assert taken_s <= now_s + BURST_S + 1e-6
        taken_s += count / rate
        now_s += idle_s


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 4))
def test_who_always_has_more_gets_all_of_the_rate(counts: list[int], takers: int) -> None:
    """Several take in turns, each waits for its own: together they are not slower than the rate."""
    bucket, ready_s = Bucket(), [0.0] * takers
    for count in counts:
        taker = ready_s.index(min(ready_s))
        ready_s[taker] += bucket.take(count, ready_s[taker], RATE)
    assert max(ready_s) <= sum(counts) / RATE


def test_without_a_rate_nobody_waits() -> None:
    bucket = Bucket()
    assert [bucket.take(1 << 40, 0.0, float("inf")) for _ in range(3)] == [0.0] * 3
    with pytest.raises(ValueError, match="no rate"):
        bucket.take(1, 0.0, 0.0)
