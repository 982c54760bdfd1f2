"""What can happen to either side of a migration, and which message of the peer means which event.

Events are frozen and serialise, so that a run can be written down and replayed. What an event
means depends on the state; that is in the machines' tables alone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.core.messages import (
    Abort,
    Ask,
    Commit,
    Failed,
    Held,
    Prepare,
    Prepared,
    Refused,
    Restore,
    Running,
    SessionOpened,
    State,
    WireError,
)
from migrate.core.states import SourceState, TargetState

if TYPE_CHECKING:
    from migrate.core.messages import SourceMessage, TargetMessage


class SourceEventKind(StrEnum):
    """What the source's machine is told."""

    STARTED = "started"
    PREFLIGHT_PASSED = "preflight_passed"
    PREFLIGHT_FAILED = "preflight_failed"
    SESSION_OPENED = "session_opened"
    ROUND_DONE = "round_done"  # and another one is worth its cost
    CONVERGED_NOW = "converged_now"  # freeze after this round
    TARGET_PREPARED = "target_prepared"
    DUMPED = "dumped"  # frozen, CRIU's dump is complete and held
    FINAL_SENT = "final_sent"  # every page and image file is acknowledged, rootfs is equal
    COMMIT_RECORDED = "commit_recorded"
    RELEASED = "released"
    ROLLED_BACK = "rolled_back"
    # from the target
    TARGET_REFUSED = "target_refused"
    TARGET_FAILED = "target_failed"
    TARGET_HELD = "target_held"
    TARGET_COMMITTED = "target_committed"  # it has the COMMIT and does not run the copy yet
    TARGET_RUNNING = "target_running"
    TARGET_ABORTED = "target_aborted"  # recorded there: it has no copy and never will
    TARGET_UNDECIDED = "target_undecided"  # any other answer: no evidence for anything
    TARGET_ASKS = "target_asks"
    # from around
    LINK_LOST = "link_lost"
    LINK_BACK = "link_back"
    ACT_FAILED = "act_failed"
    DEADLINE_PASSED = "deadline_passed"  # of the state now; in IN_DOUBT: time to ask again
    CANCELLED = "cancelled"


class TargetEventKind(StrEnum):
    """What the target's machine is told."""

    SESSION_ACCEPTED = "session_accepted"
    PREPARED = "prepared"
    CRIU_HELD = "criu_held"
    COMMIT_RECORDED = "commit_recorded"
    RESUMED = "resumed"
    FILL_DONE = "fill_done"
    DISCARDED = "discarded"  # no copy is left, everything is wiped
    COPY_LOST = "copy_lost"  # the restored copy is dead and never executed an instruction
    # from the source
    PREPARE_ASKED = "prepare_asked"
    RESTORE_ASKED = "restore_asked"
    COMMIT_RECEIVED = "commit_received"
    ABORT_RECEIVED = "abort_received"
    SOURCE_ASKS = "source_asks"
    SOURCE_SAYS_COMMITTED = "source_says_committed"
    SOURCE_SAYS_ABORTED = "source_says_aborted"
    SOURCE_UNDECIDED = "source_undecided"  # any other answer: no evidence for anything
    # from around
    LINK_LOST = "link_lost"
    LINK_BACK = "link_back"
    ACT_FAILED = "act_failed"
    DEADLINE_PASSED = "deadline_passed"  # of the state now; in IN_DOUBT: time to ask again


class SourceEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of the source; `cause` says why where it is a failure."""

    kind: SourceEventKind
    cause: WireError | None = None


class TargetEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of the target; `cause` says why where it is a failure."""

    kind: TargetEventKind
    cause: WireError | None = None


TARGET_STATE_MEANS: Final = {
    TargetState.HELD: SourceEventKind.TARGET_HELD,
    TargetState.IN_DOUBT: SourceEventKind.TARGET_HELD,
    TargetState.COMMITTED: SourceEventKind.TARGET_COMMITTED,
    TargetState.RUNNING: SourceEventKind.TARGET_RUNNING,
    TargetState.DONE: SourceEventKind.TARGET_RUNNING,
    TargetState.ABORTED: SourceEventKind.TARGET_ABORTED,
}
"""What a target's state tells the source. ABORTING is no evidence: its copy may still live. A
target that does not know the migration is none either: it may have lost its journal."""

SOURCE_STATE_MEANS: Final = {
    SourceState.COMMITTED: TargetEventKind.SOURCE_SAYS_COMMITTED,
    SourceState.IN_DOUBT: TargetEventKind.SOURCE_SAYS_COMMITTED,
    SourceState.RELEASING: TargetEventKind.SOURCE_SAYS_COMMITTED,
    SourceState.DONE: TargetEventKind.SOURCE_SAYS_COMMITTED,
    SourceState.ROLLING_BACK: TargetEventKind.SOURCE_SAYS_ABORTED,
    SourceState.ABORTED: TargetEventKind.SOURCE_SAYS_ABORTED,
}
"""What a source's state tells the target. States before the commit decide nothing yet."""


def target_reported(name: str) -> SourceEventKind:
    """The source's event for a state that the target names in its `State` message."""
    known = {state.value: kind for state, kind in TARGET_STATE_MEANS.items()}
    return known.get(name, SourceEventKind.TARGET_UNDECIDED)


def source_reported(name: str) -> TargetEventKind:
    """The target's event for a state that the source names in its `State` message."""
    known = {state.value: kind for state, kind in SOURCE_STATE_MEANS.items()}
    return known.get(name, TargetEventKind.SOURCE_UNDECIDED)


def event_of_target_message(message: TargetMessage) -> SourceEvent | None:
    """The source's event for a message of the target; None for mere information."""
    match message:
        case SessionOpened():
            return SourceEvent(SourceEventKind.SESSION_OPENED)
        case Refused():
            return SourceEvent(SourceEventKind.TARGET_REFUSED)
        case Prepared():
            return SourceEvent(SourceEventKind.TARGET_PREPARED)
        case Held():
            return SourceEvent(SourceEventKind.TARGET_HELD)
        case Running():
            return SourceEvent(SourceEventKind.TARGET_RUNNING)
        case Failed(error=error):
            return SourceEvent(SourceEventKind.TARGET_FAILED, error)
        case State(name=name):
            return SourceEvent(target_reported(name))
        case Ask():
            return SourceEvent(SourceEventKind.TARGET_ASKS)
        case _:
            return None


def event_of_source_message(message: SourceMessage) -> TargetEvent | None:
    """The target's event for a message of the source; None for mere information."""
    match message:
        case Prepare():
            return TargetEvent(TargetEventKind.PREPARE_ASKED)
        case Restore():
            return TargetEvent(TargetEventKind.RESTORE_ASKED)
        case Commit():
            return TargetEvent(TargetEventKind.COMMIT_RECEIVED)
        case Abort():
            return TargetEvent(TargetEventKind.ABORT_RECEIVED)
        case Ask():
            return TargetEvent(TargetEventKind.SOURCE_ASKS)
        case State(name=name):
            return TargetEvent(source_reported(name))
        case _:
            return None
