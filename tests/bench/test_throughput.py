"""What a move did to the throughput is read from the answers in each bin."""

from __future__ import annotations

import pytest

from bench.compare.throughput import Around, around


def test_before_during_and_after() -> None:
    answers = [100] * 10 + [80] * 20 + [0] * 18 + [20] * 10 + [95] * 30
    assert around(answers, 10, 100.0) == Around(10_000.0, 8_000.0, 180.0, 100.0)


def test_a_short_silence_before_is_not_the_standstill() -> None:
    answers = [0, 0, 0, 100, 100] + [50, 0, 50, 50] + [0, 0] + [100] * 10
    found = around(answers, 10, 50.0)
    assert (found.gap_ms, found.recovered_ms) == (20.0, 0.0)
    assert found.during_per_s == 3_750.0


def test_a_throughput_that_does_not_come_back() -> None:
    assert around([100] * 5 + [100, 0] + [50] * 20, 10, 50.0).recovered_ms is None


@pytest.mark.parametrize(("answers", "begun_ms"), [([], 0.0), ([100, 0, 0], 10.0), ([0, 5], 0.0)])
def test_nothing_to_compare_with(answers: list[int], begun_ms: float) -> None:
    with pytest.raises(ValueError, match="no answers"):
        around(answers, 10, begun_ms)
