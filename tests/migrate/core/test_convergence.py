"""When pre-copy ends: examples, and workloads that are run through it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.core.convergence import Decision, Limits, Verdict, decide
from migrate.core.prediction import GIB, Workload, predict
from migrate.core.rounds_seen import PAGE_BYTES, History
from tests.migrate.core.rounds import LIMITS, MIB, Round, histories, history, memories, pages

if TYPE_CHECKING:
    from collections.abc import Callable

CONTAINER = Workload(memory_bytes=GIB)


def test_an_idle_container_is_frozen_after_its_second_round() -> None:
    past = history((100, 100))
    workload = Workload(memory_bytes=100 * MIB)
    tight = Limits(max_downtime_ms=290.0, max_rounds=30)
    past.add(Round(0, 2))
    decision = decide(past, workload, tight)
    assert decision.verdict is Verdict.FREEZE
    assert decision.remaining_bytes == 0
    assert "are predicted, 290 allowed" in decision.reason


def test_the_first_round_says_nothing_of_writes() -> None:
    assert decide(history((1024, 1000)), CONTAINER, LIMITS).verdict is Verdict.CONTINUE


def test_a_small_container_may_be_frozen_after_one_round() -> None:
    decision = decide(history((16, 16)), Workload(memory_bytes=16 * MIB), LIMITS)
    assert decision.verdict is Verdict.FREEZE


def test_a_stall_is_called_so() -> None:
    past = history((1024, 1000), (1024, 1000), (1024, 1000), (1024, 1000))
    decision = decide(past, CONTAINER, LIMITS)
    assert decision.verdict is Verdict.STALLED
    assert "faster than sent" in decision.reason
    assert decide(past.before(), CONTAINER, LIMITS).verdict is Verdict.CONTINUE


def test_rounds_that_gain_nothing_end_after_two_of_them() -> None:
    """A hot set of 400 MiB, with a way that carries it in less time than it takes to be written."""
    past = history((4096, 4000), (400, 400), (400, 400))
    workload = Workload(memory_bytes=4 * GIB)
    assert decide(past, workload, LIMITS).verdict is Verdict.CONTINUE
    past.add(Round(pages(400 * MIB), 400))
    decision = decide(past, workload, LIMITS)
    assert decision.verdict is Verdict.STALLED
    assert "would not bring it down" in decision.reason


def test_the_last_round_ends_it() -> None:
    limits = Limits(max_downtime_ms=1.0, max_rounds=2)
    past = history((1024, 1000))
    assert decide(past, CONTAINER, limits).verdict is Verdict.CONTINUE
    past.add(Round(pages(900 * MIB), 900))
    decision = decide(past, CONTAINER, limits)
    assert decision.verdict is Verdict.STALLED
    assert "the last of 2 rounds" in decision.reason


def test_a_redis_that_was_slowed_is_frozen_when_its_rounds_are_short() -> None:
    """Of 256 MiB, between emulated machines (docs/facts.md): the more it was slowed the faster its
    pages were sent, which only small rounds could show."""
    past = history(
        *((330.1, 105_050), (20.8, 3320), (6.3, 1150), (3.0, 660), (2.2, 380), (1.6, 310)),
        *((1.5, 280), (1.4, 290), (5.5, 750), (2.4, 330)),
    )
    workload = Workload(memory_bytes=331 * MIB)
    assert decide(past, workload, LIMITS).verdict is Verdict.STALLED
    past.add(Round(pages(1.65 * MIB), 210))
    decision = decide(past, workload, Limits(max_downtime_ms=320.0, max_rounds=30))
    assert decision.rate_bytes_s > 7 * MIB
    assert decision.verdict is Verdict.FREEZE


def test_a_copy_is_not_waited_for_on_a_slow_way() -> None:
    """Its final delta is kept on this host; in a migration the rounds would go on."""
    past = history((100, 100_000), (20, 20_000))
    kept = Workload(memory_bytes=GIB, is_kept=True)
    assert decide(past, kept, LIMITS).verdict is Verdict.FREEZE
    moved = replace(kept, is_kept=False)
    assert decide(past, moved, LIMITS).verdict is Verdict.CONTINUE


def test_wrong_questions_are_errors() -> None:
    with pytest.raises(ValueError, match="finished round"):
        decide(History(), CONTAINER, LIMITS)
    with pytest.raises(ValueError, match="positive"):
        Limits(max_downtime_ms=0, max_rounds=1)
    with pytest.raises(ValueError, match="at least 1"):
        Limits(max_downtime_ms=1, max_rounds=0)


# --- whole migrations of simulated containers ---

Writes: TypeAlias = "Callable[[float, float], float]"
"""(start of the interval in ms, its length) -> distinct bytes that are written in it."""


def uniform(rate_bytes_ms: float, memory_bytes: int) -> Writes:
    """Each write goes to a new page, until all are written."""
    return lambda _, ms: min(rate_bytes_ms * ms, memory_bytes)


def hot_set(rate_bytes_ms: float, hot_bytes: int) -> Writes:
    """Writes to the same pages over and over."""
    return lambda _, ms: min(rate_bytes_ms * ms, hot_bytes)


def bursty(rate_bytes_ms: float, memory_bytes: int, period_ms: float) -> Writes:
    """Half of each period busy, half idle."""

    def written(start_ms: float, ms: float) -> float:
        steps = 64
        busy = sum((start_ms + ms * k / steps) % period_ms < period_ms / 2 for k in range(steps))
        return min(rate_bytes_ms * ms * busy / steps, memory_bytes)

    return written


def migrate(
    writes: Writes, memory_bytes: int, way_bytes_ms: float, limits: Limits
) -> tuple[list[Decision], float]:
    """All decisions of one migration, and the bytes that were really left at its end."""
    workload, past = Workload(memory_bytes=memory_bytes), History()
    now_ms, dirty = 0.0, float(memory_bytes)
    decisions: list[Decision] = []
    for _ in range(limits.max_rounds + 1):
        duration_ms = 2.0 + dirty / way_bytes_ms
        past.add(Round(pages(dirty), duration_ms))
        dirty = writes(now_ms, duration_ms)
        now_ms += duration_ms
        decisions.append(decide(past, workload, limits))
        if decisions[-1].verdict is not Verdict.CONTINUE:
            return decisions, dirty
    raise AssertionError("it went on beyond the last round")


rates = st.floats(0.001, 10 * MIB)
ways = st.floats(0.01 * MIB, 10 * MIB)
limit_values = st.builds(Limits, st.floats(1, 5000), st.integers(1, 40))


@st.composite
def writers(draw: st.DrawFn, memory_bytes: int) -> Writes:
    rate = draw(rates)
    kind = draw(st.sampled_from(["uniform", "hot", "bursty"]))
    if kind == "uniform":
        return uniform(rate, memory_bytes)
    if kind == "hot":
        return hot_set(rate, draw(st.integers(0, memory_bytes)))
    return bursty(rate, memory_bytes, draw(st.floats(1, 10_000)))


@given(st.data(), memories, ways, limit_values)
def test_every_migration_ends_within_its_rounds(
    data: st.DataObject, memory_bytes: int, way: float, limits: Limits
) -> None:
    writes = data.draw(writers(memory_bytes))
    decisions, _ = migrate(writes, memory_bytes, way, limits)
    assert 1 <= len(decisions) <= limits.max_rounds
    last = decisions[-1]
    within = last.predicted_downtime_ms <= limits.max_downtime_ms
    assert (last.verdict is Verdict.FREEZE) == within
    assert all(one.predicted_downtime_ms > limits.max_downtime_ms for one in decisions[:-1])
    again, _ = migrate(writes, memory_bytes, way, limits)
    assert again == decisions


@given(st.integers(64 * MIB, 64 * GIB), st.floats(0.05, 4), st.floats(0.01, 0.5))
def test_a_writer_slower_than_the_way_converges(
    memory_bytes: int, way_mib_ms: float, share: float
) -> None:
    """Down to what only the dump and the restore cost, whatever the size of the memory."""
    way = way_mib_ms * MIB
    floor_ms = predict(History(), Workload(memory_bytes=memory_bytes), 0).downtime_ms
    limits = Limits(max_downtime_ms=floor_ms + 50, max_rounds=40)
    decisions, left = migrate(uniform(share * way, memory_bytes), memory_bytes, way, limits)
    assert decisions[-1].verdict is Verdict.FREEZE
    hidden_ms = predict(History(), Workload(memory_bytes=memory_bytes), 0).dump_ms
    assert left / way <= hidden_ms + 60


@given(memories, ways, st.floats(1.5, 5))
def test_a_writer_faster_than_the_way_is_a_stall_before_the_last_round(
    memory_bytes: int, way: float, share: float
) -> None:
    limits = Limits(max_downtime_ms=1.0, max_rounds=40)
    decisions, _ = migrate(uniform(share * way, memory_bytes), memory_bytes, way, limits)
    assert decisions[-1].verdict is Verdict.STALLED
    assert len(decisions) <= 6


@given(st.integers(256 * MIB, 8 * GIB), st.floats(0.1, 2), st.integers(0, 4 * MIB))
def test_a_small_hot_set_is_frozen_early_and_predicted_well(
    memory_bytes: int, way_mib_ms: float, hot_bytes: int
) -> None:
    way = way_mib_ms * MIB
    floor_ms = predict(History(), Workload(memory_bytes=memory_bytes), 0).downtime_ms
    limits = Limits(max_downtime_ms=floor_ms + 50, max_rounds=40)
    decisions, left = migrate(hot_set(10 * MIB, hot_bytes), memory_bytes, way, limits)
    assert decisions[-1].verdict is Verdict.FREEZE
    assert len(decisions) <= 4
    assert decisions[-1].remaining_bytes >= left - 2 * PAGE_BYTES


def test_a_burst_alone_is_no_stall() -> None:
    """During the second round the container writes three times faster than the way carries it."""
    limits = Limits(max_downtime_ms=450.0, max_rounds=30)
    past = history((1024, 1000), (300, 300), (900, 900))
    assert decide(past, CONTAINER, limits).verdict is Verdict.CONTINUE
    past.add(Round(pages(20 * MIB), 20))
    assert decide(past, CONTAINER, limits).verdict is Verdict.FREEZE


def test_what_no_round_can_shorten_is_not_waited_for() -> None:
    """Almost nothing is left, and still the dump and the restore take longer than allowed."""
    past = history((1024, 1000), (1, 3))
    floor_ms = predict(past, CONTAINER, 0).downtime_ms
    decision = decide(past, CONTAINER, Limits(max_downtime_ms=floor_ms - 1, max_rounds=30))
    assert decision.verdict is Verdict.STALLED
    assert "no round of pre-copy can shorten" in decision.reason


@settings(max_examples=200)
@given(histories, memories, st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_time_never_writes_less(
    past: History, memory_bytes: int, some_ms: float, more_ms: float
) -> None:
    less = past.dirtied_bytes(some_ms, memory_bytes)
    assert 0 <= less <= past.dirtied_bytes(some_ms + more_ms, memory_bytes) + 1 <= memory_bytes + 1


@settings(max_examples=200)
@given(histories, memories, limit_values)
def test_any_history_gives_a_decision(past: History, memory_bytes: int, limits: Limits) -> None:
    decision = decide(past, Workload(memory_bytes=memory_bytes), limits)
    assert decision.predicted_downtime_ms > 0
    assert 0 <= decision.remaining_bytes <= memory_bytes
    assert decision.reason
