"""Points of the campaign: one fault each, at one moment of one way through a migration. Pure.

    source.record_commit.after.kill-agent
    source.rollback.before.kill-guard@cancelled-frozen
    ^side  ^what    ^when  ^fault     ^course

`what` is an act of that side's state machine (`record_commit`), or the record of a state in its
journal (`enter_frozen`). A course is a way through a migration: the plain one, or one that a first
fault leads into, for acts that only a failure asks for. `courses.py` has the courses; the points
are made from them: each moment of a course, before and after, times everybody who is alive then.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, NamedTuple, TypeAlias

Side: TypeAlias = Literal["source", "target"]
SIDES: Final[tuple[Side, ...]] = ("source", "target")
BEFORE: Final = "before"
AFTER: Final = "after"


class Victim(StrEnum):
    """Who is killed with SIGKILL; the link falls silent, connections are reset."""

    COORDINATOR = "coordinator"
    AGENT = "agent"  # the target's
    FRONT = "front"  # the target's agent's
    SOURCE_AGENT = "source-agent"
    GUARD = "guard"
    SOURCE_RUNC = "source-runc"
    SOURCE_CRIU = "source-criu"
    TARGET_RUNC = "target-runc"
    TARGET_CRIU = "target-criu"
    PAGER_WORKER = "pager-worker"
    PAGER_KEEPER = "pager-keeper"
    LINK = "link"
    CONNECTIONS = "connections"

    @property
    def fault(self) -> str:
        """As it is called in the name of a point."""
        if self is Victim.LINK:
            return "cut-link"
        return f"reset-{self}" if self is Victim.CONNECTIONS else f"kill-{self}"


class Deed(StrEnum):
    """What a step of a course does, besides killing somebody."""

    INTERRUPT = "interrupt"  # SIGINT to the command: the user cancels
    MEND_LINK = "mend-link"
    LOCK_JOURNAL = "lock-journal"  # the target's; nothing can be recorded there until the fault
    STOP_PAGER = "stop-pager"  # its worker is suspended until the fault: the fill lasts


class Moment(NamedTuple):
    """A moment of one side's machine."""

    side: Side
    what: str
    when: str

    def __str__(self) -> str:
        return f"{self.side}.{self.what}.{self.when}"


def moment(text: str) -> Moment:
    """The moment of that name. Raises ValueError."""
    side, what, when = text.split(".")
    if side not in SIDES or when not in (BEFORE, AFTER):
        raise ValueError(f"{text!r} is no moment")
    return Moment("source" if side == "source" else "target", what, when)


Span: TypeAlias = tuple[str, str]
"""From "what.when" to "what.when", both included."""
WHOLE: Final[Span] = ("", "")
"""As long as the course lasts on that side."""


@dataclass(frozen=True, eq=False)
class Course:
    """A way through a migration.

    steps: what has to be done to it, and at which moments, to lead it this way; in their order.
    ways: for each side the acts and records that come then, with the phase each belongs to.
    lives: who is alive on this way, for each side from when to when, without a moment or two at
    which that is a matter of luck. The two sides go on beside each other: a lifetime is given in
    the moments of the side on which the point lies.
    """

    name: str
    ways: Mapping[Side, tuple[tuple[str, str], ...]]
    lives: Mapping[Victim, Mapping[Side, tuple[Span, ...]]]
    steps: tuple[tuple[str, Deed | Victim], ...] = ()

    def moments(self, side: Side) -> list[tuple[Moment, str]]:
        """The moments of one side in their order, each with its phase."""
        return [
            (Moment(side, what, when), phase)
            for what, phase in self.ways.get(side, ())
            for when in (BEFORE, AFTER)
        ]

    def alive(self, victim: Victim, side: Side) -> list[tuple[Moment, str]]:
        """The moments of one side at which somebody is alive."""
        moments = self.moments(side)
        names = [f"{at.what}.{at.when}" for at, _ in moments]
        found = []
        for first, last in self.lives.get(victim, {}).get(side, ()):
            begin = names.index(first) if first else 0
            end = names.index(last) if last else len(names) - 1
            found += moments[begin : end + 1]
        return found


@dataclass(frozen=True)
class Point:
    """One fault."""

    course: Course
    moment: Moment
    victim: Victim
    phase: str

    def __str__(self) -> str:
        suffix = f"@{self.course.name}" if self.course.name else ""
        return f"{self.moment}.{self.victim.fault}{suffix}"


def generate(courses: Iterable[Course]) -> list[Point]:
    """Every point of these courses."""
    return [
        Point(course, at, victim, phase)
        for course in courses
        for side in SIDES
        for victim in Victim
        for at, phase in course.alive(victim, side)
    ]


def sample(points: Sequence[Point]) -> list[Point]:
    """A fixed choice that meets every side in every phase, every victim on either side, and every
    course.

    Greedy: next comes the point that brings most that is new, the first of equals, befores and
    afters by turns. So the choice follows from the points alone.
    """
    wanted = set(itertools.chain.from_iterable(map(_brings, points)))
    chosen: list[Point] = []
    for when in itertools.cycle((AFTER, BEFORE)):
        if not wanted:
            break
        turn = [point for point in points if point.moment.when == when]
        best = max(turn, key=lambda point: len(_brings(point) & wanted))
        if found := _brings(best) & wanted:
            chosen.append(best)
            wanted -= found
    return chosen


def _brings(point: Point) -> set[tuple[str, ...]]:
    return {
        ("phase", point.moment.side, point.phase),
        ("victim", point.moment.side, point.victim),
        ("course", point.course.name),
    }


def repeated(points: Iterable[Point]) -> list[str]:
    """Names that more than one point has."""
    return [name for name, count in Counter(map(str, points)).items() if count > 1]
