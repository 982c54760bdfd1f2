"""What follows from a stall: slow the container step by step, freeze it all the same, or give up.

Pure and deterministic. With `--on-stall throttle` part of the container's processor time is taken
away. How much is decided anew after each round, from what was measured in it:

    taken        0 ── FIRST or more ── STEP more, or half of what is left ── MOST ── (freeze)
    the aim      that it writes AIM times as fast as it is copied, were writes to fall with its time
    settling     a round sends what was written during the one before it, so a change shows in the
                 second round that ends after it

It is never taken back while rounds go on: what would be given back would be missed a round later.
How time is taken away (`brakes.py`) is here only in figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from migrate.core.convergence import GAIN_RATIO, Stall, Verdict

if TYPE_CHECKING:
    from migrate.core.convergence import Decision

OnStall: TypeAlias = Literal["throttle", "freeze", "abort"]

FIRST: Final = 0.2
STEP: Final = 0.1
MOST: Final = 0.99
"""The steps of QEMU's auto-converge (`cpu-throttle-initial`, `-increment`, `max-cpu-throttle`)."""
AIM: Final = 0.5
"""Each round is then half as long as the one before; above 1 they would not get shorter at all."""
VAIN_AIM: Final = AIM / 2
"""After a step that has changed nothing: then each page is written twice and more in a round, so
that half of the writes would still reach nearly all of them."""
SETTLING_ROUNDS: Final = 2

PERIOD_S: Final = 0.05
"""Of pulses. To a client what a request loses in one of them is jitter."""
RUN_S_MIN: Final = 0.0005
"""Less is lost on the ways into the freezer and out of it."""
QUOTA_PERIOD_US: Final = 100_000
"""The kernel's own for cpu.max; a shorter one would leave nothing of a small share."""
QUOTA_US_MIN: Final = 1000
"""The kernel refuses less (`kernel/sched/core.c: min_cfs_quota_period`)."""
CPUS_MIN: Final = 0.05
"""Of a container that hardly used any processor time when it was measured."""


class Act(StrEnum):
    """What to do after a round."""

    CONTINUE = "continue"
    THROTTLE = "throttle"  # and continue
    FREEZE = "freeze"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Throttling:
    """taken: the part of its processor time that the container does not get, 0 to MOST. rounds:
    how many have ended since that was changed. remaining_bytes: what was left to send then."""

    taken: float = 0.0
    rounds: int = 0
    remaining_bytes: int = 0

    @property
    def share(self) -> float:
        """What it still gets, 1 for all of it."""
        return 1.0 - self.taken

    @property
    def is_last(self) -> bool:
        """Whether no more can be taken away."""
        return self.taken >= MOST


@dataclass(frozen=True, slots=True)
class Reaction:
    """What to do, the throttling from now on, and why in words. is_exhausted: it is frozen since no
    more of its time can be taken away."""

    act: Act
    throttling: Throttling
    reason: str
    is_exhausted: bool = False


def react(now: Throttling, decision: Decision, on_stall: OnStall) -> Reaction:
    """What follows from the decision after a round that ran under `now`."""
    now = replace(now, rounds=now.rounds + 1)
    if decision.verdict is Verdict.CONTINUE:
        return Reaction(Act.CONTINUE, now, decision.reason)
    if decision.verdict is Verdict.FREEZE or on_stall == "freeze":
        return Reaction(Act.FREEZE, now, decision.reason)
    if on_stall == "abort":
        return Reaction(Act.ABORT, now, decision.reason)
    if decision.stall is not Stall.WRITES or decision.is_good_enough:
        return Reaction(Act.FREEZE, now, decision.reason)
    if now.taken and now.rounds < SETTLING_ROUNDS:
        return Reaction(Act.CONTINUE, now, decision.reason)
    if now.is_last:
        return Reaction(Act.FREEZE, now, decision.reason, is_exhausted=True)
    then = Throttling(_next_taken(now, decision), remaining_bytes=decision.remaining_bytes)
    return Reaction(Act.THROTTLE, then, decision.reason)


def _next_taken(now: Throttling, decision: Decision) -> float:
    """As much as the measured rates ask for, and not too little."""
    dirty, rate = decision.dirty_rate_bytes_s, decision.rate_bytes_s
    is_vain = now.taken and decision.remaining_bytes >= GAIN_RATIO * now.remaining_bytes
    aim = VAIN_AIM if is_vain else AIM
    wanted = 1.0 - now.share * aim * rate / dirty if dirty > 0 else 0.0
    # Of a share that is small already STEP would be most of it, or all.
    least = min(now.taken + STEP, 1.0 - now.share / 2)
    return min(max(wanted, least, FIRST), MOST)


def quota(share: float, cpus: float) -> str:
    """What to write into cpu.max, so that a container that used `cpus` gets `share` of that."""
    quota_us = round(share * max(cpus, CPUS_MIN) * QUOTA_PERIOD_US)
    return f"{max(quota_us, QUOTA_US_MIN)} {QUOTA_PERIOD_US}"


def quota_cpus(cpu_max: str) -> float | None:
    """How many processors a content of cpu.max allows, None for all ("max 100000")."""
    quota_us, _, period_us = cpu_max.partition(" ")
    return None if quota_us == "max" else int(quota_us) / int(period_us)


def pulse_run_s(share: float) -> float:
    """How long tasks that get `share` of their time run before they are frozen."""
    return max(share * PERIOD_S, RUN_S_MIN)


def pulse_frozen_s(share: float, ran_s: float) -> float:
    """How long they are frozen after they have run for so long, never longer than PERIOD_S."""
    return min(ran_s * (1.0 - share) / share, PERIOD_S)
