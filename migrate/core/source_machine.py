"""The source's side of a migration as a table. Everything that affects transitions lives in here.

`step(state, event) -> (state, actions)` is pure. The coordinator carries out the actions and feeds
the events; it decides nothing. A pair without a row raises `InvalidTransition`.

The transitions that change the state ("failure" = act_failed, cancelled, deadline_passed,
link_lost, target_aborted, target_failed, target_refused; the text is generated from the table):

NEW           -> ABORTED       cancelled
NEW           -> PREFLIGHT     started
PREFLIGHT     -> ABORTED       act_failed, cancelled, deadline_passed, link_lost,
                               preflight_failed
PREFLIGHT     -> PRECOPY       preflight_passed
PRECOPY       -> PREPARING     converged_now
PRECOPY       -> ROLLING_BACK  failure
PREPARING     -> FROZEN        target_prepared
PREPARING     -> ROLLING_BACK  failure
FROZEN        -> ROLLING_BACK  failure
FROZEN        -> SENDING_FINAL dumped
SENDING_FINAL -> RESTORING     final_sent
SENDING_FINAL -> ROLLING_BACK  failure
RESTORING     -> HELD          target_held
RESTORING     -> ROLLING_BACK  failure
HELD          -> COMMITTED     commit_recorded
HELD          -> ROLLING_BACK  failure
COMMITTED     -> IN_DOUBT      act_failed, deadline_passed, link_lost, target_failed,
                               target_undecided
COMMITTED     -> RELEASING     target_running
COMMITTED     -> ROLLING_BACK  target_aborted
IN_DOUBT      -> COMMITTED     target_held
IN_DOUBT      -> RELEASING     target_running
IN_DOUBT      -> ROLLING_BACK  target_aborted
RELEASING     -> DONE          released
LOST          -> COMMITTED     commit_recorded
LOST          -> ROLLING_BACK  cancelled, target_aborted
ROLLING_BACK  -> ABORTED       rolled_back

What the journal must hold (`RECORDED`, and COMMITTED by its own action): before the actions that
come with a state in `RECORDED` are carried out, the state is appended and synced. The other states
need no record because `replay` would lead to the same place without it; so nothing between the
freeze and the commit waits for a disk. (FROZEN replays like PRECOPY too; its record, written while
the container still runs, tells a person that it was touched.) If a record cannot be written: before
RECORD_COMMIT was asked for, go on (every earlier record replays as a rollback); after it, carry
nothing out and hold.

RECORD_COMMIT is the point at which ownership passes. A rollback that is decided while it is being
written is recorded after it, before anything is undone, and no COMMIT was sent, nor may anybody
else tell the target of one as long as this coordinator lives: it stays safe, and a crash between
the two records leaves a commit that goes forward.

There is one way back after the commit: TARGET_ABORTED. A target says so only after it has recorded
that it has no copy and will refuse any later COMMIT, so the frozen tree here is the only copy that
there is. Without that row a target that loses its held copy (a power failure) before it reads the
COMMIT would leave none.

LOST is its counterpart, and only a recovery enters it: this host went down while the container was
frozen, so its tree here is dead, and nothing was committed. If the target holds a copy, that is the
only one; it is committed to now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from migrate.core.actions import SourceAction as A
from migrate.core.events import SourceEvent
from migrate.core.events import SourceEventKind as E
from migrate.core.states import SourceState as S
from migrate.core.table import Machine, Verdict, followers, ignored, merge_rows
from migrate.errors import InvalidTransition

SourceTable: TypeAlias = Mapping[tuple[S, E], tuple[S, tuple[A, ...]]]

FAILURES: Final = frozenset(
    {
        E.TARGET_REFUSED,
        E.TARGET_FAILED,
        E.TARGET_ABORTED,
        E.LINK_LOST,
        E.ACT_FAILED,
        E.DEADLINE_PASSED,
        E.CANCELLED,
    }
)
"""Whatever ends a migration that is not committed."""

UNDOABLE: Final = (S.PRECOPY, S.PREPARING, S.FROZEN, S.SENDING_FINAL, S.RESTORING, S.HELD)
"""States in which something was touched and the container is still this host's alone."""

LATE: Final = (
    E.SESSION_OPENED,
    E.ROUND_DONE,
    E.CONVERGED_NOW,
    E.TARGET_PREPARED,
    E.DUMPED,
    E.FINAL_SENT,
    E.TARGET_HELD,
    E.COMMIT_RECORDED,
)
"""Good news of acts that a rollback has overtaken."""

TABLE: Final[SourceTable] = merge_rows(
    # The way of a migration without faults.
    {
        (S.NEW, E.STARTED): (S.PREFLIGHT, (A.RUN_PREFLIGHT,)),
        (S.PREFLIGHT, E.PREFLIGHT_PASSED): (S.PRECOPY, (A.OPEN_SESSION,)),
        (S.PRECOPY, E.SESSION_OPENED): (S.PRECOPY, (A.COPY_ROOTFS, A.RUN_ROUND)),
        (S.PRECOPY, E.ROUND_DONE): (S.PRECOPY, (A.RUN_ROUND,)),
        (S.PRECOPY, E.CONVERGED_NOW): (S.PREPARING, (A.PREPARE_TARGET,)),
        (S.PREPARING, E.TARGET_PREPARED): (S.FROZEN, (A.FREEZE_AND_DUMP,)),
        (S.FROZEN, E.DUMPED): (S.SENDING_FINAL, (A.SEND_FINAL,)),
        (S.SENDING_FINAL, E.FINAL_SENT): (S.RESTORING, (A.REQUEST_RESTORE,)),
        (S.RESTORING, E.TARGET_HELD): (S.HELD, (A.RECORD_COMMIT,)),
        (S.HELD, E.COMMIT_RECORDED): (S.COMMITTED, (A.SEND_COMMIT,)),
        (S.COMMITTED, E.TARGET_RUNNING): (S.RELEASING, (A.RELEASE,)),
        (S.RELEASING, E.RELEASED): (S.DONE, (A.REPORT_DONE,)),
    },
    # A round that keeps the rest small while the target prepares asks for nothing further.
    ignored((S.PREPARING,), (E.ROUND_DONE,)),
    ignored((S.HELD,), (E.TARGET_HELD,)),
    # Nothing was touched yet: nothing to undo.
    {
        (S.NEW, E.CANCELLED): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.PREFLIGHT, E.PREFLIGHT_FAILED): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.PREFLIGHT, E.ACT_FAILED): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.PREFLIGHT, E.LINK_LOST): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.PREFLIGHT, E.DEADLINE_PASSED): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.PREFLIGHT, E.CANCELLED): (S.ABORTED, (A.REPORT_ABORTED,)),
    },
    # Before the commit every failure is undone.
    {(state, kind): (S.ROLLING_BACK, (A.ROLLBACK,)) for state in UNDOABLE for kind in FAILURES},
    {
        (S.ROLLING_BACK, E.ROLLED_BACK): (S.ABORTED, (A.REPORT_ABORTED,)),
        (S.ROLLING_BACK, E.ACT_FAILED): (S.ROLLING_BACK, (A.HOLD,)),
        (S.ROLLING_BACK, E.DEADLINE_PASSED): (S.ROLLING_BACK, (A.HOLD,)),
    },
    # Committed: wait for the target to run it. COMMIT may be sent any number of times.
    {
        (S.COMMITTED, E.TARGET_HELD): (S.COMMITTED, (A.SEND_COMMIT,)),
        (S.COMMITTED, E.ACT_FAILED): (S.IN_DOUBT, (A.ASK_TARGET,)),
        (S.COMMITTED, E.LINK_LOST): (S.IN_DOUBT, (A.ASK_TARGET,)),
        (S.COMMITTED, E.DEADLINE_PASSED): (S.IN_DOUBT, (A.ASK_TARGET,)),
        (S.COMMITTED, E.TARGET_UNDECIDED): (S.IN_DOUBT, (A.HOLD,)),
        # It still holds the copy and could not take it over; asked again when it is time to.
        (S.COMMITTED, E.TARGET_FAILED): (S.IN_DOUBT, (A.HOLD,)),
        (S.COMMITTED, E.TARGET_ABORTED): (S.ROLLING_BACK, (A.ROLLBACK,)),
        (S.IN_DOUBT, E.TARGET_HELD): (S.COMMITTED, (A.SEND_COMMIT,)),
        (S.IN_DOUBT, E.TARGET_RUNNING): (S.RELEASING, (A.RELEASE,)),
        (S.IN_DOUBT, E.TARGET_ABORTED): (S.ROLLING_BACK, (A.ROLLBACK,)),
        (S.IN_DOUBT, E.TARGET_UNDECIDED): (S.IN_DOUBT, (A.HOLD,)),
        (S.IN_DOUBT, E.TARGET_FAILED): (S.IN_DOUBT, (A.HOLD,)),
        (S.IN_DOUBT, E.LINK_BACK): (S.IN_DOUBT, (A.ASK_TARGET,)),
        (S.IN_DOUBT, E.DEADLINE_PASSED): (S.IN_DOUBT, (A.ASK_TARGET,)),
    },
    ignored((S.COMMITTED, S.IN_DOUBT), (E.TARGET_COMMITTED,)),
    ignored((S.COMMITTED,), (E.LINK_BACK,)),
    ignored((S.IN_DOUBT,), (E.LINK_LOST, E.ACT_FAILED)),
    # Never committed, and nothing left here to give back: a copy that the target holds may run as
    # soon as the journal says that it is the target's.
    {
        (S.LOST, E.TARGET_HELD): (S.LOST, (A.RECORD_COMMIT,)),
        # An operator has said so there, where this host could not be asked.
        (S.LOST, E.TARGET_COMMITTED): (S.LOST, (A.RECORD_COMMIT,)),
        (S.LOST, E.TARGET_RUNNING): (S.LOST, (A.RECORD_COMMIT,)),
        (S.LOST, E.COMMIT_RECORDED): (S.COMMITTED, (A.SEND_COMMIT,)),
        (S.LOST, E.TARGET_ABORTED): (S.ROLLING_BACK, (A.ROLLBACK,)),
        (S.LOST, E.CANCELLED): (S.ROLLING_BACK, (A.ROLLBACK,)),
        (S.LOST, E.TARGET_UNDECIDED): (S.LOST, (A.HOLD,)),
        (S.LOST, E.TARGET_FAILED): (S.LOST, (A.HOLD,)),
        (S.LOST, E.ACT_FAILED): (S.LOST, (A.HOLD,)),
        (S.LOST, E.LINK_BACK): (S.LOST, (A.ASK_TARGET,)),
        (S.LOST, E.DEADLINE_PASSED): (S.LOST, (A.ASK_TARGET,)),
    },
    ignored((S.LOST,), (E.LINK_LOST,)),
    # It was asked twice, and said twice that it holds.
    ignored((S.COMMITTED, S.IN_DOUBT, S.RELEASING, S.DONE), (E.COMMIT_RECORDED,)),
    # It runs on the target: a tree here that will not die needs the operator.
    {
        (S.RELEASING, E.ACT_FAILED): (S.RELEASING, (A.HOLD,)),
        (S.RELEASING, E.DEADLINE_PASSED): (S.RELEASING, (A.HOLD,)),
    },
    # After the commit the user cannot cancel any more; before it, a rollback is under way already.
    ignored(
        (S.COMMITTED, S.IN_DOUBT, S.RELEASING, S.DONE, S.ROLLING_BACK, S.ABORTED), (E.CANCELLED,)
    ),
    # The target may ask at any time, also long after the end: the journal knows the answer.
    {(state, E.TARGET_ASKS): (state, (A.TELL_STATE,)) for state in S},
    # What arrives late changes nothing.
    ignored(
        (S.ROLLING_BACK, S.ABORTED),
        (*LATE, E.TARGET_ABORTED, E.TARGET_FAILED, E.TARGET_REFUSED, E.TARGET_UNDECIDED),
    ),
    ignored((S.ABORTED,), (E.PREFLIGHT_PASSED, E.PREFLIGHT_FAILED)),
    ignored((S.ABORTED, S.DONE), (E.ACT_FAILED, E.DEADLINE_PASSED)),
    ignored((S.ROLLING_BACK, S.ABORTED, S.RELEASING, S.DONE), (E.LINK_LOST, E.LINK_BACK)),
    ignored((S.RELEASING, S.DONE), (E.TARGET_RUNNING, E.TARGET_HELD, E.TARGET_COMMITTED)),
    ignored((S.RELEASING, S.DONE), (E.TARGET_FAILED, E.TARGET_UNDECIDED)),
)

RECORDED: Final = frozenset({S.PRECOPY, S.FROZEN, S.RELEASING, S.DONE, S.ROLLING_BACK, S.ABORTED})
"""States that are in the journal, synced, before the actions that come with them are carried out.
COMMITTED is not among them: RECORD_COMMIT writes it before it is entered."""

MAY_FOLLOW: Final = followers(TABLE, RECORDED | {S.COMMITTED}, S.NEW)
"""Last record -> the records that may be appended behind it; the journal refuses any other. So a
commit that was decided before a rollback and is written after it does not get into the journal, nor
does one of a process that a recovery has overtaken."""

RECOVERY: Final[dict[S, tuple[S, tuple[A, ...]]]] = {
    S.NEW: (S.ABORTED, (A.REPORT_ABORTED,)),
    S.PREFLIGHT: (S.ABORTED, (A.REPORT_ABORTED,)),
    S.PRECOPY: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.PREPARING: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.FROZEN: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.SENDING_FINAL: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.RESTORING: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.HELD: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.COMMITTED: (S.IN_DOUBT, (A.ASK_TARGET,)),
    S.IN_DOUBT: (S.IN_DOUBT, (A.ASK_TARGET,)),
    S.RELEASING: (S.RELEASING, (A.RELEASE,)),
    S.DONE: (S.DONE, ()),
    S.LOST: (S.LOST, (A.ASK_TARGET,)),
    S.ROLLING_BACK: (S.ROLLING_BACK, (A.ROLLBACK,)),
    S.ABORTED: (S.ABORTED, ()),
}
"""Last recorded state -> where a new process goes on, and with what. A new state that is in
`RECORDED` is recorded first, as always."""

RECOVERY_WITHOUT_TREE: Final = RECOVERY | {S.FROZEN: (S.LOST, (A.ASK_TARGET,))}
"""The same where the container's tasks are gone from this host for good, as after a power failure.
Frozen is the last record until the commit; behind ROLLING_BACK there may be no commit any more."""


VERDICTS: Final[Mapping[S, Verdict]] = {
    S.NEW: Verdict.UNDO,
    S.PREFLIGHT: Verdict.UNDO,
    S.PRECOPY: Verdict.UNDO,
    S.PREPARING: Verdict.UNDO,
    S.FROZEN: Verdict.UNDO,
    S.SENDING_FINAL: Verdict.UNDO,
    S.RESTORING: Verdict.UNDO,
    S.HELD: Verdict.UNDO,
    S.COMMITTED: Verdict.HOLD,
    S.IN_DOUBT: Verdict.HOLD,
    S.RELEASING: Verdict.LET_GO,
    S.DONE: Verdict.LET_GO,
    S.LOST: Verdict.HOLD,
    S.ROLLING_BACK: Verdict.UNDO,
    S.ABORTED: Verdict.UNDO,
}
"""Last recorded state -> what the process that holds the tree does by itself after it has seen the
coordinator end (so that no commit can follow). If the journal cannot be read: hold."""


def step(
    state: S, event: SourceEvent, history: Sequence[tuple[S, E]] = ()
) -> tuple[S, tuple[A, ...]]:
    """The state after `event`, and what to do. `history` only appears in `InvalidTransition`."""
    row = TABLE.get((state, event.kind))
    if row is None:
        raise InvalidTransition("source", state, event.kind, history)
    return row


def must_record(before: S, after: S) -> bool:
    """Whether the move from `before` to `after` is appended to the journal before its actions."""
    return after is not before and after in RECORDED


def replay(recorded: Sequence[S], *, tree_is_gone: bool = False) -> tuple[S, tuple[A, ...]]:
    """Where a new process goes on after a crash, from the recorded states, oldest first."""
    recovery = RECOVERY_WITHOUT_TREE if tree_is_gone else RECOVERY
    return recovery[recorded[-1] if recorded else S.NEW]


def machine(state: S = S.NEW) -> Machine[S, E, A]:
    """A holder of the state and its history, for the coordinator."""
    return Machine("source", TABLE, state)
