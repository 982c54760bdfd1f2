"""What became of one point, as it is written down: one JSON line each. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Ended: TypeAlias = Literal["source", "target", "nowhere"]


class Outcome(msgspec.Struct, frozen=True):
    """One point's result.

    ended: where the container executes at the end, seen from this migration. operator: somebody had
    to call `migrate recover`. idle_s: the longest time from the fault on in which the container
    executed nowhere. gap_s: the longest time without an answer that its client saw, from the begin
    of the migration on; the stops that the campaign makes are part of it. settled_s: from the fault
    until nothing was left to do on either host. exit_code: of the command, negative if killed.
    problems: what does not hold; none for a point that passed.
    """

    point: str
    side: str
    phase: str
    victim: str
    course: str
    ended: Ended
    operator: bool
    idle_s: float
    gap_s: float
    settled_s: float
    total_s: float
    exit_code: int | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """For the eyes, while the campaign runs."""
        verdict = "ok    " if self.passed else "FAILED"
        how = f"{self.ended}{' (operator)' if self.operator else ''}"
        head = f"{verdict} {self.total_s:5.1f} s  idle {self.idle_s:5.2f} s  {how:<17} {self.point}"
        return "\n".join([head, *(f"         {problem}" for problem in self.problems)])
