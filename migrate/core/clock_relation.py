"""How the monotonic clocks of source and target relate, from pings over the control channel.

The clocks share neither zero nor, exactly, speed; over the seconds around a handover only the zero
matters. A ping carries the source's time out and the target's time back; the target read its clock
somewhere between the ping's leaving and its return, so the middle is off by at most half of the
round trip, and the sample with the shortest one knows best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SAMPLES: Final = 1024
"""More than a migration takes, and cheap to look through."""


@dataclass(frozen=True, slots=True)
class PingSample:
    """One ping, all in microseconds: when it left and came back by the source's monotonic clock,
    and what the target's showed in between."""

    sent_us: int
    target_us: int
    received_us: int

    @property
    def round_trip_us(self) -> int:
        """From leaving to coming back."""
        return self.received_us - self.sent_us


@dataclass(frozen=True, slots=True)
class ClockRelation:
    """target clock = source clock + offset_us, to within error_us either way."""

    offset_us: int
    error_us: int

    def to_source(self, target_us: int) -> int:
        """The source's time of an instant on the target."""
        return target_us - self.offset_us

    @classmethod
    def from_samples(cls, samples: Sequence[PingSample]) -> ClockRelation:
        """From the sample with the shortest round trip. Raises ValueError without a usable one."""
        best = best_sample(samples)
        middle_us = best.sent_us + best.round_trip_us // 2
        return cls(best.target_us - middle_us, (best.round_trip_us + 1) // 2)


def best_sample(samples: Sequence[PingSample]) -> PingSample:
    """The sample with the shortest round trip; the first of equal ones."""
    if not 0 < len(samples) <= MAX_SAMPLES:
        raise ValueError(f"{len(samples)} clock samples, 1 to {MAX_SAMPLES} are possible")
    if any(sample.round_trip_us < 0 for sample in samples):
        raise ValueError("a ping came back before it left")
    return min(samples, key=lambda sample: sample.round_trip_us)
