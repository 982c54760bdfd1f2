"""The campaign's document: it counts right, and hides no failure."""

from __future__ import annotations

import msgspec

from tests.faults.outcome import Outcome
from tests.faults.report import Simulation, render

PASSED = Outcome(
    point="source.record_commit.after.kill-agent",
    side="source",
    phase="handover",
    victim="agent",
    course="",
    ended="target",
    operator=False,
    idle_s=0.5,
    gap_s=0.8,
    settled_s=1.5,
    total_s=3.0,
    exit_code=0,
    problems=(),
)
BACK = msgspec.structs.replace(PASSED, point="b", ended="source", idle_s=0.1)
HELD = msgspec.structs.replace(PASSED, point="c", operator=True, idle_s=30.0)
FAILED = msgspec.structs.replace(PASSED, point="d", problems=("it executes on no host",))
ELSEWHERE = msgspec.structs.replace(
    PASSED, point="e", side="target", phase="undo", victim="link", course="cancelled", idle_s=0.2
)


def document(*outcomes: Outcome, generated: int | None = None) -> str:
    return render(
        outcomes,
        {"kernel": "6.12"},
        Simulation(faults=2, worlds=180_000, walks=60, walk_faults=8),
        len({one.point for one in outcomes}) if generated is None else generated,
        silence_s=7.0,
        alone_s=25.0,
        helped_s=30.0,
        period_ms=30.0,
    )


def test_points_are_counted_by_how_they_ended() -> None:
    text = document(PASSED, BACK, HELD, ELSEWHERE)
    assert "**4 points on 2 courses, 0 failed.**" in text
    assert "| agent | 3 | 1 | 1 | 1 | 0.50 s | 30.00 s | 0 |" in text
    assert "| source | handover | agent | 3 | 1 | 1 | 1 | 0.50 s | 30.00 s | 0 |" in text
    assert "| target | undo | link | 1 | 0 | 1 | 0 | 0.20 s | 0.20 s | 0 |" in text
    assert "Failures" not in text


def test_a_failure_is_counted_and_named_with_what_was_wrong() -> None:
    text = document(PASSED, FAILED)
    assert "**2 points on 1 courses, 1 failed.**" in text
    assert "| agent | 2 | 0 | 1 | 0 | 0.50 s | 0.50 s | 1 |" in text
    assert "- `d`\n  - it executes on no host" in text


def test_a_point_counts_once_and_an_earlier_failure_is_named() -> None:
    again = msgspec.structs.replace(FAILED, problems=())
    text = document(PASSED, FAILED, again)
    assert "**2 points on 1 courses, 0 failed.**" in text
    assert "| agent | 2 | 0 | 2 | 0 | 0.50 s | 0.50 s | 0 |" in text
    assert "1 failures were seen before" in text
    assert "- `d`\n  - it executes on no host" in text


def test_points_that_were_not_carried_out_are_counted() -> None:
    assert "2 of the 3 points that there are were not carried out" in document(PASSED, generated=3)
    assert "not carried out" not in document(PASSED)


def test_nothing_but_failures_has_no_times() -> None:
    assert "| agent | 1 | 0 | 0 | 0 | - | - | 1 |" in document(FAILED)


def test_it_says_what_it_ran_on_and_what_was_simulated() -> None:
    text = document(PASSED)
    assert "| kernel | 6.12 |" in text
    assert "180,000 worlds" in text
    assert "for 7 seconds" in text
    assert "every 30 ms" in text


def test_a_line_says_what_failed() -> None:
    assert PASSED.line().startswith("ok ")
    assert "(operator)" in HELD.line()
    assert FAILED.line().splitlines()[1].strip() == "it executes on no host"
