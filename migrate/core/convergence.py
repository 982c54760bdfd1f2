"""Whether to freeze after a round of pre-copy, and how long the container would then stand still.

Everything is computed from the rounds of this migration; where it has not measured something yet,
a prior from earlier measurements stands in for it. Pure and deterministic: equal rounds give equal
decisions. It moves nothing and knows neither trackers nor streams.

What is left when the rounds end is what the container writes during the last one. It is estimated
from the last two: pages that are written grow with a power of the time that they are collected
over, between 1 (every write hits a new page) and 0 (the same hot pages again and again). After one
observation only, growth with a longer time is taken as 1 and with a shorter one as 0: the estimate
errs to too much, which costs a round, not a downtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_BYTES: Final = 4096
GIB: Final = 1 << 30

FREEZE_MS: Final = 2.0
"""Unplugging by netlink and freezing the cgroup: 0.5 to 1 ms where nothing else runs."""
DUMP_MS: Final = 85.0
"""CRIU's dump below runc without memory, from the freeze to `post-dump`: 83 ms of 16 MiB."""
DUMP_MS_PER_GIB: Final = 95.0
"""What a dump adds per GiB of present memory, which it leaves alone (`criu_glue/known_pages.py`):
the kernel walks its page tables for `smaps`, PAGEMAP_SCAN and `clear_refs`. 1 GiB took 160 to 190
ms."""
DUMP_SHARED_MS_PER_GIB: Final = 800.0
"""Shared memory is never lazy, CRIU writes all of it: full dumps of 1 GiB took 0.72 to 0.9 s."""
RESTORE_MS: Final = 80.0
"""The images' way, and a lazy restore with runc up to the hold: 65 to 90 ms."""
RESTORE_EAGER_MS_PER_GIB: Final = 1900.0
"""An eager restore of 1 GiB: 1.2 to 3.7 s, 1.9 s when nothing else ran. Shared memory is always
eager."""
HANDOVER_MS: Final = 5.0
"""Two synced journal records, besides the round trip: 4 to 5 ms."""
RESUME_MS: Final = 20.0
"""CRIU's way from `post-restore` to the first instruction, with a look at what confines the
tasks: 13 to 22 ms."""
ROUND_TRIP_MS: Final = 1.0
"""A local network, until pings have been answered."""

RATE_BYTES_MS: Final = 100.0 * (1 << 20) / 1000
"""100 MiB/s, a gigabit link, until a round has been measured."""
KEPT_BYTES_MS: Final = 500.0 * (1 << 20) / 1000
"""Memory is copied within this host with 1.2 to 1.8 GiB/s, and slower into pages that are new to
it: 146 MiB/s were seen."""
RATE_SAMPLE_BYTES: Final = 16 << 20
"""A round must be as large as this to say how slow the way is; smaller ones measure round trips."""
RATE_ROUNDS: Final = 3
"""So many of the last rounds, smaller ones too, say together how fast the way is at least,"""
RATE_BYTES_MIN: Final = 1 << 20
"""if they are as large as this: less may be what a shaped link lets through at once."""
MIN_DURATION_MS: Final = 0.1
"""Shorter ones are the clock's noise; also keeps divisions defined."""

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


class RoundStats(Protocol):
    """What one round moved (`transport.sender.RoundStats`). A page counts in one of the four."""

    @property
    def pages(self) -> int: ...
    @property
    def zero_pages(self) -> int: ...
    @property
    def unchanged_pages(self) -> int: ...
    @property
    def vanished_pages(self) -> int: ...
    @property
    def duration_ms(self) -> float: ...


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
class Workload:
    """What the prediction must know of the container and the way to the target.

    memory_bytes: present memory, shared_bytes of it shared. The `*_ms` are measured in this
    migration and None where they are not: round_trip_ms of the control channel, rootfs_ms of the
    last pass of the root file system that runs while frozen. is_kept: the container is copied, so
    the final delta is kept on this host while it stands still, and it runs on after the dump.
    """

    memory_bytes: int
    shared_bytes: int = 0
    lazy: bool = True
    round_trip_ms: float | None = None
    freeze_ms: float | None = None
    dump_ms: float | None = None
    restore_ms: float | None = None
    rootfs_ms: float | None = None
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows."""

    max_downtime_ms: float
    max_rounds: int

    def __post_init__(self) -> None:
        if not self.max_downtime_ms > 0 or self.max_rounds < 1:
            raise ValueError("max_downtime_ms must be positive and max_rounds at least 1")


@dataclass(frozen=True, slots=True)
class Prediction:
    """The downtime if frozen now, by the parts of `core/downtime.py` (ms)."""

    freeze_ms: float
    dump_ms: float
    final_delta_ms: float
    rootfs_ms: float
    restore_ms: float
    handover_ms: float
    resume_ms: float

    @property
    def downtime_ms(self) -> float:
        """The whole."""
        return (
            self.freeze_ms
            + self.dump_ms
            + self.final_delta_ms
            + self.rootfs_ms
            + self.restore_ms
            + self.handover_ms
            + self.resume_ms
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, why in words, and the figures that led to it.

    stall: of a verdict STALLED, else None. floor_ms: the downtime if no memory were left to send.
    """

    verdict: Verdict
    stall: Stall | None
    reason: str
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


@dataclass(slots=True)
class History:
    """The rounds so far, oldest first. A round's duration counts from its collection on, so that
    the pages of a round were written during the one before it."""

    rounds: list[RoundStats] = field(default_factory=list)

    def add(self, stats: RoundStats) -> None:
        """Append a finished round."""
        self.rounds.append(stats)

    def before(self) -> History:
        """The history as it was one round ago."""
        return History(self.rounds[:-1])

    @property
    def rate_bytes_ms(self) -> float:
        """How fast pages with content are read, compared, compressed and sent, by all streams
        together: of the last round that was large enough to tell, else of the largest.

        What a round costs besides makes small ones look slow, never fast. So the last ones behind
        that one count where they were faster: a container that is slowed leaves more of the
        processor to them.
        """
        works = [_work_bytes(one) for one in self.rounds]
        if not any(works):
            return RATE_BYTES_MS
        large = [number for number, work in enumerate(works) if work >= RATE_SAMPLE_BYTES]
        telling = large[-1] if large else works.index(max(works))
        rate, smaller = _rate([self.rounds[telling]]), self.rounds[telling + 1 :][-RATE_ROUNDS:]
        if sum(map(_work_bytes, smaller)) < RATE_BYTES_MIN:
            return rate
        return max(rate, _rate(smaller))

    @property
    def overhead_ms(self) -> float:
        """What a round costs however small it is: collecting, and waiting for the last answer."""
        if not self.rounds:
            return 0.0
        rate = self.rate_bytes_ms
        return min(max(one.duration_ms - _work_bytes(one) / rate, 0.0) for one in self.rounds)

    @property
    def dirty_rate_bytes_ms(self) -> float:
        """How fast the container wrote to new pages during the round before the last; 0 if there
        was none."""
        if len(self.rounds) < 2:
            return 0.0
        return _dirty_pages(self.rounds[-1]) * PAGE_BYTES / _duration(self.rounds[-2])

    def dirtied_bytes(self, over_ms: float, limit_bytes: int) -> int:
        """What the container will have written in `over_ms`, at most `limit_bytes`."""
        if not self.rounds:
            return limit_bytes
        if len(self.rounds) < 2:
            # Nothing is known of its writes: as if all of it were written again.
            seen_bytes, seen_ms, growth = limit_bytes, _duration(self.rounds[-1]), 0.0
        else:
            seen_bytes = _dirty_pages(self.rounds[-1]) * PAGE_BYTES
            seen_ms = _duration(self.rounds[-2])
            growth = self._growth(longer=over_ms > seen_ms)
        expected = seen_bytes * (max(over_ms, 0.0) / seen_ms) ** growth if over_ms > 0 else 0.0
        return min(math.ceil(expected), limit_bytes)

    def _growth(self, *, longer: bool) -> float:
        """The power of time that written pages grow with."""
        cautious = 1.0 if longer else 0.0
        if len(self.rounds) < 3:
            return cautious
        earlier, last = _dirty_pages(self.rounds[-2]), _dirty_pages(self.rounds[-1])
        earlier_ms, last_ms = _duration(self.rounds[-3]), _duration(self.rounds[-2])
        # Two nearly equal times say nothing about growth.
        if not earlier or not last or abs(math.log(last_ms / earlier_ms)) < 0.1:
            return cautious
        growth = math.log(last / earlier) / math.log(last_ms / earlier_ms)
        return min(max(growth, 0.0), 1.0)


def predict(history: History, workload: Workload, remaining_bytes: int) -> Prediction:
    """The downtime if the container were frozen with `remaining_bytes` of memory still to send.

    The dump, the final delta and the root file system run at once: each of the latter two counts
    with what it takes longer than those before it.
    """
    private_gib = max(workload.memory_bytes - workload.shared_bytes, 0) / GIB
    shared_gib = workload.shared_bytes / GIB
    round_trip_ms = _or(workload.round_trip_ms, ROUND_TRIP_MS)
    dump_ms = _or(
        workload.dump_ms,
        DUMP_MS + DUMP_MS_PER_GIB * private_gib + DUMP_SHARED_MS_PER_GIB * shared_gib,
    )
    eager_gib = shared_gib if workload.lazy else shared_gib + private_gib
    restore_ms = _or(workload.restore_ms, RESTORE_MS + RESTORE_EAGER_MS_PER_GIB * eager_gib)
    send_ms = (
        history.overhead_ms + (remaining_bytes + workload.shared_bytes) / history.rate_bytes_ms
    )
    freeze_ms = _or(workload.freeze_ms, FREEZE_MS)
    if workload.is_kept:
        kept_ms = max(remaining_bytes / KEPT_BYTES_MS - dump_ms, 0.0)
        return Prediction(freeze_ms, dump_ms, kept_ms, 0.0, 0.0, 0.0, RESUME_MS)
    final_delta_ms = max(send_ms - dump_ms, 0.0)
    return Prediction(
        freeze_ms=freeze_ms,
        dump_ms=dump_ms,
        final_delta_ms=final_delta_ms,
        rootfs_ms=max(_or(workload.rootfs_ms, 0.0) - dump_ms - final_delta_ms, 0.0),
        restore_ms=restore_ms + round_trip_ms / 2,
        handover_ms=HANDOVER_MS + round_trip_ms,
        resume_ms=RESUME_MS,
    )


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
    then = history.dirtied_bytes(next_round_ms, _private_bytes(workload))
    gain_ms = (
        predict(history, workload, now).downtime_ms - predict(history, workload, then).downtime_ms
    )
    return then < now * GAIN_RATIO and gain_ms >= MIN_GAIN_MS


def _remaining(history: History, workload: Workload) -> int:
    """Written during the last round, so not sent yet."""
    return history.dirtied_bytes(_duration(history.rounds[-1]), _private_bytes(workload))


def _private_bytes(workload: Workload) -> int:
    return max(workload.memory_bytes - workload.shared_bytes, 0)


def _dirty_pages(stats: RoundStats) -> int:
    return stats.pages + stats.zero_pages + stats.unchanged_pages + stats.vanished_pages


def _work_bytes(stats: RoundStats) -> int:
    """Bytes that cost time: all but the zero pages, which would make the way look faster."""
    return (stats.pages + stats.unchanged_pages) * PAGE_BYTES


def _duration(stats: RoundStats) -> float:
    return max(stats.duration_ms, MIN_DURATION_MS)


def _rate(rounds: Sequence[RoundStats]) -> float:
    """Of these rounds together."""
    return sum(map(_work_bytes, rounds)) / sum(map(_duration, rounds))


def _or(measured: float | None, prior: float) -> float:
    return prior if measured is None else measured
