"""Waits in buckets: each has one place, and a percentile is the truth and a quarter at most."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from criu_glue.core.latency import BUCKETS, bucket_of, percentile_us

LONGEST_US = (1 << 24) - 1


def test_buckets_follow_each_other() -> None:
    places = [bucket_of(us) for us in range(5000)]
    assert places[:14] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 10, 10]
    assert sorted(set(places)) == list(range(places[-1] + 1))
    assert places == sorted(places)
    assert bucket_of(LONGEST_US) == bucket_of(1 << 60) == BUCKETS - 1


@given(st.lists(st.integers(0, LONGEST_US), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_a_percentile_is_the_nearest_rank_rounded_up(waits: list[int], share: float) -> None:
    counts = [0] * BUCKETS
    for us in waits:
        counts[bucket_of(us)] += 1
    exact = sorted(waits)[math.ceil(len(waits) * share) - 1]
    assert exact <= percentile_us(counts, share) <= exact * 1.25


def test_of_none_there_is_no_percentile() -> None:
    assert percentile_us([0] * BUCKETS, 0.99) == 0
