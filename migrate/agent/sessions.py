"""The sessions of one agent: begun, gone on with, ended, found again.

A session that an agent before this one had is adopted when the agent starts. Where too little is
left for that (the host was started anew), the rest is removed; or, if the copy was committed and
may have run, it waits as *unknown* for an operator.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from migrate import config, heap, recovery
from migrate.agent import remains
from migrate.agent.session import Session
from migrate.agent.workspace import read_request
from migrate.claim import Claim
from migrate.core.events import TargetEventKind as E
from migrate.core.states import TARGET_TERMINAL
from migrate.core.states import TargetState as S
from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from migrate.agent.front_keeper import Front
    from migrate.agent.ticket import Ticket
    from migrate.agent.workspace import Workspace
    from migrate.core import messages
    from migrate.journal import JournalWriter, Migration, Record
    from migrate.runtimes.base import Runtime
    from transport.core.frames import Hello
    from transport.identity import Peer

log = structlog.get_logger()

# Sessions that outlive the agent: a copy that is held, or that runs and is being filled.
HELD = frozenset({S.HELD, S.IN_DOUBT, S.COMMITTED, S.RUNNING})
# Of an earlier attempt, these end with the source's word that it has begun a new one.
ENDABLE = frozenset({S.OPEN, S.RECEIVING, S.PREPARED, S.RESTORING, S.HELD, S.IN_DOUBT})

# Ended sessions whose sources may come back for the last words, some 30 KiB each: as many as are
# served at once. States of earlier ones are in the journal.
ENDED_MAX = config.SESSIONS_MAX


class Sessions:
    """See the module. One event loop; `data` may be set after it was made, before the first one."""

    def __init__(
        self,
        paths: config.HostPaths,
        runtimes: dict[str, Runtime],
        journal: JournalWriter,
        host: str,
    ) -> None:
        self.data: Front | None = None
        # Committed, and nobody knows whether the copy has run before this host went down.
        self.unknown: dict[str, Migration] = {}
        self._paths = paths
        self._runtimes = runtimes
        self._journal = journal
        self._host = host
        self._sessions: dict[str, Session] = {}
        self._running: set[tuple[Session, asyncio.Task[S]]] = set()
        self._claims: dict[str, Claim] = {}

    def __contains__(self, migration_id: str) -> bool:
        return migration_id in self._sessions

    def live(self) -> list[Session]:
        """Those that have not ended."""
        return [
            session
            for session in self._sessions.values()
            if session.driver.state not in TARGET_TERMINAL and not session.ended.is_set()
        ]

    def find(self, migration_id: str, peer: str | None = None) -> Session | None:
        """A session that has not ended, of this peer if one is given. What has ended is in the
        journal."""
        session = self._sessions.get(migration_id)
        if session is None or session.ended.is_set() or peer not in (None, session.peer):
            return None
        return session

    def sink_of(self, hello: Hello, peer: Peer) -> Workspace | None:
        """For the front, in a thread: the directories of the session that a ticket belongs to.

        Raises StreamRefusedError for a ticket that may not be used like this.
        """
        for session in list(self._sessions.values()):
            if session.is_receiving and session.ticket.is_shown_by(hello):
                session.ticket.admit(hello, peer)
                return session.workspace
        return None

    async def begin(
        self, message: messages.OpenSession, peer: str, runtime: Runtime, ticket: Ticket
    ) -> None:
        """Start a session; returns when it takes streams. Raises MigrateError."""
        assert self.data is not None
        session = Session(
            message,
            peer=peer,
            host=self._host,
            paths=self._paths,
            runtime=runtime,
            journal=self._journal,
            data=self.data,
            ticket=ticket,
            first=self._first_of(message, peer),
        )
        task = self._launch(session, session.run)
        either: set[asyncio.Future[Any]] = {session.ready, task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        failure = session.ready.exception() if session.ready.done() else task.exception()
        if isinstance(failure, MigrateError):
            raise failure
        if failure is not None or not session.ready.done():
            raise MigrateError(f"the session could not be started: {failure!r}")

    def _first_of(self, message: messages.OpenSession, peer: str) -> Session | None:
        """The session whose transfer brings this copy too, if another one's does. MigrateError."""
        if not message.copy_of or not message.copy_of.beside:
            return None
        first = self.find(message.copy_of.beside, peer)
        copy_of = first.request.copy_of if first else None
        if not first or not copy_of or copy_of.beside or not first.is_receiving:
            raise MigrateError("there is no transfer for this copy to share any more")
        if copy_of.container != message.copy_of.container:
            raise MigrateError(f"that transfer is of {copy_of.container}")
        return first

    async def adopt_former(self) -> None:
        """Go on with what an agent before this one was at, and remove what it has left."""
        for migration, records in await self._journal.call(lambda journal: journal.unfinished()):
            if migration.role != "target":
                continue
            try:
                await self._adopt(migration, records)
            except (MigrateError, OSError, KeyError, ValueError) as error:
                log.warning("remains stay", migration=migration.migration_id, why=repr(error))

    async def end_former(self, message: messages.OpenSession, peer: str) -> None:
        """End what is here of an earlier attempt of the same source.

        Its coordinator opens no session for a container that it has committed and not heard of
        since, nor beside another one, so a higher attempt is its word that it kept the container.
        Raises MigrateError for an attempt that is not higher.
        """
        newest = await self._journal.call(
            lambda journal: journal.newest_attempt(message.container, peer)
        )
        if message.attempt <= newest:
            raise MigrateError(
                f"{peer} has brought {message.container} here in attempt {newest} already,"
                f" so {message.attempt} is an old one",
                remedy=f"is the clock of {peer} behind, or was its journal replaced?",
            )
        for session in self.live():
            request = session.request
            is_former = (request.container, session.peer) == (message.container, peer)
            if is_former and session.driver.state in ENDABLE:
                await session.driver.post(E.ABORT_RECEIVED)
                try:
                    async with asyncio.timeout(config.UNDO_DEADLINE_S):
                        await session.ended.wait()
                except TimeoutError as error:
                    raise MigrateError(
                        f"what is held here of {request.container} does not end"
                    ) from error
        for migration in list(self.unknown.values()):
            if (migration.container, migration.peer) == (message.container, peer):
                await self.discard_unknown(migration)

    async def discard_unknown(self, migration: Migration) -> None:
        """Remove what is left of an unknown one: the source has the container. MigrateError."""
        runtime = self._runtimes[migration.runtime]
        await asyncio.to_thread(remains.discard, migration, runtime, self._paths)
        await self._settle(migration, S.ABORTED)

    async def keep_unknown(self, migration: Migration) -> None:
        """The container was this host's: what it has here of files stays."""
        session = self._paths.session(migration.migration_id, "target")
        await asyncio.to_thread(recovery.wipe, session)
        await self._journal.record(migration.migration_id, "target", str(S.RUNNING), "operator")
        await self._settle(migration, S.DONE)

    async def stop(self) -> None:
        """Close the channels: what holds nothing is undone, what holds something stays held."""
        for session in self.live():
            await session.channel.part("the agent stops")
        undoing = [task for session, task in self._running if session.driver.state not in HELD]
        if undoing:
            await asyncio.wait(undoing, timeout=config.STOP_DEADLINE_S)

    async def _adopt(self, migration: Migration, records: list[Record]) -> None:
        runtime = self._runtimes[migration.runtime]
        request = read_request(self._paths.session(migration.migration_id, "target"))
        if request is None or not records or "network" not in migration.facts:
            await self._settle_rest(migration, records[-1].state if records else "", runtime)
            return
        assert self.data is not None
        session = Session.adopt(
            migration,
            request,
            host=self._host,
            paths=self._paths,
            runtime=runtime,
            journal=self._journal,
            data=self.data,
        )
        log.info("session adopted", migration=migration.migration_id, state=records[-1].state)
        recorded = [S(record.state) for record in records]
        self._launch(session, partial(session.go_on, recorded))

    async def _settle_rest(self, migration: Migration, state: str, runtime: Runtime) -> None:
        end = await asyncio.to_thread(remains.settle, migration, state, runtime, self._paths)
        if end is not None:
            await self._settle(migration, end)
            return
        self.unknown[migration.migration_id] = migration
        log.warning(
            "nobody knows whether the container has run here before this host went down",
            migration=migration.migration_id,
            container=migration.container,
            remedy=f"migrate recover {migration.migration_id} --force-source | --force-target",
        )

    async def _settle(self, migration: Migration, state: S) -> None:
        await self._journal.record(migration.migration_id, "target", str(state), "recovered")
        self.unknown.pop(migration.migration_id, None)
        log.info("remains removed", migration=migration.migration_id, state=str(state))

    def _launch(
        self, session: Session, run: Callable[[], Coroutine[Any, Any, S]]
    ) -> asyncio.Task[S]:
        migration_id = session.request.migration_id
        self._claims[migration_id] = Claim.take(self._paths.claim(migration_id, "target"), "agent")
        self._sessions[migration_id] = session
        task = asyncio.create_task(run())
        self._running.add((session, task))
        task.add_done_callback(partial(self._ended, session))
        return task

    def _ended(self, session: Session, task: asyncio.Task[S]) -> None:
        self._running.discard((session, task))
        self._claims.pop(session.request.migration_id).release()
        session.ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session failed", migration=session.request.migration_id, why=repr(error))
        ended = [one for one, other in self._sessions.items() if other.ended.is_set()]
        for migration_id in ended[:-ENDED_MAX]:
            del self._sessions[migration_id]
        if not self.live():
            # With a session under way nobody waits for the heap; then the next end does it.
            heap.give_back()
