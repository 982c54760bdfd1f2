"""The two transition tables: their rows, their rules, and that their pictures show them."""

from __future__ import annotations

import msgspec
import pytest

from migrate.core import source_machine, target_machine
from migrate.core.actions import SourceAction, TargetAction
from migrate.core.confinement import Confinements
from migrate.core.events import (
    SourceEvent,
    SourceEventKind,
    TargetEvent,
    TargetEventKind,
    event_of_source_message,
    event_of_target_message,
    source_reported,
    target_reported,
)
from migrate.core.messages import (
    Abort,
    Ask,
    Commit,
    Failed,
    FillProgress,
    Held,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    Restore,
    Running,
    State,
    WireError,
)
from migrate.core.source_machine import VERDICTS
from migrate.core.states import SOURCE_TERMINAL, TARGET_TERMINAL, SourceState, TargetState
from migrate.core.table import HISTORY_LIMIT, Verdict, diagram, followers, ignored, merge_rows
from migrate.errors import InvalidTransition

S, E, A = SourceState, SourceEventKind, SourceAction
T, F, B = TargetState, TargetEventKind, TargetAction

WAY_OF_THE_SOURCE = [
    (E.STARTED, S.PREFLIGHT, (A.RUN_PREFLIGHT,)),
    (E.PREFLIGHT_PASSED, S.PRECOPY, (A.OPEN_SESSION,)),
    (E.SESSION_OPENED, S.PRECOPY, (A.COPY_ROOTFS, A.RUN_ROUND)),
    (E.ROUND_DONE, S.PRECOPY, (A.RUN_ROUND,)),
    (E.CONVERGED_NOW, S.PREPARING, (A.PREPARE_TARGET,)),
    (E.TARGET_PREPARED, S.FROZEN, (A.FREEZE_AND_DUMP,)),
    (E.DUMPED, S.SENDING_FINAL, (A.SEND_FINAL,)),
    (E.FINAL_SENT, S.RESTORING, (A.REQUEST_RESTORE,)),
    (E.TARGET_HELD, S.HELD, (A.RECORD_COMMIT,)),
    (E.COMMIT_RECORDED, S.COMMITTED, (A.SEND_COMMIT,)),
    (E.TARGET_RUNNING, S.RELEASING, (A.RELEASE,)),
    (E.RELEASED, S.DONE, (A.REPORT_DONE,)),
]
WAY_OF_THE_TARGET = [
    (F.SESSION_ACCEPTED, T.RECEIVING, (B.RECEIVE, B.TELL_OPENED)),
    (F.PREPARE_ASKED, T.RECEIVING, (B.PREPARE,)),
    (F.PREPARED, T.PREPARED, (B.TELL_PREPARED,)),
    (F.RESTORE_ASKED, T.RESTORING, (B.RESTORE,)),
    (F.CRIU_HELD, T.HELD, (B.TELL_HELD,)),
    (F.COMMIT_RECEIVED, T.HELD, (B.RECORD_COMMIT,)),
    (F.COMMIT_RECORDED, T.COMMITTED, (B.RESUME,)),
    (F.RESUMED, T.RUNNING, (B.TELL_RUNNING, B.FILL)),
    (F.FILL_DONE, T.DONE, (B.TELL_FILLED, B.CLEAN_UP)),
]


def test_the_way_of_the_source() -> None:
    state = S.NEW
    for kind, after, actions in WAY_OF_THE_SOURCE:
        assert source_machine.step(state, SourceEvent(kind)) == (after, actions)
        state = after


def test_the_way_of_the_target() -> None:
    state = T.OPEN
    for kind, after, actions in WAY_OF_THE_TARGET:
        assert target_machine.step(state, TargetEvent(kind)) == (after, actions)
        state = after


@pytest.mark.parametrize("state", S)
def test_every_event_of_the_source_has_a_row_or_is_refused(state: SourceState) -> None:
    for kind in E:
        if (state, kind) in source_machine.TABLE:
            row = source_machine.TABLE[state, kind]
            assert source_machine.step(state, SourceEvent(kind)) == row
            continue
        with pytest.raises(InvalidTransition) as caught:
            source_machine.step(state, SourceEvent(kind), ((S.NEW, E.STARTED),))
        assert (caught.value.state, caught.value.event) == (state, kind)
        assert "new -started->" in str(caught.value)


@pytest.mark.parametrize("state", T)
def test_every_event_of_the_target_has_a_row_or_is_refused(state: TargetState) -> None:
    for kind in F:
        if (state, kind) in target_machine.TABLE:
            row = target_machine.TABLE[state, kind]
            assert target_machine.step(state, TargetEvent(kind)) == row
            continue
        with pytest.raises(InvalidTransition):
            target_machine.step(state, TargetEvent(kind))


@pytest.mark.parametrize(
    "state", [S.PRECOPY, S.PREPARING, S.FROZEN, S.SENDING_FINAL, S.RESTORING, S.HELD]
)
def test_every_failure_before_the_commit_is_undone(state: SourceState) -> None:
    failures = [
        E.TARGET_REFUSED,
        E.TARGET_FAILED,
        E.TARGET_ABORTED,
        E.LINK_LOST,
        E.ACT_FAILED,
        E.DEADLINE_PASSED,
        E.CANCELLED,
    ]
    for kind in failures:
        assert source_machine.TABLE[state, kind] == (S.ROLLING_BACK, (A.ROLLBACK,))


@pytest.mark.parametrize("state", [S.COMMITTED, S.IN_DOUBT, S.RELEASING, S.DONE])
def test_cancelling_after_the_commit_does_nothing(state: SourceState) -> None:
    assert source_machine.TABLE[state, E.CANCELLED] == (state, ())


def test_only_a_target_without_a_copy_gives_a_committed_container_back() -> None:
    committed = {S.COMMITTED, S.IN_DOUBT, S.RELEASING, S.DONE}
    back = {
        (state, kind)
        for (state, kind), (after, _) in source_machine.TABLE.items()
        if state in committed and after not in committed
    }
    assert back == {(S.COMMITTED, E.TARGET_ABORTED), (S.IN_DOUBT, E.TARGET_ABORTED)}


def test_the_frozen_tree_is_released_only_when_the_target_runs_it() -> None:
    rows = source_machine.TABLE.items()
    assert {kind for (_, kind), (_, actions) in rows if A.RELEASE in actions} == {E.TARGET_RUNNING}


def test_the_commit_is_sent_only_when_it_is_recorded() -> None:
    for (state, kind), (after, actions) in source_machine.TABLE.items():
        if A.SEND_COMMIT in actions:
            assert after is S.COMMITTED
            assert kind is E.COMMIT_RECORDED or state in {S.COMMITTED, S.IN_DOUBT}


def test_the_target_resumes_only_with_a_recorded_commit() -> None:
    for (_, kind), (after, actions) in target_machine.TABLE.items():
        if B.RESUME in actions:
            assert (kind, after) == (F.COMMIT_RECORDED, T.COMMITTED)
    resuming = {state for state, (_, acts) in target_machine.RECOVERY.items() if B.RESUME in acts}
    assert resuming == {T.COMMITTED}


def test_a_held_copy_is_discarded_only_by_the_word_of_the_source_or_when_it_is_dead() -> None:
    killers = {
        kind
        for (state, kind), (_, actions) in target_machine.TABLE.items()
        if state in {T.HELD, T.IN_DOUBT} and B.DISCARD in actions
    }
    assert killers == {F.ABORT_RECEIVED, F.SOURCE_SAYS_ABORTED, F.COPY_LOST}


def test_a_second_commit_changes_nothing() -> None:
    assert target_machine.TABLE[T.COMMITTED, F.COMMIT_RECEIVED] == (T.COMMITTED, ())
    assert target_machine.TABLE[T.RUNNING, F.COMMIT_RECEIVED] == (T.RUNNING, (B.TELL_RUNNING,))
    assert target_machine.TABLE[T.DONE, F.COMMIT_RECEIVED] == (T.DONE, (B.TELL_RUNNING,))


@pytest.mark.parametrize("state", [T.OPEN, T.RECEIVING, T.PREPARED, T.RESTORING])
def test_a_commit_before_anything_is_held_is_refused(state: TargetState) -> None:
    with pytest.raises(InvalidTransition):
        target_machine.step(state, TargetEvent(F.COMMIT_RECEIVED))


@pytest.mark.parametrize("state", [T.COMMITTED, T.RUNNING, T.DONE])
def test_an_abort_after_the_commit_is_refused(state: TargetState) -> None:
    with pytest.raises(InvalidTransition):
        target_machine.step(state, TargetEvent(F.ABORT_RECEIVED))


def test_nothing_leads_out_of_the_ends() -> None:
    for (state, _), (after, _) in source_machine.TABLE.items():
        assert state not in SOURCE_TERMINAL or after is state
    for (earlier, _), (later, _) in target_machine.TABLE.items():
        assert earlier not in TARGET_TERMINAL or later is earlier


def test_every_state_kind_and_action_is_used() -> None:
    source_rows, target_rows = source_machine.TABLE.items(), target_machine.TABLE.items()
    assert {kind for (_, kind), _ in source_rows} == set(E)
    assert {kind for (_, kind), _ in target_rows} == set(F)
    assert {after for _, (after, _) in source_rows} | {S.NEW} == set(S)
    assert {after for _, (after, _) in target_rows} == set(T)
    assert {action for _, (_, actions) in source_rows for action in actions} == set(A)
    recovering = {action for _, acts in target_machine.RECOVERY.values() for action in acts}
    assert {action for _, (_, actions) in target_rows for action in actions} | recovering == set(B)


def test_diagrams_in_the_docstrings_are_those_of_the_tables() -> None:
    for shown, text in (
        (
            source_machine.__doc__,
            diagram(source_machine.TABLE, S, {"failure": source_machine.FAILURES}),
        ),
        (
            target_machine.__doc__,
            diagram(target_machine.TABLE, T, {"failure": target_machine.FAILURES}),
        ),
    ):
        assert shown is not None
        assert text in shown, f"the docstring should contain\n{text}"
    assert ", ".join(sorted(source_machine.FAILURES)) in " ".join(
        str(source_machine.__doc__).split()
    )
    assert ", ".join(sorted(target_machine.FAILURES)) in " ".join(
        str(target_machine.__doc__).split()
    )


# --- recording and recovery ---


def test_what_is_not_recorded_replays_like_what_was_recorded_before() -> None:
    """Along every edge into a state without a record, recovery is the same on both ends."""
    for (before, _), (after, _) in source_machine.TABLE.items():
        if after not in source_machine.RECORDED | {S.COMMITTED} and before is not after:
            assert source_machine.RECOVERY[after] == source_machine.RECOVERY[before]
    for (earlier, _), (later, _) in target_machine.TABLE.items():
        if (
            later not in target_machine.RECORDED | {T.COMMITTED, T.ABORTING}
            and earlier is not later
        ):
            assert target_machine.RECOVERY[later] == target_machine.RECOVERY[earlier]


def test_an_unrecorded_abort_replays_to_the_same_end() -> None:
    """ABORTING has no record of its own: whatever was recorded before it can abort again."""
    befores = {b for (b, _), (after, _) in target_machine.TABLE.items() if after is T.ABORTING}
    for before in befores - {T.ABORTING}:
        again, _ = target_machine.RECOVERY[before]
        assert again is T.ABORTING or (again, F.COPY_LOST) in target_machine.TABLE


def test_recovery_knows_every_state() -> None:
    assert set(source_machine.RECOVERY) == set(VERDICTS) == set(S)
    assert set(target_machine.RECOVERY) == set(T)


def test_replay_goes_by_the_last_record() -> None:
    assert source_machine.replay([]) == (S.ABORTED, (A.REPORT_ABORTED,))
    assert source_machine.replay([S.PRECOPY, S.FROZEN]) == (S.ROLLING_BACK, (A.ROLLBACK,))
    assert source_machine.replay([S.FROZEN, S.COMMITTED]) == (S.IN_DOUBT, (A.ASK_TARGET,))
    assert target_machine.replay([]) == (T.ABORTING, (B.DISCARD,))
    assert target_machine.replay([T.RECEIVING, T.PREPARED]) == (
        T.IN_DOUBT,
        (B.CHECK_COPY, B.ASK_SOURCE),
    )


def test_the_tree_is_thawed_exactly_where_recovery_rolls_back() -> None:
    for state, verdict in VERDICTS.items():
        after, _ = source_machine.RECOVERY[state]
        assert (verdict is Verdict.UNDO) == (after in {S.ROLLING_BACK, S.ABORTED})
        assert (verdict is Verdict.LET_GO) == (after in {S.RELEASING, S.DONE})


def test_must_record_is_asked_only_for_moves() -> None:
    assert source_machine.must_record(S.PREPARING, S.FROZEN)
    assert not source_machine.must_record(S.ROLLING_BACK, S.ROLLING_BACK)
    assert not source_machine.must_record(S.HELD, S.COMMITTED)
    assert target_machine.must_record(T.RECEIVING, T.PREPARED)
    assert not target_machine.must_record(T.RESTORING, T.HELD)


def test_a_commit_may_follow_only_the_freeze_and_a_prepared_target() -> None:
    assert {last for last, after in source_machine.MAY_FOLLOW.items() if S.COMMITTED in after} == {
        S.FROZEN
    }
    assert {last for last, after in target_machine.MAY_FOLLOW.items() if T.COMMITTED in after} == {
        T.PREPARED
    }


def test_followers_skip_states_without_a_record() -> None:
    table = {
        (S.NEW, E.STARTED): (S.PREFLIGHT, ()),
        (S.PREFLIGHT, E.STARTED): (S.PRECOPY, ()),
        (S.PRECOPY, E.STARTED): (S.DONE, ()),
    }
    follow = followers(table, {S.PRECOPY, S.DONE}, S.NEW)
    assert follow == {S.NEW: {S.PRECOPY}, S.PRECOPY: {S.DONE}, S.DONE: set()}


# --- the holder, and the words of the peer ---


def test_a_machine_that_refuses_stays_as_it_was() -> None:
    machine = source_machine.machine()
    assert machine.feed(E.STARTED) == (A.RUN_PREFLIGHT,)
    assert not machine.allows(E.DUMPED)
    with pytest.raises(InvalidTransition, match="dumped in state preflight"):
        machine.feed(E.DUMPED)
    assert machine.state is S.PREFLIGHT
    assert machine.history == ((S.NEW, E.STARTED),)


def test_history_is_limited() -> None:
    machine = source_machine.machine(S.PRECOPY)
    for _ in range(HISTORY_LIMIT + 10):
        machine.feed(E.ROUND_DONE)
    assert len(machine.history) == HISTORY_LIMIT


def test_merging_refuses_two_rows_for_a_pair() -> None:
    rows = {(S.NEW, E.STARTED): (S.PREFLIGHT, ())}
    with pytest.raises(ValueError, match="two rows"):
        merge_rows(rows, ignored((S.NEW,), (E.STARTED,)))


def test_events_serialise() -> None:
    event = SourceEvent(E.TARGET_FAILED, WireError("no memory", phase="restoring"))
    data = msgspec.json.encode(event)
    assert data == (b'{"kind":"target_failed","cause":{"message":"no memory","phase":"restoring"}}')
    assert msgspec.json.decode(data, type=SourceEvent) == event
    assert msgspec.json.encode(TargetEvent(F.LINK_LOST)) == b'{"kind":"link_lost"}'


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Refused((Refusal("criu-missing", "no CRIU", "install it"),)), E.TARGET_REFUSED),
        (Prepared(), E.TARGET_PREPARED),
        (Held({}), E.TARGET_HELD),
        (Running({}), E.TARGET_RUNNING),
        (Failed(WireError("x")), E.TARGET_FAILED),
        (State("m", 1, "held"), E.TARGET_HELD),
        (State("m", 1, "in_doubt"), E.TARGET_HELD),
        (State("m", 1, "committed"), E.TARGET_COMMITTED),
        (State("m", 1, "running"), E.TARGET_RUNNING),
        (State("m", 1, "done"), E.TARGET_RUNNING),
        (State("m", 1, "aborted"), E.TARGET_ABORTED),
        (State("m", 1, "aborting"), E.TARGET_UNDECIDED),
        (State("m", 1, "prepared"), E.TARGET_UNDECIDED),
        (State("m", 1, "unknown"), E.TARGET_UNDECIDED),
        (Ask("m", 1), E.TARGET_ASKS),
    ],
)
def test_what_a_message_of_the_target_means(message: object, kind: SourceEventKind) -> None:
    event = event_of_target_message(message)  # type: ignore[arg-type]
    assert event is not None
    assert event.kind is kind


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Prepare(("a", "b", "c")), F.PREPARE_ASKED),
        (Restore(b"said", bytes(64), b"who", 0, Confinements((), {})), F.RESTORE_ASKED),
        (Commit("m", 1), F.COMMIT_RECEIVED),
        (Abort("m", 1, "cancelled"), F.ABORT_RECEIVED),
        (Ask("m", 1), F.SOURCE_ASKS),
        (State("m", 1, "committed"), F.SOURCE_SAYS_COMMITTED),
        (State("m", 1, "in_doubt"), F.SOURCE_SAYS_COMMITTED),
        (State("m", 1, "releasing"), F.SOURCE_SAYS_COMMITTED),
        (State("m", 1, "done"), F.SOURCE_SAYS_COMMITTED),
        (State("m", 1, "rolling_back"), F.SOURCE_SAYS_ABORTED),
        (State("m", 1, "aborted"), F.SOURCE_SAYS_ABORTED),
        (State("m", 1, "held"), F.SOURCE_UNDECIDED),
        (State("m", 1, "unknown"), F.SOURCE_UNDECIDED),
    ],
)
def test_what_a_message_of_the_source_means(message: object, kind: TargetEventKind) -> None:
    event = event_of_source_message(message)  # type: ignore[arg-type]
    assert event is not None
    assert event.kind is kind


def test_information_is_no_event() -> None:
    assert event_of_target_message(Pong(1, 2)) is None
    assert event_of_target_message(FillProgress(1, 2)) is None
    assert event_of_source_message(Ping(1)) is None


def test_what_a_state_proves_agrees_with_recovery() -> None:
    """A source that would roll back never says that it has committed, and the reverse."""
    for state in S:
        says = source_reported(state)
        rolls_back = source_machine.RECOVERY[state][0] in {S.ROLLING_BACK, S.ABORTED}
        assert not (says is F.SOURCE_SAYS_COMMITTED and rolls_back)
        assert not (says is F.SOURCE_SAYS_ABORTED and not rolls_back)
    assert target_reported("no such state") is E.TARGET_UNDECIDED
