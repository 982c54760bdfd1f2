"""The driver with a small machine and a performer that does as the test says."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Any

import pytest
import structlog

from migrate.core.table import Machine
from migrate.driver import EVENTS_MAX, Driver, quietly
from migrate.errors import InvalidTransition, MigrateError


class S(StrEnum):
    NEW = "new"
    COPYING = "copying"
    READY = "ready"
    UNDOING = "undoing"
    DONE = "done"


class E(StrEnum):
    STARTED = "started"
    COPIED = "copied"
    MORE = "more"
    FINISHED = "finished"
    UNDONE = "undone"
    ACT_FAILED = "act_failed"
    ASKED = "asked"
    LATE = "late"


class A(StrEnum):
    LOOK = "look"
    COPY = "copy"
    FINISH = "finish"
    UNDO = "undo"
    TELL = "tell"


TABLE = {
    (S.NEW, E.STARTED): (S.COPYING, (A.LOOK, A.COPY)),
    (S.COPYING, E.MORE): (S.COPYING, (A.COPY,)),
    (S.COPYING, E.COPIED): (S.READY, (A.FINISH,)),
    (S.READY, E.FINISHED): (S.DONE, ()),
    (S.COPYING, E.ACT_FAILED): (S.UNDOING, (A.UNDO,)),
    (S.READY, E.ACT_FAILED): (S.UNDOING, (A.UNDO,)),
    (S.UNDOING, E.UNDONE): (S.DONE, ()),
    (S.UNDOING, E.COPIED): (S.UNDOING, ()),
    (S.COPYING, E.ASKED): (S.COPYING, (A.TELL,)),
    (S.READY, E.ASKED): (S.READY, (A.TELL,)),
    (S.COPYING, E.LATE): (S.COPYING, (A.TELL,)),
    (S.UNDOING, E.ACT_FAILED): (S.UNDOING, (A.TELL,)),
}
RECORDED = frozenset({S.READY, S.DONE})
GOOD = {A.COPY: E.COPIED, A.FINISH: E.FINISHED, A.UNDO: E.UNDONE}


class Performer:
    """Answers as `answers` says (an event, an error, a coroutine function); keeps what happened."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {**{str(k): v for k, v in GOOD.items()}, **answers}
        self.happened: list[str] = []
        self.begun = {action: asyncio.Event() for action in A}
        self.errors: list[tuple[A | None, MigrateError]] = []
        self.unrecordable: set[S] = set()
        self.record_s = 0.0
        self.driver: Driver[S, E, A] = Driver(
            Machine("test", TABLE, S.NEW),
            self,
            must_record=lambda before, after: after is not before and after in RECORDED,
            overtaking=frozenset({A.UNDO}),
            terminal=frozenset({S.DONE}),
            act_failed=E.ACT_FAILED,
            deadline_passed=E.LATE,
            deadlines_s={S.COPYING: 0.01},
        )

    async def perform(self, action: A) -> E | None:
        self.happened.append(str(action))
        self.begun[action].set()
        answer = self.answers.get(str(action))
        if callable(answer):
            answer = await answer()
        if isinstance(answer, Exception):
            raise answer
        assert answer is None or isinstance(answer, E)
        return answer

    def failed(self, action: A | None, error: MigrateError) -> None:
        self.errors.append((action, error))

    async def record(self, state: S, event: str) -> None:
        self.happened.append(f"[{state} by {event}]")
        await asyncio.sleep(self.record_s)
        if state in self.unrecordable:
            raise MigrateError("the disk is full")
        # Nothing of a state is told before it is on disk.
        assert self.driver.settled_state is not state


async def test_acts_follow_each_other_and_a_record_comes_before_them() -> None:
    performer = Performer()
    assert await performer.driver.run(E.STARTED) is S.DONE
    assert performer.happened == [
        *("look", "copy", "[ready by copied]", "finish", "[done by finished]"),
    ]
    assert performer.driver.settled_state is S.DONE
    assert performer.errors == []


async def test_an_act_that_fails_ends_those_behind_it() -> None:
    performer = Performer(look=MigrateError("no container", host="a"))
    assert await performer.driver.run(E.STARTED) is S.DONE
    assert performer.happened == ["look", "undo", "[done by undone]"]
    ((action, error),) = performer.errors
    assert action is A.LOOK
    assert (error.message, error.host, error.phase) == ("no container", "a", "copying")


async def test_a_failure_that_nobody_foresaw_is_one_too() -> None:
    performer = Performer(copy=ZeroDivisionError("division by zero"))
    with structlog.testing.capture_logs() as logs:
        assert await performer.driver.run(E.STARTED) is S.DONE
    ((action, error),) = performer.errors
    assert action is A.COPY
    assert error.message == "copy: ZeroDivisionError: division by zero"
    assert [log["event"] for log in logs] == ["act failed"]
    assert performer.happened[-2:] == ["undo", "[done by undone]"]


async def test_events_are_taken_while_an_act_is_under_way() -> None:
    released = asyncio.Event()

    async def copy() -> E:
        await released.wait()
        return E.COPIED

    performer = Performer(copy=copy)
    running = asyncio.create_task(performer.driver.run(E.STARTED))
    await performer.begun[A.COPY].wait()
    await performer.driver.post(E.ASKED, from_peer=True)
    await performer.begun[A.TELL].wait()
    released.set()
    assert await running is S.DONE


async def test_undoing_stops_what_is_under_way_and_waits_for_it() -> None:
    ended = False

    async def copy() -> E:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            # It takes a while to end, and nothing may be undone before.
            for _ in range(5):
                await asyncio.sleep(0)
            ended = True
        raise AssertionError

    async def undo() -> E:
        assert ended
        return E.UNDONE

    performer = Performer(copy=copy, undo=undo)
    running = asyncio.create_task(performer.driver.run(E.STARTED))
    await performer.begun[A.COPY].wait()
    await performer.driver.post(E.ACT_FAILED)
    assert await running is S.DONE
    assert performer.happened == ["look", "copy", "undo", "[done by undone]"]
    assert performer.errors == []


async def test_what_an_act_answered_before_it_was_overtaken_counts_no_more() -> None:
    """A round's COPIED is in the queue behind the failure that overtakes it."""
    performer = Performer()

    async def copy() -> E:
        await performer.driver.post(E.ACT_FAILED)
        return E.COPIED

    async def undo() -> E:
        # Were COPIED still taken, the table would have no row for a second one in DONE.
        await asyncio.sleep(0)
        return E.UNDONE

    performer.answers |= {"copy": copy, "undo": undo}
    table_rows = len(performer.driver.machine.history)
    assert await performer.driver.run(E.STARTED) is S.DONE
    kinds = [kind for _, kind in performer.driver.machine.history[table_rows:]]
    assert kinds == [E.STARTED, E.ACT_FAILED, E.UNDONE]


async def test_a_peer_s_event_without_a_row_is_refused() -> None:
    async def copy() -> E:
        await performer.driver.post(E.FINISHED, from_peer=True)
        return E.COPIED

    performer = Performer(copy=copy)
    with structlog.testing.capture_logs() as logs:
        assert await performer.driver.run(E.STARTED) is S.DONE
    assert [(log["event"], log["state"]) for log in logs] == [("event refused", "copying")]


async def test_an_own_event_without_a_row_is_a_mistake() -> None:
    stopped = asyncio.Event()

    async def copy() -> E:
        await performer.driver.post(E.FINISHED)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    performer = Performer(copy=copy)
    with pytest.raises(InvalidTransition, match="finished"):
        await performer.driver.run(E.STARTED)
    assert stopped.is_set()


async def test_a_state_that_lasts_is_told_so_again_and_again() -> None:
    told = 0

    async def tell() -> None:
        nonlocal told
        told += 1
        if told == 3:
            copied.set()

    async def copy() -> E:
        await copied.wait()
        return E.COPIED

    async def finish() -> E:
        # Long enough for the deadline of a state that is over, were it still counted: READY has no
        # row for it.
        await asyncio.sleep(0.05)
        return E.FINISHED

    copied = asyncio.Event()
    performer = Performer(copy=copy, tell=tell, finish=finish)
    assert await performer.driver.run(E.STARTED) is S.DONE
    assert told == 3


async def test_the_deadline_of_a_state_that_is_being_left_counts_no_more() -> None:
    performer = Performer()
    # COPYING's passes some times while READY, which has no row for it, is written down.
    performer.record_s = 0.05
    assert await performer.driver.run(E.STARTED) is S.DONE


async def test_what_can_not_be_recorded_is_not_carried_out() -> None:
    performer = Performer()
    performer.unrecordable = {S.READY}
    assert await performer.driver.run(E.STARTED) is S.DONE
    assert performer.happened == [
        *("look", "copy", "[ready by copied]", "undo", "[done by undone]"),
    ]
    ((action, error),) = performer.errors
    assert action is None
    assert (error.message, error.phase) == ("the disk is full", "ready")


async def test_a_new_process_goes_on_where_the_last_one_ended() -> None:
    performer = Performer()
    performer.driver.machine.enter(S.COPYING)
    assert await performer.driver.go_on(S.READY, (A.FINISH,)) is S.DONE
    assert performer.happened == ["[ready by recovered]", "finish", "[done by finished]"]


async def test_halt_leaves_everything_and_raises() -> None:
    performer = Performer()

    async def copy() -> None:
        performer.driver.halt(MigrateError("only the operator knows"))

    performer.answers["copy"] = copy
    with pytest.raises(MigrateError, match="only the operator knows"):
        await performer.driver.run(E.STARTED)
    assert performer.driver.state is S.COPYING


async def test_the_queue_has_a_limit() -> None:
    performer = Performer()
    for _ in range(EVENTS_MAX):
        await performer.driver.post(E.ASKED, from_peer=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await performer.driver.post(E.ASKED, from_peer=True)


async def test_quietly_lets_an_undoing_go_on() -> None:
    async def fail(error: BaseException) -> None:
        raise error

    with structlog.testing.capture_logs() as logs:
        await quietly(fail(MigrateError("gone", host="b")))
        await quietly(fail(ZeroDivisionError()))
    expected, unforeseen = logs
    assert expected["why"] == "gone (host b)"
    assert "exc_info" not in expected
    assert unforeseen["exc_info"]
    with pytest.raises(asyncio.CancelledError):
        await quietly(fail(asyncio.CancelledError()))
