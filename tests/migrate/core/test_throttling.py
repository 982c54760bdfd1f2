"""How a container is slowed: steps, figures, and workloads that go through whole migrations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.convergence import Decision, Limits, Stall, Verdict, decide
from migrate.core.prediction import Prediction, Workload, predict
from migrate.core.rounds_seen import PAGE_BYTES, History
from migrate.core.throttling import (
    CPUS_MIN,
    FIRST,
    MOST,
    PERIOD_S,
    QUOTA_PERIOD_US,
    QUOTA_US_MIN,
    RUN_S_MIN,
    SETTLING_ROUNDS,
    STEP,
    Act,
    OnStall,
    Reaction,
    Throttling,
    pulse_frozen_s,
    pulse_run_s,
    quota,
    quota_cpus,
    react,
)
from tests.migrate.core.rounds import Round

MIB = 1 << 20
ROUNDS_MAX = 100
STALLED = Decision(
    verdict=Verdict.STALLED,
    stall=Stall.WRITES,
    reason="it stalls",
    workload=Workload(memory_bytes=1 << 30),
    prediction=Prediction(10, 120, 2000, 0, 110, 15, 10),
    floor_ms=265,
    max_downtime_ms=300,
    remaining_bytes=100 * MIB,
    rate_bytes_s=50 * MIB,
    dirty_rate_bytes_s=50 * MIB,
)


# --- one step ---


@pytest.mark.parametrize(
    ("verdict", "on_stall", "act"),
    [
        (Verdict.CONTINUE, "throttle", Act.CONTINUE),
        (Verdict.FREEZE, "throttle", Act.FREEZE),
        (Verdict.FREEZE, "abort", Act.FREEZE),
        (Verdict.STALLED, "freeze", Act.FREEZE),
        (Verdict.STALLED, "abort", Act.ABORT),
        (Verdict.STALLED, "throttle", Act.THROTTLE),
    ],
)
def test_a_stall_is_answered_as_the_user_wants(
    verdict: Verdict, on_stall: OnStall, act: Act
) -> None:
    stall = STALLED.stall if verdict is Verdict.STALLED else None
    reaction = react(Throttling(), replace(STALLED, verdict=verdict, stall=stall), on_stall)
    assert reaction.act is act
    assert bool(reaction.throttling.taken) == (act is Act.THROTTLE)


@pytest.mark.parametrize("stall", [Stall.ROUNDS, Stall.FLOOR])
def test_what_slower_writes_would_not_help_is_frozen(stall: Stall) -> None:
    assert react(Throttling(), replace(STALLED, stall=stall), "throttle").act is Act.FREEZE


def test_near_the_floor_nothing_is_slowed_unless_the_limit_can_be_reached() -> None:
    near = replace(STALLED, prediction=Prediction(10, 120, 20, 0, 110, 15, 10))
    assert react(Throttling(), near, "throttle").act is Act.FREEZE
    unreachable = replace(near, max_downtime_ms=100)
    assert react(Throttling(), unreachable, "throttle").act is Act.FREEZE
    reachable = replace(near, max_downtime_ms=280)
    assert react(Throttling(), reachable, "throttle").act is Act.THROTTLE


def test_a_step_settles_before_the_next() -> None:
    """The round after a step sends what was written before it."""
    now = react(Throttling(), STALLED, "throttle").throttling
    for _ in range(SETTLING_ROUNDS - 1):
        reaction = react(now, STALLED, "throttle")
        assert reaction.act is Act.CONTINUE
        assert reaction.throttling.taken == now.taken
        now = reaction.throttling
    assert react(now, STALLED, "throttle").act is Act.THROTTLE
    # What became good meanwhile is not waited for.
    good = replace(STALLED, verdict=Verdict.FREEZE, stall=None)
    assert react(Throttling(0.5), good, "throttle").act is Act.FREEZE


def test_the_measured_rates_say_how_large_a_step_is() -> None:
    def first(dirty: float) -> float:
        stalled = replace(STALLED, dirty_rate_bytes_s=dirty * STALLED.rate_bytes_s)
        return react(Throttling(), stalled, "throttle").throttling.taken

    assert first(0) == first(0.5) == FIRST
    assert first(1) == pytest.approx(0.5)
    assert first(5) == pytest.approx(0.9)
    assert first(1000) == MOST


def test_a_step_that_has_changed_nothing_is_followed_by_a_larger_one() -> None:
    def second(remaining_mib: int) -> float:
        first = react(Throttling(), STALLED, "throttle").throttling
        later = replace(STALLED, remaining_bytes=remaining_mib * MIB)
        settled = replace(first, rounds=SETTLING_ROUNDS - 1)
        return react(settled, later, "throttle").throttling.share / first.share

    assert second(50) == pytest.approx(0.5)
    assert second(100) == pytest.approx(0.25)


def test_it_is_frozen_when_no_more_can_be_taken_away() -> None:
    reaction = react(Throttling(MOST, SETTLING_ROUNDS), STALLED, "throttle")
    assert (reaction.act, reaction.is_exhausted) == (Act.FREEZE, True)


decisions = st.builds(
    replace,
    st.just(STALLED),
    rate_bytes_s=st.floats(1, 1e12),
    dirty_rate_bytes_s=st.floats(0, 1e12),
)


@given(st.lists(decisions, min_size=30, max_size=30))
def test_steps_grow_and_end(stalls: list[Decision]) -> None:
    """Whatever is measured: a stall that lasts is frozen at last, after at most so many steps."""
    now, steps = Throttling(), [0.0]
    for stalled in stalls:
        reaction = react(now, stalled, "throttle")
        now = reaction.throttling
        if reaction.act is Act.FREEZE:
            break
        if reaction.act is Act.THROTTLE:
            assert now.taken >= min(steps[-1] + STEP, 1 - (1 - steps[-1]) / 2, MOST)
            assert FIRST <= now.taken <= MOST
            steps.append(now.taken)
    else:
        raise AssertionError("it went on for ever")
    assert reaction.is_exhausted
    assert len(steps) <= 13


# --- figures ---


shares = st.floats(1 - MOST, 1, exclude_max=True)


@given(shares, st.floats(1, 20))
def test_pulses_leave_the_share_and_are_short(share: float, late: float) -> None:
    """However late the end of a run is noticed, until it would take a pulse that is too long."""
    run_s = pulse_run_s(share)
    assert RUN_S_MIN <= run_s <= PERIOD_S
    ran_s = run_s * late
    frozen_s = pulse_frozen_s(share, ran_s)
    assert 0 < frozen_s <= PERIOD_S
    assert frozen_s == PERIOD_S or ran_s / (ran_s + frozen_s) == pytest.approx(share)


@given(shares, st.floats(0, 256))
def test_limits_are_such_as_the_kernel_takes(share: float, cpus: float) -> None:
    quota_us, period_us = map(int, quota(share, cpus).split())
    assert quota_us >= QUOTA_US_MIN
    assert period_us == QUOTA_PERIOD_US
    assert quota_us <= max(share * max(cpus, CPUS_MIN) * period_us + 1, QUOTA_US_MIN)


def test_what_a_limit_allows() -> None:
    assert quota_cpus("max 100000") is None
    assert quota_cpus("150000 100000") == 1.5


# --- whole migrations of simulated containers ---


def random_writes(speed_bytes_ms: float, hot_bytes: int, ms: float) -> float:
    """Distinct bytes that random writes to a hot set reach."""
    return hot_bytes * -math.expm1(-speed_bytes_ms * ms / hot_bytes)


def migrate(
    speed_bytes_ms: float, memory_bytes: int, way_bytes_ms: float, limits: Limits
) -> tuple[list[Decision], list[Reaction]]:
    """A container whose writes fall with its processor time, to the end of the rounds."""
    workload, past, now = Workload(memory_bytes=memory_bytes), History(), Throttling()
    dirty = float(memory_bytes)
    told: list[Decision] = []
    reactions: list[Reaction] = []
    while not reactions or reactions[-1].act in (Act.CONTINUE, Act.THROTTLE):
        duration_ms = 2.0 + dirty / way_bytes_ms
        past.add(Round(int(dirty / PAGE_BYTES), duration_ms))
        dirty = random_writes(speed_bytes_ms * now.share, memory_bytes, duration_ms)
        told.append(decide(past, workload, limits))
        reactions.append(react(now, told[-1], "throttle"))
        now = reactions[-1].throttling
    return told, reactions


@given(st.integers(64 * MIB, 16 * 1024 * MIB), st.floats(0.02, 2), st.floats(0.1, 40))
def test_writes_that_outrun_the_way_converge(
    memory_bytes: int, way_mib_ms: float, times: float
) -> None:
    """Up to forty times as fast as they are copied; the limit is a tenth above the floor."""
    floor_ms = predict(History(), Workload(memory_bytes=memory_bytes), 0).downtime_ms
    limits = Limits(1.1 * floor_ms, ROUNDS_MAX)
    way = way_mib_ms * MIB
    told, reactions = migrate(times * way, memory_bytes, way, limits)
    assert reactions[-1].act is Act.FREEZE
    assert told[-1].verdict is Verdict.FREEZE
    assert not reactions[-1].is_exhausted
    assert len(told) < ROUNDS_MAX


@given(st.floats(1.0, 40))
def test_it_is_slowed_no_more_than_needed(times: float) -> None:
    """The last step may be too large, by as much as it is a step."""
    memory_bytes, way = 1024 * MIB, 0.1 * MIB
    _, reactions = migrate(times * way, memory_bytes, way, Limits(450, ROUNDS_MAX))
    assert reactions[-1].throttling.share * times > 0.2
