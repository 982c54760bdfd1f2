"""What counts as growth over a soak."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from bench.soak_samples import Sample
from bench.soak_trend import COUNT, LIMITS, MEMORY_KIB, slope_of, trend

MOVES = range(0, 200, 2)


def test_the_slope_is_that_of_most_pairs() -> None:
    line = [(at, 3.0 * at + 7) for at in range(50)]
    assert slope_of(line) == pytest.approx(3.0)
    for odd in (3, 20, 41):
        line[odd] = (odd, 1e6)
    assert slope_of(line) == pytest.approx(3.0)
    assert slope_of([(1, 5.0)]) == 0.0


@pytest.mark.parametrize("name", LIMITS)
def test_what_stays_or_falls_has_not_grown(name: str) -> None:
    assert not trend("A", name, [(at, 100.0) for at in MOVES]).has_grown
    assert not trend("A", name, [(at, 1e6 - 100 * at) for at in MOVES]).has_grown


@pytest.mark.parametrize("name", LIMITS)
def test_a_slope_above_the_limit_is_growth(name: str) -> None:
    per_100 = LIMITS[name].per_100
    above = trend("A", name, [(at, at * per_100 * 1.5 / 100) for at in MOVES])
    below = trend("A", name, [(at, at * per_100 * 0.9 / 100) for at in MOVES])
    assert (above.has_grown, below.has_grown) == (True, False)
    assert above.per_100 == pytest.approx(1.5 * per_100)


def test_one_more_descriptor_in_every_hundred_moves_is_growth() -> None:
    assert trend("A", "agent_descriptors", [(at, 11 + at // 100) for at in range(400)]).has_grown
    assert COUNT.per_100 < 1


def test_noise_around_a_level_is_none() -> None:
    noise = random.Random(1)
    series = [(at, 80_000 + noise.uniform(-2000, 2000)) for at in MOVES]
    assert not trend("A", "agent_rss_kib", series).has_grown


def test_what_fills_up_at_the_begin_has_not_grown() -> None:
    series = [(at, 60_000 + 1000 * min(at, 40)) for at in MOVES]
    found = trend("A", "agent_uss_kib", series)
    assert (found.first, found.last, found.has_grown) == (60_000, 100_000, False)


def test_memory_that_fills_its_caches_has_not_grown() -> None:
    """As seen: three MiB in 128 moves, and none after."""
    series = [(at, 57_000 + 24 * min(at, 128)) for at in MOVES]
    assert not trend("A", "agent_uss_kib", series).has_grown
    assert not trend("A", "agent_uss_kib", series[:40]).has_grown
    leak = [(at, 57_000 + 24 * at) for at in MOVES]
    assert trend("A", "agent_uss_kib", leak).has_grown
    assert trend("A", "agent_uss_kib", [(at, 57_000 + 60 * at) for at in MOVES][:40]).has_grown


def test_a_short_run_is_not_judged_by_a_step_of_noise() -> None:
    """Half a MiB over ten moves would be 5 MiB in a hundred."""
    series = [(at, 80_000 + 50 * at) for at in range(0, 11, 2)]
    found = trend("A", "agent_rss_kib", series)
    assert found.per_100 > MEMORY_KIB.per_100
    assert not found.has_grown
    assert not trend("A", "agent_threads", [(0, 3.0), (2, 9.0)]).has_grown


def test_every_limit_is_of_something_that_is_measured() -> None:
    assert set(LIMITS) == set(Sample.__dataclass_fields__) - {"log_kib"}
    assert all(earlier != later for earlier, later in pairwise(sorted(LIMITS)))
