"""The courses of the campaign: which acts and records come, in which order, and who is alive then.

Written down by hand, because it says what the tables of the state machines do not: which processes
there are at each moment. `test_points.py` holds it against the tables: every act and every recorded
state of both machines is in a course or in `NOT_REACHED`, and the plain course is what the tables
do when nothing fails. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.faults.points import WHOLE, Course, Deed, Side, Span, Victim

Lives = Mapping[Victim, Mapping[Side, tuple[Span, ...]]]

PHASES: Final = ("copy", "prepare", "standstill", "handover", "after", "undo", "doubt")

PLAIN_WAYS: Final[Mapping[Side, tuple[tuple[str, str], ...]]] = {
    "source": (
        ("run_preflight", "copy"),
        ("enter_precopy", "copy"),
        ("open_session", "copy"),
        ("copy_rootfs", "copy"),
        ("run_round", "copy"),
        ("prepare_target", "prepare"),
        ("enter_frozen", "prepare"),
        ("freeze_and_dump", "standstill"),
        ("send_final", "standstill"),
        ("request_restore", "standstill"),
        ("record_commit", "handover"),
        ("send_commit", "handover"),
        ("enter_releasing", "after"),
        ("release", "after"),
        ("enter_done", "after"),
        ("report_done", "after"),
    ),
    "target": (
        ("enter_receiving", "copy"),
        ("receive", "copy"),
        ("tell_opened", "copy"),
        ("prepare", "prepare"),
        ("enter_prepared", "prepare"),
        ("tell_prepared", "prepare"),
        ("restore", "standstill"),
        ("tell_held", "handover"),
        ("record_commit", "handover"),
        ("resume", "handover"),
        ("enter_running", "after"),
        ("tell_running", "after"),
        ("fill", "after"),
        ("enter_done", "after"),
        ("tell_filled", "after"),
        ("clean_up", "after"),
    ),
}


def _both(source: Span | None, target: Span | None, *victims: Victim) -> Lives:
    """The same lifetime of several, on each side."""
    return _each((source,) if source else (), (target,) if target else (), *victims)


def _each(source: tuple[Span, ...], target: tuple[Span, ...], *victims: Victim) -> Lives:
    """The same, with gaps."""
    return {victim: {"source": source, "target": target} for victim in victims}


# Who holds something on the source, and on the target.
CRIU_DUMPERS: Final = (Victim.SOURCE_RUNC, Victim.SOURCE_CRIU)
DUMPERS: Final = (Victim.GUARD, *CRIU_DUMPERS)
RESTORERS: Final = (Victim.TARGET_RUNC, Victim.TARGET_CRIU)
PAGERS: Final = (Victim.PAGER_WORKER, Victim.PAGER_KEEPER)

PLAIN: Final = Course(
    name="",
    ways=PLAIN_WAYS,
    lives={
        # It waits for the end of the fill.
        **_both(WHOLE, ("", "tell_filled.before"), Victim.COORDINATOR),
        **_both(WHOLE, WHOLE, Victim.AGENT, Victim.FRONT),
        **_both(("run_preflight.after", ""), ("", "tell_filled.after"), Victim.LINK),
        **_both(
            ("open_session.after", "enter_done.before"),
            ("prepare.before", "tell_filled.before"),
            Victim.CONNECTIONS,
        ),
        # After a word to the peer everything goes on, whether its sender waits or not: when COMMIT
        # was sent the dump is soon released, and when Held was sent the copy may soon run.
        **_each(
            (
                ("prepare_target.after", "send_commit.before"),
                ("enter_releasing.before", "release.before"),
            ),
            (
                ("tell_prepared.before", "tell_held.before"),
                ("record_commit.before", "tell_running.before"),
            ),
            *DUMPERS,
        ),
        **_each(
            (("enter_frozen.before", "send_commit.before"),),
            (("prepare.after", "tell_held.before"), ("record_commit.before", "resume.before")),
            *RESTORERS,
            *PAGERS,
        ),
    },
)

# The memory of the campaign's container is filled in milliseconds: here its pager is suspended, so
# that there is a fill that something can happen to.
FILLING: Final = Course(
    name="filling",
    steps=(("target.resume.before", Deed.STOP_PAGER),),
    ways={
        "target": (
            ("enter_running", "after"),
            ("tell_running", "after"),
            ("fill", "after"),
        )
    },
    lives=_both(
        None,
        ("enter_running.before", "fill.before"),
        *(Victim.COORDINATOR, Victim.AGENT, Victim.LINK, Victim.CONNECTIONS, *PAGERS),
    ),
)

UNDO_SOURCE: Final = (
    ("enter_rolling_back", "undo"),
    ("rollback", "undo"),
    ("enter_aborted", "undo"),
    ("report_aborted", "undo"),
)
UNDO_TARGET: Final = (("discard", "undo"), ("enter_aborted", "undo"), ("tell_aborted", "undo"))
# Until the rollback the source's processes are as they were, until the discard the target's.
_UNTIL_ROLLBACK: Final = ("", "rollback.before")
_UNTIL_DISCARD: Final = ("", "discard.before")


def _cancelled(name: str, at: str, *held: Victim) -> Course:
    """The user cancels; the target hears of it in the end of the rollback."""
    return Course(
        name=name,
        steps=((at, Deed.INTERRUPT),),
        ways={"source": UNDO_SOURCE, "target": UNDO_TARGET},
        lives={
            **_both(WHOLE, None, Victim.COORDINATOR),
            **_both(WHOLE, WHOLE, Victim.AGENT),
            **_both(_UNTIL_ROLLBACK, None, Victim.LINK, Victim.CONNECTIONS),
            **_both(_UNTIL_ROLLBACK, None, *(one for one in held if one in DUMPERS)),
            **_both(_UNTIL_ROLLBACK, _UNTIL_DISCARD, *(one for one in held if one not in DUMPERS)),
        },
    )


CANCELLED: Final = (
    _cancelled("cancelled-copying", "source.run_round.before"),
    _cancelled("cancelled-frozen", "source.freeze_and_dump.after", *DUMPERS, *RESTORERS, *PAGERS),
    _cancelled("cancelled-held", "source.record_commit.before", *DUMPERS, *RESTORERS, *PAGERS),
)

# The source's agent recovers, and tells the target, which has no copy yet.
ABANDONED: Final = Course(
    name="coordinator-lost-copying",
    steps=(("source.run_round.before", Victim.COORDINATOR),),
    ways={"source": UNDO_SOURCE, "target": UNDO_TARGET},
    lives={
        **_both(WHOLE, WHOLE, Victim.AGENT, Victim.SOURCE_AGENT),
        **_both(_UNTIL_ROLLBACK, ("", "discard.after"), Victim.LINK),
    },
)

ORPHANED: Final = (
    # The source gave its container back: the target's copy must go.
    Course(
        name="coordinator-lost-held",
        steps=(("source.record_commit.before", Victim.COORDINATOR),),
        ways={"source": UNDO_SOURCE, "target": (("ask_source", "doubt"), *UNDO_TARGET)},
        lives={
            **_both(WHOLE, WHOLE, Victim.AGENT, Victim.SOURCE_AGENT),
            **_both(_UNTIL_ROLLBACK, ("", "ask_source.after"), Victim.LINK),
            # The answer comes at once, and ends the copy.
            **_both(None, ("", "ask_source.before"), *RESTORERS, *PAGERS),
        },
    ),
    # The container is the target's: it must go on there.
    Course(
        name="coordinator-lost-committed",
        steps=(("source.record_commit.after", Victim.COORDINATOR),),
        ways={
            "source": (
                ("ask_target", "doubt"),
                ("enter_releasing", "doubt"),
                ("release", "doubt"),
                ("enter_done", "doubt"),
            ),
            "target": (
                ("ask_source", "doubt"),
                ("record_commit", "doubt"),
                ("resume", "doubt"),
                ("enter_running", "doubt"),
            ),
        },
        lives={
            **_both(WHOLE, WHOLE, Victim.AGENT, Victim.SOURCE_AGENT),
            **_both(("", "ask_target.after"), ("", "record_commit.before"), Victim.LINK),
            # The guard has seen that it is committed, and left it to the recovery.
            **_both(("", "release.before"), ("", "resume.before"), *CRIU_DUMPERS),
            # The source's agent may have told the target already.
            **_both(None, ("", "resume.before"), *RESTORERS, *PAGERS),
        },
    ),
)

RESTARTED: Final = (
    Course(
        name="agent-lost-held",
        steps=(("source.send_commit.before", Victim.AGENT),),
        ways={"target": (("check_copy", "doubt"), ("ask_source", "doubt"))},
        lives={
            **_both(None, WHOLE, Victim.COORDINATOR, Victim.AGENT, Victim.LINK),
            **_both(None, WHOLE, *DUMPERS, *RESTORERS, *PAGERS),
        },
    ),
    Course(
        name="agent-lost-committed",
        steps=(("target.record_commit.after", Victim.AGENT),),
        ways={"target": (("resume", "doubt"), ("enter_running", "doubt"))},
        lives={
            **_both(None, WHOLE, Victim.COORDINATOR, Victim.AGENT, Victim.LINK),
            # A holder lets a committed copy go when the agent is dead, before the next one comes.
            **_both(None, ("", "resume.before"), *DUMPERS),
        },
    ),
)

SILENCED: Final = (
    Course(
        name="link-lost-committed",
        steps=(("source.record_commit.after", Victim.LINK),),
        ways={"source": (("ask_target", "doubt"),), "target": (("ask_source", "doubt"),)},
        lives=_both(
            WHOLE,
            WHOLE,
            *(Victim.COORDINATOR, Victim.AGENT, *DUMPERS, *RESTORERS, *PAGERS),
        ),
    ),
    Course(
        name="link-back-committed",
        steps=(
            ("source.record_commit.after", Victim.LINK),
            ("source.ask_target.before", Deed.MEND_LINK),
        ),
        ways={"source": (("tell_state", "doubt"),), "target": (("tell_state", "doubt"),)},
        lives=_both(WHOLE, WHOLE, Victim.COORDINATOR, Victim.AGENT, Victim.LINK),
    ),
)

# The target holds the copy and can't take it over: both sides hold, until it can.
UNRECORDED: Final = Course(
    name="target-unrecorded",
    steps=(("target.record_commit.before", Deed.LOCK_JOURNAL),),
    ways={
        "source": (("hold", "doubt"),),
        "target": (("tell_failed", "doubt"), ("hold", "doubt")),
    },
    lives={
        **_both(WHOLE, WHOLE, Victim.COORDINATOR, Victim.AGENT),
        **_both(WHOLE, WHOLE, *DUMPERS, *RESTORERS, *PAGERS),
    },
)

COURSES: Final = (
    *(PLAIN, FILLING, *CANCELLED, ABANDONED, *ORPHANED),
    *(*RESTARTED, *SILENCED, UNRECORDED),
)

NOT_REACHED: Final[Mapping[tuple[Side, str], str]] = {}
"""What is in no course, with the reason."""
