"""Whether to freeze after a round of pre-copy.

It goes by the downtime that `prediction.py` says would follow, and by what `rounds_seen.py` says of
the rounds so far. Pure and deterministic: equal rounds give equal decisions. It moves nothing and
knows neither trackers nor streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from migrate.core.prediction import predict
from migrate.core.rounds_seen import duration_ms

if TYPE_CHECKING:
    from migrate.core.prediction import Prediction, Workload
    from migrate.core.rounds_seen import History

GAIN_RATIO: Final = 0.9
"""A next round that would leave more than this part of what is left now is not worth it."""
MIN_GAIN_MS: Final = 1.0
"""Nor one that would shorten the downtime by less than a disk's sync varies."""
NO_GAIN_ROUNDS: Final = 2
"""So many rounds in a row must promise no gain: one burst of writes is no reason to give up."""
STALL_ROUNDS: Final = 3
"""So many rounds in a row in which the container wrote faster than it was copied are a stall."""
NEAR_FLOOR: Final = 1.1
"""Where no round can bring the downtime within the limit, so much more than it must be is as good
as it gets: to slow the container for less would do more harm than good."""


class Verdict(StrEnum):
    """What to do after a round."""

    CONTINUE = "continue"
    FREEZE = "freeze"  # the predicted downtime is within the limit
    STALLED = "stalled"  # it is not and more rounds will not bring it there: see throttling.py


class Stall(StrEnum):
    """Why more rounds will not bring the downtime down."""

    WRITES = "writes"  # the container writes too fast
    ROUNDS = "rounds"  # it was the last one that is allowed
    FLOOR = "floor"  # memory is not what takes so long


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows."""

    max_downtime_ms: float
    max_rounds: int

    def __post_init__(self) -> None:
        if not self.max_downtime_ms > 0 or self.max_rounds < 1:
            raise ValueError("max_downtime_ms must be positive and max_rounds at least 1")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, why in words, and the figures that led to it.

    stall: of a verdict STALLED, else None. workload: what it was predicted from. floor_ms: the
    downtime if no memory were left to send.
    """

    verdict: Verdict
    stall: Stall | None
    reason: str
    workload: Workload
    prediction: Prediction
    floor_ms: float
    max_downtime_ms: float
    remaining_bytes: int
    rate_bytes_s: float
    dirty_rate_bytes_s: float

    @property
    def predicted_downtime_ms(self) -> float:
        """The downtime if frozen now."""
        return self.prediction.downtime_ms

    @property
    def is_good_enough(self) -> bool:
        """Whether the downtime is within the limit, or near the floor where that is above it."""
        is_reachable = self.floor_ms <= self.max_downtime_ms
        goal_ms = self.max_downtime_ms if is_reachable else NEAR_FLOOR * self.floor_ms
        return self.predicted_downtime_ms <= goal_ms


def decide(history: History, workload: Workload, limits: Limits) -> Decision:
    """What to do after the last round of `history` (at least one)."""
    if not history.rounds:
        raise ValueError("a decision needs a finished round")
    remaining = _remaining(history, workload)
    prediction = predict(history, workload, remaining)
    floor_ms = predict(history, workload, 0).downtime_ms
    verdict, stall, reason = _judge(history, workload, limits, prediction.downtime_ms, floor_ms)
    return Decision(
        verdict=verdict,
        stall=stall,
        reason=reason,
        workload=workload,
        prediction=prediction,
        floor_ms=floor_ms,
        max_downtime_ms=limits.max_downtime_ms,
        remaining_bytes=remaining,
        rate_bytes_s=history.rate_bytes_ms * 1000,
        dirty_rate_bytes_s=history.dirty_rate_bytes_ms * 1000,
    )


def _judge(
    history: History, workload: Workload, limits: Limits, predicted_ms: float, floor_ms: float
) -> tuple[Verdict, Stall | None, str]:
    expected = (
        f"{predicted_ms:.0f} ms of downtime are predicted, {limits.max_downtime_ms:.0f} allowed"
    )
    if predicted_ms <= limits.max_downtime_ms:
        return Verdict.FREEZE, None, expected
    found = _stall(history, workload, limits, predicted_ms, floor_ms)
    if found is None:
        return Verdict.CONTINUE, None, expected
    stall, why = found
    return Verdict.STALLED, stall, f"{expected}, {why}"


def _stall(
    history: History, workload: Workload, limits: Limits, predicted_ms: float, floor_ms: float
) -> tuple[Stall, str] | None:
    """Why more rounds will not help, None if they will."""
    if len(history.rounds) >= limits.max_rounds:
        return Stall.ROUNDS, f"after the last of {limits.max_rounds} rounds"
    if _is_stalled(history):
        return Stall.WRITES, f"and in {STALL_ROUNDS} rounds memory was written faster than sent"
    if predicted_ms - floor_ms < MIN_GAIN_MS:
        return Stall.FLOOR, f"and {floor_ms:.0f} ms of it no round of pre-copy can shorten"
    if _gains_nothing(history, workload):
        return Stall.WRITES, "and another round would not bring it down"
    return None


def _is_stalled(history: History) -> bool:
    past = history
    for _ in range(STALL_ROUNDS):
        if len(past.rounds) < 2 or past.dirty_rate_bytes_ms < past.rate_bytes_ms:
            return False
        past = past.before()
    return True


def _gains_nothing(history: History, workload: Workload) -> bool:
    """Whether the last rounds all promised too little of the next one. Only rounds that two
    observations of the container's writes led to can say so."""
    past = history
    for _ in range(NO_GAIN_ROUNDS):
        if len(past.rounds) < 3 or _has_gain(past, workload):
            return False
        past = past.before()
    return True


def _has_gain(history: History, workload: Workload) -> bool:
    now = _remaining(history, workload)
    next_round_ms = history.overhead_ms + now / history.rate_bytes_ms
    then = history.dirtied_bytes(next_round_ms, workload.private_bytes)
    gain_ms = (
        predict(history, workload, now).downtime_ms - predict(history, workload, then).downtime_ms
    )
    return then < now * GAIN_RATIO and gain_ms >= MIN_GAIN_MS


def _remaining(history: History, workload: Workload) -> int:
    """Written during the last round, so not sent yet."""
    return history.dirtied_bytes(duration_ms(history.rounds[-1]), workload.private_bytes)
