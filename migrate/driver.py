"""Drives one state machine: events in, recorded transitions, acts out. The same on both sides.

One queue of events, taken one at a time. A transition that the tables want in the journal is there,
synced, before any of its acts. The acts of one transition run one after another in a task of their
own, so that a long one (a round, the fill) does not keep the machine from hearing the peer; an act
answers by an event, and one that fails by ACT_FAILED, as does a record that can't be written. Acts
that undo things (`overtaking`) first stop and await everything that is still under way. A state
that lasts longer than its deadline is told so, again and again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import structlog

from migrate.errors import InvalidTransition, MigrateError, remedy_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from enum import StrEnum

    from migrate.core.table import Machine

StateT = TypeVar("StateT", bound="StrEnum")
KindT = TypeVar("KindT", bound="StrEnum")
KindOut = TypeVar("KindOut", bound="StrEnum", covariant=True)
ActionT = TypeVar("ActionT", bound="StrEnum")
StateIn = TypeVar("StateIn", bound="StrEnum", contravariant=True)
ActionIn = TypeVar("ActionIn", bound="StrEnum", contravariant=True)

log = structlog.get_logger()

# A peer that sends events faster than the machine takes them is stopped by its own channel: nobody
# reads the next message before the event of the last one is in here.
EVENTS_MAX = 256

# The event of the transition with which a new process goes on.
RECOVERED = "recovered"


@dataclass(frozen=True, slots=True)
class _Posted(Generic[KindT]):
    """An event in the queue. `act` is the task that posted it: an act's, or the timer of a state;
    None for one from outside."""

    kind: KindT
    from_peer: bool
    act: asyncio.Task[Any] | None


class Performer(Protocol[StateIn, KindOut, ActionIn]):
    """Who carries out the acts of a machine."""

    async def perform(self, action: ActionIn) -> KindOut | None:
        """Carry out one act; the event that it answers with, if any. Failures are raised."""

    def failed(self, action: ActionIn | None, error: MigrateError) -> None:
        """Told of an act's failure, before its ACT_FAILED; None: a state could not be recorded."""

    async def record(self, state: StateIn, event: str) -> None:
        """Append the transition to the journal; returns when it is on disk, or need not be. Raises
        MigrateError when the acts behind it must not be carried out."""


class Driver(Generic[StateT, KindT, ActionT]):
    """See the module. `run` ends when the machine is in one of `terminal` and all acts are over."""

    def __init__(
        self,
        machine: Machine[StateT, KindT, ActionT],
        performer: Performer[StateT, KindT, ActionT],
        *,
        must_record: Callable[[StateT, StateT], bool],
        overtaking: frozenset[ActionT],
        terminal: frozenset[StateT],
        act_failed: KindT,
        deadline_passed: KindT,
        deadlines_s: Mapping[StateT, float] = MappingProxyType({}),
        on_state: Callable[[StateT], None] = lambda _: None,
    ) -> None:
        self.machine = machine
        self._performer = performer
        self._must_record = must_record
        self._overtaking = overtaking
        self._terminal = terminal
        self._act_failed = act_failed
        self._deadline_passed = deadline_passed
        self._deadlines_s = deadlines_s
        self._timer: asyncio.Task[None] | None = None
        self._on_state = on_state
        self._events: asyncio.Queue[_Posted[KindT] | None] = asyncio.Queue(EVENTS_MAX)
        self._overtaken: set[asyncio.Task[Any] | None] = set()
        self._settled = machine.state
        self._acts: set[asyncio.Task[None]] = set()
        self._halted: MigrateError | None = None

    @property
    def state(self) -> StateT:
        """The machine's state now."""
        return self.machine.state

    @property
    def settled_state(self) -> StateT:
        """The last state whose record, if it needs one, is on disk: what a peer may be told."""
        return self._settled

    async def post(self, kind: KindT, *, from_peer: bool = False) -> None:
        """Queue an event. One of the peer's that the table has no row for is refused, not fatal."""
        await self._events.put(_Posted(kind, from_peer, None))

    def halt(self, error: MigrateError) -> None:
        """Make `run` raise `error` and leave everything as it is: only the operator can go on."""
        self._halted = error
        self._events.put_nowait(None)

    async def run(self, first: KindT) -> StateT:
        """Feed `first`, then whatever comes, until the end; returns the state there."""
        return await self._until_the_end(self._take(_Posted(first, False, None)))

    async def go_on(self, state: StateT, actions: tuple[ActionT, ...]) -> StateT:
        """Go on where a process before this one has ended, as the machine's `replay` says."""
        return await self._until_the_end(self._recover(state, actions))

    async def _until_the_end(self, beginning: Awaitable[None]) -> StateT:
        try:
            await beginning
            while self.machine.state not in self._terminal or self._acts or self._events.qsize():
                await self._next()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._stop_acts()
        return self.machine.state

    async def _recover(self, state: StateT, actions: tuple[ActionT, ...]) -> None:
        before = self.machine.state
        self.machine.enter(state)
        if await self._enter(before, RECOVERED):
            self._begin(actions)

    async def _next(self) -> None:
        """Wait for an event or, at the end, for the last acts."""
        if self.machine.state in self._terminal and not self._events.qsize():
            await asyncio.wait(self._acts, return_when=asyncio.FIRST_COMPLETED)
            return
        posted = await self._events.get()
        if posted is None:
            assert self._halted is not None
            raise self._halted
        await self._take(posted)

    async def _take(self, posted: _Posted[KindT]) -> None:
        is_late = posted.kind is self._deadline_passed and posted.act not in (None, self._timer)
        if is_late or posted.act in self._overtaken:
            return
        before = self.machine.state
        try:
            actions = self.machine.feed(posted.kind)
        except InvalidTransition as error:
            if not posted.from_peer:
                raise
            log.warning("event refused", state=str(before), why=str(error))
            return
        # Before the record: an act that is still under way must not record behind it.
        if self._overtaking.intersection(actions):
            await self._stop_acts()
        if await self._enter(before, str(posted.kind)):
            self._begin(actions)

    async def _enter(self, before: StateT, event: str) -> bool:
        """Record the state that is entered, if it must be; False when that failed."""
        after = self.machine.state
        if self._must_record(before, after):
            try:
                await self._performer.record(after, event)
            except MigrateError as error:
                self._performer.failed(None, error.at(phase=str(after)))
                await self.post(self._act_failed)
                return False
        self._settled = after
        if after is not before:
            self._on_state(after)
            self._set_deadline(after)
        return True

    def _set_deadline(self, state: StateT) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state in self._deadlines_s:
            self._timer = asyncio.create_task(self._tell_deadlines(self._deadlines_s[state]))

    async def _tell_deadlines(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            # Of this state: one that is heard when the next has been entered counts no more.
            await self._answer(self._deadline_passed)

    def _begin(self, actions: tuple[ActionT, ...]) -> None:
        if actions:
            task = asyncio.create_task(self._perform_all(actions))
            self._acts.add(task)
            task.add_done_callback(self._acts.discard)

    async def _perform_all(self, actions: tuple[ActionT, ...]) -> None:
        for action in actions:
            try:
                answer = await self._performer.perform(action)
            except MigrateError as error:
                await self._fail(action, error)
                return
            except OSError as error:
                # A resource that ran out, mostly: an answer of the system, no fault of the program.
                text = f"{action} failed: {error}"
                await self._fail(action, MigrateError(text, remedy=remedy_of(error)))
                return
            except Exception as error:
                log.exception("act failed", action=str(action))
                await self._fail(action, MigrateError(f"{action}: {type(error).__name__}: {error}"))
                return
            if answer is not None:
                await self._answer(answer)

    async def _fail(self, action: ActionT, error: MigrateError) -> None:
        self._performer.failed(action, error.at(phase=str(self.machine.state)))
        await self._answer(self._act_failed)

    async def _answer(self, kind: KindT) -> None:
        await self._events.put(_Posted(kind, False, asyncio.current_task()))

    async def _stop_acts(self) -> None:
        """Cancel what is under way and wait for it; what it has answered already counts no more."""
        acts = {task for task in self._acts if task is not asyncio.current_task()}
        self._overtaken |= acts
        for task in acts:
            task.cancel()
        if acts:
            await asyncio.wait(acts)


async def quietly(awaitable: Awaitable[object]) -> None:
    """Await a step of an undoing whose failure must not keep the next steps from happening."""
    try:
        await awaitable
    except MigrateError as error:
        log.warning("a step of an undoing failed", why=str(error))
    except Exception:
        log.exception("a step of an undoing failed")
