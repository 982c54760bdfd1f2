"""The campaign leaves nothing out: every act and every record of both state machines is a moment of
some point, and the courses are what the tables do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

import pytest

from migrate.core import source_machine, target_machine
from migrate.core.actions import SourceAction, TargetAction
from migrate.core.events import SourceEventKind, TargetEventKind
from migrate.core.table import Machine
from tests.faults.courses import COURSES, NOT_REACHED, PHASES, PLAIN
from tests.faults.points import AFTER, BEFORE, SIDES, Side, Victim, generate, moment, sample

POINTS = generate(COURSES)
LEAST = 120

S, T = SourceEventKind, TargetEventKind
WITHOUT_FAULTS: dict[Side, tuple[StrEnum, ...]] = {
    "source": (
        *(S.STARTED, S.PREFLIGHT_PASSED, S.SESSION_OPENED, S.CONVERGED_NOW, S.TARGET_PREPARED),
        *(S.DUMPED, S.FINAL_SENT, S.TARGET_HELD, S.COMMIT_RECORDED, S.TARGET_RUNNING, S.RELEASED),
    ),
    "target": (
        *(T.SESSION_ACCEPTED, T.PREPARE_ASKED, T.PREPARED, T.RESTORE_ASKED, T.CRIU_HELD),
        *(T.COMMIT_RECEIVED, T.COMMIT_RECORDED, T.RESUMED, T.FILL_DONE),
    ),
}


def in_the_tables() -> dict[Side, set[str]]:
    """What a point of either side can be at."""
    return {
        "source": {*SourceAction, *(f"enter_{one}" for one in source_machine.RECORDED)},
        "target": {*TargetAction, *(f"enter_{one}" for one in target_machine.RECORDED)},
    }


def without_faults(
    machine: Machine[Any, Any, Any],
    must_record: Callable[[Any, Any], bool],
    events: Iterable[StrEnum],
) -> list[str]:
    """The acts and records of these events, in their order."""
    met: list[str] = []
    for event in events:
        before = machine.state
        actions = machine.feed(event)
        if must_record(before, machine.state):
            met.append(f"enter_{machine.state}")
        met += [str(action) for action in actions]
    return met


@pytest.mark.parametrize("side", SIDES)
def test_every_act_and_record_is_met_before_and_after_or_a_reason_is_given(side: Side) -> None:
    for when in (BEFORE, AFTER):
        met = {
            point.moment.what
            for point in POINTS
            if point.moment.side == side and point.moment.when == when
        }
        excused = {what for one, what in NOT_REACHED if one == side}
        assert met | excused == in_the_tables()[side]
        assert not met & excused
    assert all(NOT_REACHED.values())


def test_the_plain_course_is_what_the_tables_do_without_faults() -> None:
    assert [what for what, _ in PLAIN.ways["source"]] == without_faults(
        source_machine.machine(), source_machine.must_record, WITHOUT_FAULTS["source"]
    )
    assert [what for what, _ in PLAIN.ways["target"]] == without_faults(
        target_machine.machine(), target_machine.must_record, WITHOUT_FAULTS["target"]
    )


def test_there_are_many_points_and_each_has_a_name_of_its_own() -> None:
    assert len(POINTS) >= LEAST
    assert len({str(point) for point in POINTS}) == len(POINTS)
    assert "source.record_commit.after.kill-agent" in map(str, POINTS)


def test_everybody_dies_on_the_way_without_faults() -> None:
    plain = {point.victim for point in POINTS if point.course is PLAIN}
    # The source's agent has no part in it.
    assert plain == set(Victim) - {Victim.SOURCE_AGENT}
    assert {point.victim for point in POINTS} == set(Victim)


def test_steps_lie_at_moments_that_there_are() -> None:
    for course in COURSES:
        for name, _ in course.steps:
            at = moment(name)
            assert at.what in in_the_tables()[at.side], name


def test_phases_are_known() -> None:
    assert {point.phase for point in POINTS} == set(PHASES)


def test_the_sample_meets_every_side_victim_phase_and_course() -> None:
    chosen = sample(POINTS)
    assert len(set(chosen)) == len(chosen) < len(POINTS)
    for seen in (
        lambda point: point.victim,
        lambda point: (point.moment.side, point.phase),
        lambda point: point.course,
        lambda point: point.moment.when,
    ):
        assert {seen(point) for point in chosen} == {seen(point) for point in POINTS}


def test_a_moment_has_a_side_and_a_time() -> None:
    with pytest.raises(ValueError, match="no moment"):
        moment("client.fill.before")
    with pytest.raises(ValueError, match="no moment"):
        moment("target.fill.during")
