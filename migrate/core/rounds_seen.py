"""What the rounds of one pre-copy tell: how fast memory is carried, and how fast it is written.

Everything is computed from the rounds; where nothing has been measured yet, a prior from earlier
measurements stands in for it. Pure. It decides nothing: see `convergence.py`.

What is left when the rounds end is what the container writes during the last one. It is estimated
from the last two: pages that are written grow with a power of the time that they are collected
over, between 1 (every write hits a new page) and 0 (the same hot pages again and again). After one
observation only, growth with a longer time is taken as 1 and with a shorter one as 0: the estimate
errs to too much, which costs a round, not a downtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_BYTES: Final = 4096

RATE_BYTES_MS: Final = 100.0 * (1 << 20) / 1000
"""100 MiB/s, a gigabit link, until a round has been measured."""
RATE_SAMPLE_BYTES: Final = 16 << 20
"""A round must be as large as this to say how slow the way is; smaller ones measure round trips."""
RATE_ROUNDS: Final = 3
"""So many of the last rounds, smaller ones too, say together how fast the way is at least,"""
RATE_BYTES_MIN: Final = 1 << 20
"""if they are as large as this: less may be what a shaped link lets through at once."""
RATE_SAMPLE_MS: Final = 100.0
"""Or have taken as long as this; threads that had to wait for a processor make others look slow."""
MUCH_SMALLER: Final = 4
"""A round that carried so many times less than another tells what neither took for carrying."""
MIN_DURATION_MS: Final = 0.1
"""Shorter ones are the clock's noise; also keeps divisions defined."""


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


@dataclass(slots=True)
class History:
    """The rounds so far, oldest first. A round's duration counts from its collection on, so that
    the pages of a round were written during the one before it, and until the next began.

    waits_ms: of each round, what passed between the end of the one before and its own collection;
    rounds behind the end of the list waited for nothing.
    """

    rounds: list[RoundStats] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)

    def add(self, stats: RoundStats, wait_ms: float = 0.0) -> None:
        """Append a finished round, which began `wait_ms` after the one before had ended."""
        self.waits_ms += [0.0] * (len(self.rounds) - len(self.waits_ms))
        self.rounds.append(stats)
        self.waits_ms.append(wait_ms)

    def before(self) -> History:
        """The history as it was one round ago."""
        return History(self.rounds[:-1], self.waits_ms[: len(self.rounds) - 1])

    @property
    def rate_bytes_ms(self) -> float:
        """How fast pages with content are read, compared, compressed and sent, by all streams
        together: of the last round that was large enough to tell, else about that of the largest.

        What a round costs besides makes small ones look slow, never fast. So the last ones behind
        that one count where they were faster: a container that is slowed leaves more of the
        processor to them.
        """
        works = [_work_bytes(one) for one in self.rounds]
        if not any(works):
            return RATE_BYTES_MS
        large = [number for number, work in enumerate(works) if work >= RATE_SAMPLE_BYTES]
        if not large:
            return self._rate_of_small()
        telling = large[-1]
        rate, smaller = _rate([self.rounds[telling]]), self.rounds[telling + 1 :][-RATE_ROUNDS:]
        if sum(map(_work_bytes, smaller)) < RATE_BYTES_MIN:
            return rate
        return max(rate, _rate(smaller))

    def _rate_of_small(self) -> float:
        """Of the largest round, without what a much smaller one took, but for half of its time.
        One that was over at once tells of no slow link."""
        largest = max(self.rounds, key=_work_bytes)
        rest_ms = min(
            (
                duration_ms(one)
                for one in self.rounds
                if _work_bytes(one) * MUCH_SMALLER <= _work_bytes(largest)
            ),
            default=0.0,
        )
        took_ms = duration_ms(largest)
        rate = _work_bytes(largest) / (took_ms - min(rest_ms, took_ms / 2))
        return rate if took_ms >= RATE_SAMPLE_MS else max(rate, RATE_BYTES_MS)

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
        return _dirty_pages(self.rounds[-1]) * PAGE_BYTES / self._written_over_ms(-1)

    def dirtied_bytes(self, over_ms: float, limit_bytes: int) -> int:
        """What the container will have written in `over_ms`, at most `limit_bytes`."""
        if not self.rounds:
            return limit_bytes
        if len(self.rounds) < 2:
            # Nothing is known of its writes: as if all of it were written again.
            seen_bytes, seen_ms, growth = limit_bytes, duration_ms(self.rounds[-1]), 0.0
        else:
            seen_bytes = _dirty_pages(self.rounds[-1]) * PAGE_BYTES
            seen_ms = self._written_over_ms(-1)
            growth = self._growth(longer=over_ms > seen_ms)
        expected = seen_bytes * (max(over_ms, 0.0) / seen_ms) ** growth if over_ms > 0 else 0.0
        return min(math.ceil(expected), limit_bytes)

    def _written_over_ms(self, number: int) -> float:
        """How long the pages of round `number`, counted from the end, were collected over."""
        at = len(self.rounds) + number
        waited_ms = self.waits_ms[at] if at < len(self.waits_ms) else 0.0
        return duration_ms(self.rounds[at - 1]) + waited_ms

    def _growth(self, *, longer: bool) -> float:
        """The power of time that written pages grow with."""
        cautious = 1.0 if longer else 0.0
        if len(self.rounds) < 3:
            return cautious
        earlier, last = _dirty_pages(self.rounds[-2]), _dirty_pages(self.rounds[-1])
        earlier_ms, last_ms = self._written_over_ms(-2), self._written_over_ms(-1)
        # Two nearly equal times say nothing about growth.
        if not earlier or not last or abs(math.log(last_ms / earlier_ms)) < 0.1:
            return cautious
        growth = math.log(last / earlier) / math.log(last_ms / earlier_ms)
        return min(max(growth, 0.0), 1.0)


def duration_ms(stats: RoundStats) -> float:
    """How long a round took, at least MIN_DURATION_MS."""
    return max(stats.duration_ms, MIN_DURATION_MS)


def _dirty_pages(stats: RoundStats) -> int:
    return stats.pages + stats.zero_pages + stats.unchanged_pages + stats.vanished_pages


def _work_bytes(stats: RoundStats) -> int:
    """Bytes that cost time: all but the zero pages, which would make the way look faster."""
    return (stats.pages + stats.unchanged_pages) * PAGE_BYTES


def _rate(rounds: Sequence[RoundStats]) -> float:
    """Of these rounds together."""
    return sum(map(_work_bytes, rounds)) / sum(map(duration_ms, rounds))
