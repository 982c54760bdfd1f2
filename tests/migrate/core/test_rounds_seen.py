"""What the rounds tell of the way and of the container's writes."""

from __future__ import annotations

import pytest

from migrate.core.prediction import GIB
from migrate.core.rounds_seen import PAGE_BYTES, RATE_BYTES_MS, History
from tests.migrate.core.rounds import MIB, Round, history, pages


def test_the_rate_is_that_of_the_last_round_that_was_large_enough() -> None:
    assert History().rate_bytes_ms == RATE_BYTES_MS
    assert history((1024, 1024)).rate_bytes_ms == pytest.approx(MIB)
    assert history((1024, 1024), (512, 256)).rate_bytes_ms == pytest.approx(2 * MIB)
    assert history((1024, 1024), (1, 100)).rate_bytes_ms == pytest.approx(MIB)
    assert history((2, 1), (1, 10)).rate_bytes_ms == pytest.approx(2 * MIB)


def test_small_rounds_count_together_where_they_are_faster() -> None:
    assert history((1024, 1024), (2, 1), (1, 2)).rate_bytes_ms == pytest.approx(MIB)
    assert history((1024, 1024), (2, 1), (1, 0.5)).rate_bytes_ms == pytest.approx(2 * MIB)
    # Only the last ones, and none that the large one came after.
    past = history((1024, 1024), (9, 1), (2, 1), (2, 1), (2, 1))
    assert past.rate_bytes_ms == pytest.approx(2 * MIB)
    assert history((9, 1), (1024, 1024), (1, 2)).rate_bytes_ms == pytest.approx(MIB)
    # What a shaped link lets through at once says nothing.
    assert history((1024, 1024), (0.2, 0.01), (0.2, 0.01)).rate_bytes_ms == pytest.approx(MIB)


def test_zero_pages_do_not_make_the_way_look_faster() -> None:
    past = History([Round(pages(64 * MIB), 64, zero_pages=pages(GIB))])
    assert past.rate_bytes_ms == pytest.approx(MIB)
    assert History([Round(0, 5, zero_pages=100)]).rate_bytes_ms == RATE_BYTES_MS


def test_what_small_rounds_cost_is_learnt() -> None:
    assert history((1024, 1024), (1, 6)).overhead_ms == pytest.approx(0)
    assert history((1024, 1030), (1, 7), (1, 9)).overhead_ms == pytest.approx(0)
    assert history((15, 20), (1, 6), (1, 6)).overhead_ms == pytest.approx(5.07, abs=0.01)


def test_of_small_rounds_the_smallest_tell_what_is_not_carrying() -> None:
    """An nginx of 3 MiB on a slow way: 580 pages in 460 ms, and then 27 in 230."""
    past = History([Round(580, 460), Round(27, 230), Round(16, 240)])
    assert past.rate_bytes_ms == pytest.approx(580 * PAGE_BYTES / 230)
    # Never less than half of its time, and nothing where all are of a size.
    assert History([Round(580, 460), Round(27, 400)]).rate_bytes_ms == past.rate_bytes_ms
    # What is over at once is no sign of a slow way.
    assert History([Round(580, 90), Round(27, 40)]).rate_bytes_ms == RATE_BYTES_MS
    assert history((15, 20), (14, 10)).rate_bytes_ms == pytest.approx(0.75 * MIB)


def test_before_any_round_everything_is_left() -> None:
    assert History().dirtied_bytes(5, GIB) == GIB


def test_after_one_round_everything_may_have_been_written_again() -> None:
    assert history((1024, 1000)).dirtied_bytes(1000, GIB) == GIB


def test_a_single_observation_errs_to_too_much() -> None:
    past = history((1024, 1000), (100, 100))
    assert past.dirtied_bytes(500, GIB) == 100 * MIB
    assert past.dirtied_bytes(2000, GIB) == 200 * MIB


def test_a_writer_that_goes_everywhere_writes_less_in_less_time() -> None:
    past = history((1024, 1000), (100, 100), (10, 10))
    assert past.dirtied_bytes(50, GIB) == pytest.approx(5 * MIB, rel=0.01)


def test_a_hot_set_is_as_large_in_less_time() -> None:
    past = history((1024, 1000), (10, 10), (10, 10))
    assert past.dirtied_bytes(1, GIB) == pytest.approx(10 * MIB, rel=0.01)
    assert past.dirtied_bytes(10, GIB) == pytest.approx(10 * MIB, rel=0.01)


def test_no_more_is_written_than_there_is() -> None:
    past = history((1024, 1000), (900, 900))
    assert past.dirtied_bytes(1e6, GIB) == GIB


def test_the_dirty_rate_is_over_the_round_before() -> None:
    assert history((1024, 1000)).dirty_rate_bytes_ms == 0
    assert history((1024, 1000), (100, 7)).dirty_rate_bytes_ms == pytest.approx(100 * MIB / 1000)
    unchanged = History([Round(pages(GIB), 1000), Round(0, 5, unchanged_pages=256)])
    assert unchanged.dirty_rate_bytes_ms == pytest.approx(MIB / 1000)


def test_what_passed_before_a_round_counts_for_what_was_written() -> None:
    """As while both sides make ready: 400 ms and the round before, 100 ms, gave 50 MiB."""
    past = history((1024, 1000), (10, 100))
    past.add(Round(pages(50 * MIB), 50), wait_ms=400)
    assert past.dirty_rate_bytes_ms == pytest.approx(50 * MIB / 500)
    # Of the two writers that it may be, 10 MiB in a second and 50 in half of one is the first.
    assert past.dirtied_bytes(50, GIB) == 50 * MIB
    past.add(Round(pages(6 * MIB), 6))
    assert past.dirtied_bytes(6, GIB) == pytest.approx(6 * MIB * (6 / 50) ** 0.92, rel=0.01)
    assert past.before().dirty_rate_bytes_ms == pytest.approx(50 * MIB / 500)
    assert past.before().before().waits_ms == [0.0, 0.0]
