"""What a move does to the throughput of what is moved. Pure.

answers  ----____________                 ____-----------
             ^ the command begins  ^     ^ they come again
                                   the last before the standstill
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

RECOVERED: Final = 0.9
GROUPED: Final = 5
WINDOW_MS: Final = 50
"""Throughput of less than that is the scheduler's."""


@dataclass(frozen=True, slots=True)
class Around:
    """before_per_s: until the command begins; during_per_s: from there to the standstill, which
    takes gap_ms. recovered_ms: from its end until RECOVERED of what it was before is reached over
    WINDOW_MS; None if that never is."""

    before_per_s: float
    during_per_s: float
    gap_ms: float
    recovered_ms: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """How many answers came in each bin; the move begins begun_ms after the first of them does."""

    bin_ms: int
    begun_ms: float
    answers: list[int]


def curve(answers: Sequence[int], bin_ms: int, begun_ms: float) -> Curve:
    """Coarser than what was counted, for who looks at it."""
    grouped = [sum(answers[at : at + GROUPED]) for at in range(0, len(answers), GROUPED)]
    return Curve(bin_ms * GROUPED, round(begun_ms, 1), grouped)


def around(answers: Sequence[int], bin_ms: int, begun_ms: float) -> Around:
    """Of the answers in each bin, of which the command begins in one. Raises ValueError."""
    begun = int(begun_ms / bin_ms)
    first, last = _longest_silence(answers, begun)
    before, during = answers[:begun], answers[begun:first]
    if not before or not during:
        raise ValueError("there were no answers before the move, or none before its standstill")
    per_s = 1000 / bin_ms
    before_per_s = statistics.fmean(before) * per_s
    window = max(1, WINDOW_MS // bin_ms)
    recovered_ms = None
    for begin in range(last, len(answers) - window + 1):
        if statistics.fmean(answers[begin : begin + window]) * per_s >= RECOVERED * before_per_s:
            recovered_ms = float((begin - last) * bin_ms)
            break
    return Around(
        round(before_per_s, 1),
        round(statistics.fmean(during) * per_s, 1),
        float((last - first) * bin_ms),
        recovered_ms,
    )


def _longest_silence(answers: Sequence[int], since: int) -> tuple[int, int]:
    """[first, last) of the longest run of bins without an answer."""
    best, begin = (since, since), None
    for place in range(since, len(answers)):
        if answers[place]:
            begin = None
            continue
        begin = place if begin is None else begin
        if place + 1 - begin > best[1] - best[0]:
            best = (begin, place + 1)
    return best
