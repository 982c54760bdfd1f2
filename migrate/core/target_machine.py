"""The target's side of a migration as a table. Everything that affects transitions lives in here.

`step(state, event) -> (state, actions)` is pure. The agent's session carries out the actions and
feeds the events; it decides nothing. A pair without a row raises `InvalidTransition`: the peer's
message is refused and the state stays.

The transitions that change the state ("failure" = abort_received, act_failed, copy_lost,
deadline_passed, link_lost; the text is generated from the table):

OPEN          -> ABORTING      failure
OPEN          -> RECEIVING     session_accepted
RECEIVING     -> ABORTING      failure
RECEIVING     -> PREPARED      prepared
PREPARED      -> ABORTING      failure
PREPARED      -> RESTORING     restore_asked
RESTORING     -> ABORTING      failure
RESTORING     -> HELD          criu_held
HELD          -> ABORTING      abort_received, copy_lost, source_says_aborted
HELD          -> COMMITTED     commit_recorded
HELD          -> IN_DOUBT      act_failed, deadline_passed, link_lost
IN_DOUBT      -> ABORTING      abort_received, copy_lost, source_says_aborted
IN_DOUBT      -> COMMITTED     commit_recorded
IN_DOUBT      -> HELD          commit_received, source_says_committed
COMMITTED     -> ABORTING      copy_lost
COMMITTED     -> RUNNING       resumed
RUNNING       -> DONE          fill_done
ABORTING      -> ABORTED       discarded

RESUME comes with a recorded COMMIT and with nothing else. A copy that is held is killed by the
source's word alone (ABORT_RECEIVED, SOURCE_SAYS_ABORTED); COPY_LOST means that it is dead already
and has executed nothing. Otherwise it waits, and asks. An operator's word is
given as the source's (SOURCE_SAYS_COMMITTED, SOURCE_SAYS_ABORTED).

What the journal must hold (`RECORDED`, and COMMITTED by its own action): before the actions that
come with a state in `RECORDED` are carried out, the state is appended and synced. HELD needs no
record: PREPARED, recorded while the container still runs on the source, replays as "perhaps held".
ABORTED is entered only by DISCARDED, so the source hears it after the copy is dead and after that
is in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from migrate.core.actions import TargetAction as A
from migrate.core.events import TargetEvent
from migrate.core.events import TargetEventKind as E
from migrate.core.states import TargetState as S
from migrate.core.table import Machine, Verdict, followers, ignored, merge_rows
from migrate.errors import InvalidTransition

TargetTable: TypeAlias = Mapping[tuple[S, E], tuple[S, tuple[A, ...]]]

FAILURES: Final = frozenset(
    {E.ABORT_RECEIVED, E.LINK_LOST, E.ACT_FAILED, E.DEADLINE_PASSED, E.COPY_LOST}
)
"""Whatever ends a session that holds nothing yet."""

UNHELD: Final = (S.OPEN, S.RECEIVING, S.PREPARED, S.RESTORING)
"""States in which the source cannot have committed, because it never heard HELD."""

TABLE: Final[TargetTable] = merge_rows(
    # The way of a session without faults.
    {
        (S.OPEN, E.SESSION_ACCEPTED): (S.RECEIVING, (A.RECEIVE, A.TELL_OPENED)),
        (S.RECEIVING, E.PREPARE_ASKED): (S.RECEIVING, (A.PREPARE,)),
        (S.RECEIVING, E.PREPARED): (S.PREPARED, (A.TELL_PREPARED,)),
        (S.PREPARED, E.RESTORE_ASKED): (S.RESTORING, (A.RESTORE,)),
        (S.RESTORING, E.CRIU_HELD): (S.HELD, (A.TELL_HELD,)),
        (S.HELD, E.COMMIT_RECEIVED): (S.HELD, (A.RECORD_COMMIT,)),
        (S.HELD, E.COMMIT_RECORDED): (S.COMMITTED, (A.RESUME,)),
        (S.COMMITTED, E.RESUMED): (S.RUNNING, (A.TELL_RUNNING, A.FILL)),
        (S.RUNNING, E.FILL_DONE): (S.DONE, (A.TELL_FILLED, A.CLEAN_UP)),
    },
    # Nothing is held yet: every failure ends in nothing left here.
    {
        (state, kind): (
            S.ABORTING,
            (A.DISCARD,) if kind is E.ABORT_RECEIVED else (A.TELL_FAILED, A.DISCARD),
        )
        for state in UNHELD
        for kind in FAILURES
    },
    # Held: only the source's word, or the copy's own death, ends it.
    {
        (S.HELD, E.ABORT_RECEIVED): (S.ABORTING, (A.DISCARD,)),
        (S.HELD, E.COPY_LOST): (S.ABORTING, (A.TELL_FAILED, A.DISCARD)),
        (S.HELD, E.LINK_LOST): (S.IN_DOUBT, (A.ASK_SOURCE,)),
        (S.HELD, E.DEADLINE_PASSED): (S.IN_DOUBT, (A.ASK_SOURCE,)),
        # The commit could not be recorded. The source goes on to hold too, and asks again.
        (S.HELD, E.ACT_FAILED): (S.IN_DOUBT, (A.TELL_FAILED, A.HOLD)),
        (S.HELD, E.SOURCE_SAYS_COMMITTED): (S.HELD, (A.RECORD_COMMIT,)),
        (S.HELD, E.SOURCE_SAYS_ABORTED): (S.ABORTING, (A.DISCARD,)),
        (S.IN_DOUBT, E.COMMIT_RECEIVED): (S.HELD, (A.RECORD_COMMIT,)),
        (S.IN_DOUBT, E.SOURCE_SAYS_COMMITTED): (S.HELD, (A.RECORD_COMMIT,)),
        (S.IN_DOUBT, E.COMMIT_RECORDED): (S.COMMITTED, (A.RESUME,)),
        (S.IN_DOUBT, E.ABORT_RECEIVED): (S.ABORTING, (A.DISCARD,)),
        (S.IN_DOUBT, E.SOURCE_SAYS_ABORTED): (S.ABORTING, (A.DISCARD,)),
        (S.IN_DOUBT, E.COPY_LOST): (S.ABORTING, (A.TELL_FAILED, A.DISCARD)),
        (S.IN_DOUBT, E.LINK_BACK): (S.IN_DOUBT, (A.ASK_SOURCE,)),
        (S.IN_DOUBT, E.DEADLINE_PASSED): (S.IN_DOUBT, (A.ASK_SOURCE, A.HOLD)),
        (S.IN_DOUBT, E.ACT_FAILED): (S.IN_DOUBT, (A.HOLD,)),
    },
    ignored((S.HELD, S.IN_DOUBT), (E.SOURCE_UNDECIDED,)),
    ignored((S.HELD,), (E.LINK_BACK,)),
    ignored((S.IN_DOUBT,), (E.LINK_LOST,)),
    # Committed: resume, whatever the link does. A second COMMIT changes nothing.
    {
        (S.COMMITTED, E.COPY_LOST): (S.ABORTING, (A.TELL_FAILED, A.DISCARD)),
        # Nobody can say whether it executed something: neither side may guess.
        (S.COMMITTED, E.ACT_FAILED): (S.COMMITTED, (A.TELL_FAILED, A.HOLD)),
        (S.COMMITTED, E.DEADLINE_PASSED): (S.COMMITTED, (A.HOLD,)),
        (S.RUNNING, E.COMMIT_RECEIVED): (S.RUNNING, (A.TELL_RUNNING,)),
        (S.DONE, E.COMMIT_RECEIVED): (S.DONE, (A.TELL_RUNNING,)),
        (S.RUNNING, E.LINK_BACK): (S.RUNNING, (A.TELL_RUNNING,)),
        (S.DONE, E.LINK_BACK): (S.DONE, (A.TELL_RUNNING,)),
        (S.RUNNING, E.ACT_FAILED): (S.RUNNING, (A.TELL_FAILED, A.HOLD)),
        (S.RUNNING, E.DEADLINE_PASSED): (S.RUNNING, (A.HOLD,)),
    },
    ignored((S.COMMITTED,), (E.COMMIT_RECEIVED, E.LINK_BACK)),
    ignored(
        (S.COMMITTED, S.RUNNING, S.DONE),
        (E.COMMIT_RECORDED, E.LINK_LOST, E.SOURCE_SAYS_COMMITTED, E.SOURCE_UNDECIDED),
    ),
    # The end of a session that leaves nothing. A COMMIT is refused by saying so.
    {
        (S.ABORTING, E.DISCARDED): (S.ABORTED, (A.TELL_ABORTED,)),
        (S.ABORTING, E.ACT_FAILED): (S.ABORTING, (A.HOLD,)),
        (S.ABORTING, E.DEADLINE_PASSED): (S.ABORTING, (A.HOLD,)),
        (S.ABORTED, E.COMMIT_RECEIVED): (S.ABORTED, (A.TELL_ABORTED,)),
        (S.ABORTED, E.SOURCE_SAYS_COMMITTED): (S.ABORTED, (A.TELL_ABORTED,)),
        (S.ABORTED, E.LINK_BACK): (S.ABORTED, (A.TELL_ABORTED,)),
    },
    ignored((S.ABORTING,), (E.COMMIT_RECEIVED, E.SOURCE_SAYS_COMMITTED, E.LINK_BACK)),
    ignored(
        (S.ABORTING, S.ABORTED),
        (
            E.ABORT_RECEIVED,
            E.SOURCE_SAYS_ABORTED,
            E.SOURCE_UNDECIDED,
            E.LINK_LOST,
            E.COPY_LOST,
            # Acts and messages that the abort has overtaken.
            E.PREPARE_ASKED,
            E.PREPARED,
            E.RESTORE_ASKED,
            E.CRIU_HELD,
            E.COMMIT_RECORDED,
        ),
    ),
    ignored((S.DONE, S.ABORTED), (E.ACT_FAILED, E.DEADLINE_PASSED)),
    # The source may ask at any time, also long after the end: the journal knows the answer.
    {(state, E.SOURCE_ASKS): (state, (A.TELL_STATE,)) for state in S},
)

RECORDED: Final = frozenset({S.RECEIVING, S.PREPARED, S.RUNNING, S.DONE, S.ABORTED})
"""States that are in the journal, synced, before the actions that come with them are carried out.
COMMITTED is not among them: RECORD_COMMIT writes it before it is entered."""

MAY_FOLLOW: Final = followers(TABLE, RECORDED | {S.COMMITTED}, S.OPEN)
"""Last record -> the records that may be appended behind it; the journal refuses any other. So a
commit that was decided before a rollback and is written after it does not get into the journal, nor
does one of a process that a recovery has overtaken."""

RECOVERY: Final[Mapping[S, tuple[S, tuple[A, ...]]]] = {
    S.OPEN: (S.ABORTING, (A.DISCARD,)),
    S.RECEIVING: (S.ABORTING, (A.DISCARD,)),
    S.PREPARED: (S.IN_DOUBT, (A.CHECK_COPY, A.ASK_SOURCE)),
    S.RESTORING: (S.IN_DOUBT, (A.CHECK_COPY, A.ASK_SOURCE)),
    S.HELD: (S.IN_DOUBT, (A.CHECK_COPY, A.ASK_SOURCE)),
    S.IN_DOUBT: (S.IN_DOUBT, (A.CHECK_COPY, A.ASK_SOURCE)),
    S.COMMITTED: (S.COMMITTED, (A.RESUME,)),
    S.RUNNING: (S.RUNNING, (A.TELL_RUNNING, A.FILL)),
    S.DONE: (S.DONE, ()),
    S.ABORTING: (S.ABORTING, (A.DISCARD,)),
    S.ABORTED: (S.ABORTED, ()),
}
"""Last recorded state -> where a new process goes on, and with what."""

VERDICTS: Final[Mapping[S, Verdict]] = {
    S.OPEN: Verdict.HOLD,
    S.RECEIVING: Verdict.HOLD,
    S.PREPARED: Verdict.HOLD,
    S.RESTORING: Verdict.HOLD,
    S.HELD: Verdict.HOLD,
    S.IN_DOUBT: Verdict.HOLD,
    S.COMMITTED: Verdict.LET_GO,
    S.RUNNING: Verdict.LET_GO,
    S.DONE: Verdict.LET_GO,
    S.ABORTING: Verdict.UNDO,
    S.ABORTED: Verdict.UNDO,
}
"""Last recorded state -> what becomes of the held copy when its agent is gone."""


def step(
    state: S, event: TargetEvent, history: Sequence[tuple[S, E]] = ()
) -> tuple[S, tuple[A, ...]]:
    """The state after `event`, and what to do. `history` only appears in `InvalidTransition`."""
    row = TABLE.get((state, event.kind))
    if row is None:
        raise InvalidTransition("target", state, event.kind, history)
    return row


def must_record(before: S, after: S) -> bool:
    """Whether the move from `before` to `after` is appended to the journal before its actions."""
    return after is not before and after in RECORDED


def replay(recorded: Sequence[S]) -> tuple[S, tuple[A, ...]]:
    """Where a new process goes on after a crash, from the recorded states, oldest first."""
    return RECOVERY[recorded[-1] if recorded else S.OPEN]


def machine(state: S = S.OPEN) -> Machine[S, E, A]:
    """A holder of the state and its history, for the agent's session."""
    return Machine("target", TABLE, state)
