"""The agent: a daemon that receives containers, by HTTP and WebSockets over mutual TLS 1.3.

    POST /v1/sessions                 OpenSession -> SessionOpened | Refused
    POST /v1/migrations/ID/ROLE       Ask | Commit | Abort -> State      (`peer.py`)
    POST /v1/operator                 Recover -> Standing                (this host itself)
    GET  /v1/sessions/ID/control      WebSocket: the messages of core/messages.py; with ?heard=N it
                                      goes on where the former connection broke
    GET  /v1/sessions/ID/rootfs?pass=N  WebSocket: one pass of rsync
    the data port                     pages and image files (transport.receiver)

A caller is who its certificate says; a session answers only to the host that opened it.

When it starts it goes on with the sessions of the agent before it, and recovers the migrations of
this host whose coordinator is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from migrate import config, peer, preflight, recovery
from migrate.agent import remains
from migrate.agent.custodian import Custodian
from migrate.agent.session import Session, new_ticket
from migrate.agent.workspace import read_request
from migrate.claim import Claim, claimant
from migrate.core import messages
from migrate.core.events import TargetEventKind as E
from migrate.core.events import source_reported
from migrate.core.states import TARGET_TERMINAL
from migrate.core.states import TargetState as S
from migrate.errors import JournalError, MigrateError, ProtocolError
from migrate.facts import free_memory_bytes, host_versions
from migrate.journal import JournalWriter
from migrate.rootfs import CHUNK_BYTES
from transport import tls
from transport.receiver import DataListener

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from migrate.journal import Journal, Migration, Record
    from migrate.runtimes.base import Runtime
    from transport.core.frames import Hello
    from transport.inbound import PageSink

log = structlog.get_logger()

# Sessions that outlive the agent: a copy that is held, or that runs and is being filled.
HELD = frozenset({S.HELD, S.IN_DOUBT, S.COMMITTED, S.RUNNING})

# Of an earlier attempt, these end with the source's word that it has begun a new one.
ENDABLE = frozenset({S.OPEN, S.RECEIVING, S.PREPARED, S.RESTORING, S.HELD, S.IN_DOUBT})
UNDECIDED = frozenset({S.HELD, S.IN_DOUBT})

# What is answered about a migration that this host knows nothing of: no evidence for anything.
UNKNOWN = "unknown"

# ASCII digits alone; nobody makes more passes.
_PASS = re.compile(r"[0-9]{1,6}")

# Ended sessions whose sources may come back for the last words, some 30 KiB each: as many as are
# served at once. States of earlier ones are in the journal.
ENDED_MAX = config.SESSIONS_MAX


class Agent:
    """Sessions of this host. Make it inside the event loop that serves it."""

    def __init__(self, paths: config.HostPaths, runtimes: dict[str, Runtime], address: str) -> None:
        self._paths = paths
        self._runtimes = runtimes
        self._host = socket.gethostname()
        self._sessions: dict[str, Session] = {}
        self._running: set[tuple[Session, asyncio.Task[S]]] = set()
        self._opening = asyncio.Lock()
        self._claims: dict[str, Claim] = {}
        # Committed, and nobody knows whether the copy has run before this host went down.
        self._unknown: dict[str, Migration] = {}
        identity = tls.TlsPaths(paths.tls.ca, paths.tls.certificate, paths.tls.key)
        self._context = tls.server_context(identity)
        self._claim = Claim.take(paths.run / "claims" / "agent", "agent")
        self._journal = JournalWriter(paths.journal)
        self._custodian = Custodian(self._journal, runtimes, paths)
        self._data = DataListener(address, config.DATA_PORT, self._context, self._sink_of)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=messages.MAX_MESSAGE_BYTES)
        app.router.add_post("/v1/sessions", self._open)
        app.router.add_post("/v1/migrations/{id}/{role:source|target}", self._word)
        app.router.add_post("/v1/operator", self._operate)
        app.router.add_get("/v1/sessions/{id}/control", self._control)
        app.router.add_get("/v1/sessions/{id}/rootfs", self._rootfs)
        return app

    async def serve(self, address: str, port: int) -> None:
        """Serve until SIGTERM or SIGINT; sessions that hold nothing yet are undone then."""
        await self._adopt_former()
        custody = asyncio.create_task(self._custodian.run())
        runner = web.AppRunner(self.application(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, address, port, ssl_context=self._context)
        await site.start()
        log.info("agent listens", host=self._host, port=port, data_port=self._data.port)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        custody.cancel()
        await self._end_sessions()
        await runner.cleanup()
        await asyncio.to_thread(self._data.stop)
        self._journal.close()
        self._claim.release()

    async def _end_sessions(self) -> None:
        """Close the channels: what holds nothing is undone, what holds something stays held."""
        for session in self._live():
            await session.channel.part("the agent stops")
        undoing = [task for session, task in self._running if session.driver.state not in HELD]
        if undoing:
            await asyncio.wait(undoing, timeout=config.STOP_DEADLINE_S)

    async def _adopt_former(self) -> None:
        """Go on with what an agent before this one was at, and remove what it has left."""
        for migration, records in await self._journal.call(lambda journal: journal.unfinished()):
            if migration.role != "target":
                continue
            try:
                await self._adopt(migration, records)
            except (MigrateError, OSError, KeyError, ValueError) as error:
                log.warning("remains stay", migration=migration.migration_id, why=repr(error))

    async def _adopt(self, migration: Migration, records: list[Record]) -> None:
        runtime = self._runtimes[migration.runtime]
        request = read_request(self._paths.session(migration.migration_id, "target"))
        if request is None or not records or "network" not in migration.facts:
            state = records[-1].state if records else ""
            end = await asyncio.to_thread(remains.settle, migration, state, runtime, self._paths)
            if end is not None:
                await self._end_unknown(migration, end)
                return
            self._unknown[migration.migration_id] = migration
            log.warning(
                "nobody knows whether the container has run here before this host went down",
                migration=migration.migration_id,
                container=migration.container,
                remedy=f"migrate recover {migration.migration_id} --force-source | --force-target",
            )
            return
        session = Session.adopt(
            migration,
            request,
            host=self._host,
            paths=self._paths,
            runtime=runtime,
            journal=self._journal,
            data=self._data,
        )
        log.info("session adopted", migration=migration.migration_id, state=records[-1].state)
        recorded = [S(record.state) for record in records]
        self._launch(session, partial(session.go_on, recorded))

    async def _end_unknown(self, migration: Migration, state: str) -> None:
        await self._journal.record(migration.migration_id, "target", state, "recovered")
        self._unknown.pop(migration.migration_id, None)
        log.info("remains removed", migration=migration.migration_id, state=state)

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

    async def _open(self, request: web.Request) -> web.Response:
        peer = _peer(request)
        try:
            message = messages.decode_from_source(await request.read())
            if not isinstance(message, messages.OpenSession):
                raise ProtocolError("a session is opened by OpenSession")
            if message.host != peer:
                raise ProtocolError(f"{peer} can't open a session in the name of {message.host}")
        except MigrateError as error:
            log.warning("session refused", peer=peer, why=str(error))
            return _answer(_refused("protocol", error))
        async with self._opening:
            return _answer(await self._admit(message, peer))

    async def _admit(
        self, message: messages.OpenSession, peer: str
    ) -> messages.SessionOpened | messages.Refused:
        runtime = self._runtimes.get(message.runtime)
        if runtime is None:
            error = MigrateError(
                f"{self._host} has no driver for the runtime {message.runtime}",
                remedy=f"one of {', '.join(self._runtimes)}",
            )
            return _refused("runtime-unknown", error)
        if message.migration_id in self._sessions:
            known = f"{self._host} has a session {message.migration_id} already"
            return _refused("session-known", MigrateError(known, remedy="try again"))
        if len(self._live()) >= config.SESSIONS_MAX:
            return _refused("busy", MigrateError(f"{self._host} serves {config.SESSIONS_MAX}"))
        try:
            if not message.dry_run:
                await self._end_former(message, peer, runtime)
        except MigrateError as error:
            return _refused("held", error)
        if any(one.request.container == message.container for one in self._live()):
            taken = MigrateError(f"{message.container} is being received by {self._host} already")
            return _refused("name-taken", taken)
        try:
            refusals = await asyncio.to_thread(
                preflight.check_target, message, runtime, self._paths
            )
        except MigrateError as error:
            return _refused("preflight", error)
        if refusals:
            return messages.Refused(tuple(messages.Refusal(*one) for one in refusals))
        opened = messages.SessionOpened(
            session_id=message.migration_id,
            ticket=new_ticket(),
            data_port=self._data.port,
            host=self._host,
            versions=await asyncio.to_thread(host_versions, runtime),
            free_memory_bytes=free_memory_bytes(),
            cautions=tuple(messages.Caution(*one) for one in preflight.target_cautions(message)),
        )
        if message.dry_run:
            return opened
        return await self._start(message, peer, runtime, opened)

    async def _end_former(self, message: messages.OpenSession, peer: str, runtime: Runtime) -> None:
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
        for session in self._live():
            request = session.request
            if (request.container, session.peer) != (message.container, peer):
                continue
            if session.driver.state in ENDABLE:
                await session.driver.post(E.ABORT_RECEIVED)
                try:
                    async with asyncio.timeout(config.UNDO_DEADLINE_S):
                        await session.ended.wait()
                except TimeoutError as error:
                    raise MigrateError(
                        f"what is held here of {request.container} does not end"
                    ) from error
        for migration in list(self._unknown.values()):
            if (migration.container, migration.peer) == (message.container, peer):
                await asyncio.to_thread(remains.discard, migration, runtime, self._paths)
                await self._end_unknown(migration, str(S.ABORTED))

    async def _start(
        self,
        message: messages.OpenSession,
        peer: str,
        runtime: Runtime,
        opened: messages.SessionOpened,
    ) -> messages.SessionOpened | messages.Refused:
        session = Session(
            message,
            peer=peer,
            host=self._host,
            paths=self._paths,
            runtime=runtime,
            journal=self._journal,
            data=self._data,
            ticket=opened.ticket,
        )
        try:
            task = self._launch(session, session.run)
        except MigrateError as error:
            return _refused("session", error)
        either: set[asyncio.Future[Any]] = {session.ready, task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if session.ready.done() and session.ready.exception() is None:
            return opened
        failure = session.ready.exception() if session.ready.done() else task.exception()
        if isinstance(failure, MigrateError):
            return _refused("session", failure)
        return _refused("session", MigrateError(f"the session could not be started: {failure!r}"))

    def _ended(self, session: Session, task: asyncio.Task[S]) -> None:
        self._running.discard((session, task))
        self._claims.pop(session.request.migration_id).release()
        session.ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session failed", migration=session.request.migration_id, why=repr(error))
        ended = [one for one, other in self._sessions.items() if other.ended.is_set()]
        for migration_id in ended[:-ENDED_MAX]:
            del self._sessions[migration_id]

    def _live(self) -> list[Session]:
        return [
            session
            for session in self._sessions.values()
            if session.driver.state not in TARGET_TERMINAL and not session.ended.is_set()
        ]

    def _sink_of(self, hello: Hello, peer: str) -> PageSink | None:
        """For the data listener, in its threads: which session a ticket belongs to."""
        for session in list(self._sessions.values()):
            if session.ticket == hello.ticket:
                return session.workspace if session.is_receiving and session.peer == peer else None
        return None

    async def _control(self, request: web.Request) -> web.StreamResponse:
        return await self._session_of(request).channel.answer(request)

    async def _rootfs(self, request: web.Request) -> web.StreamResponse:
        session = self._session_of(request)
        if not session.is_receiving:
            raise web.HTTPConflict(text="this session takes no files any more")
        number = request.query.get("pass", "")
        if not _PASS.fullmatch(number):
            raise web.HTTPBadRequest(text="pass is the number of a pass")
        if not session.passes.can_serve(int(number)):
            raise web.HTTPConflict(text="so many passes at once are not served")
        channel = web.WebSocketResponse(compress=False, max_msg_size=4 * CHUNK_BYTES)
        await channel.prepare(request)
        with contextlib.suppress(ConnectionError):
            await session.passes.serve(int(number), channel)
        return channel

    async def _word(self, request: web.Request) -> web.Response:
        """A peer's word about a migration, outside of its session's channel."""
        caller, migration_id = _peer(request), request.match_info["id"]
        try:
            message = messages.decode_from_source(await request.read())
            if not isinstance(message, messages.Ask | messages.Commit | messages.Abort):
                raise ProtocolError(f"{type(message).__name__} is no word about a migration")
            if message.migration_id != migration_id:
                raise ProtocolError("the word is about another migration")
            if request.match_info["role"] == "source":
                name = await self._state_as_source(message, caller)
            else:
                name = await self._state_as_target(message, caller)
        except MigrateError as error:
            log.warning("word refused", peer=caller, why=str(error))
            raise web.HTTPConflict(text=error.message) from error
        return _answer(messages.State(message.migration_id, message.attempt, name))

    async def _state_as_source(
        self, message: messages.Ask | messages.Commit | messages.Abort, caller: str
    ) -> str:
        """The last record of a migration that left, or leaves, this host."""

        def read(journal: Journal) -> str | None:
            migration = journal.migration(message.migration_id, "source")
            if (recovery.facts_of(migration).peer_host, migration.attempt) != (
                caller,
                message.attempt,
            ):
                return None
            return journal.state(message.migration_id, "source") or "new"

        if not isinstance(message, messages.Ask):
            raise ProtocolError("a source is only asked")
        try:
            state = await self._journal.call(read)
        except JournalError:
            state = None
        if claimant(self._paths.claim(message.migration_id, "source")) is None:
            self._custodian.look()
        return state or UNKNOWN

    async def _state_as_target(
        self, message: messages.Ask | messages.Commit | messages.Abort, caller: str
    ) -> str:
        session = self._sessions.get(message.migration_id)
        if session is not None and session.peer == caller and not session.ended.is_set():
            await session.hear(message)
            if not isinstance(message, messages.Ask):
                await session.wait_beyond(UNDECIDED | {S.COMMITTED}, config.HANDOVER_DEADLINE_S)
            return str(session.driver.settled_state)

        def read(journal: Journal) -> str | None:
            migration = journal.migration(message.migration_id, "target")
            if (migration.peer, migration.attempt) != (caller, message.attempt):
                return None
            return journal.state(message.migration_id, "target")

        try:
            return await self._journal.call(read) or UNKNOWN
        except JournalError:
            return UNKNOWN

    async def _operate(self, request: web.Request) -> web.Response:
        """This host's operator wants a session that is in doubt to end."""
        if _peer(request) != self._host:
            raise web.HTTPForbidden(text="only this host itself may say that")
        try:
            message = messages.decode_from_source(await request.read())
        except MigrateError as error:
            raise web.HTTPBadRequest(text=error.message) from error
        if not isinstance(message, messages.Recover):
            raise web.HTTPBadRequest(text="that is no word of an operator")
        session = self._sessions.get(message.migration_id)
        migration = self._unknown.get(message.migration_id)
        if session is not None and not session.ended.is_set():
            standing = await self._recover_session(session, message)
        elif migration is not None:
            standing = await self._recover_unknown(migration, message)
        else:
            raise web.HTTPNotFound(text="this agent has no such migration in its hands")
        return _answer(standing)

    async def _recover_session(
        self, session: Session, message: messages.Recover
    ) -> messages.Standing:
        """The source's word first; the operator's where there is none."""
        said, kind = await self._source_says(session.request.attempt, message, session.peer)
        if session.driver.state in UNDECIDED and kind is not E.SOURCE_UNDECIDED:
            await session.driver.post(kind)
        elif message.owner:
            await session.decide(message.owner)
        await session.wait_beyond(UNDECIDED | {S.COMMITTED, S.ABORTING}, config.WORD_DEADLINE_S / 2)
        state = str(session.driver.settled_state)
        return messages.Standing(message.migration_id, state, said, session.stopped)

    async def _recover_unknown(
        self, migration: Migration, message: messages.Recover
    ) -> messages.Standing:
        said, _ = await self._source_says(migration.attempt, message, migration.peer)
        state = str(S.COMMITTED)
        if message.owner == "target":
            state = str(S.DONE)
            await asyncio.to_thread(
                recovery.wipe, self._paths.session(migration.migration_id, "target")
            )
            await self._journal.record(migration.migration_id, "target", str(S.RUNNING), "operator")
            await self._end_unknown(migration, state)
        elif message.owner == "source":
            state = str(S.ABORTED)
            runtime = self._runtimes[migration.runtime]
            await asyncio.to_thread(remains.discard, migration, runtime, self._paths)
            await self._end_unknown(migration, state)
        return messages.Standing(message.migration_id, state, said)

    async def _source_says(
        self, attempt: int, message: messages.Recover, source: str
    ) -> tuple[str, E]:
        ask = messages.Ask(message.migration_id, attempt)
        try:
            said = await peer.say(source, config.CONTROL_PORT, self._paths, "source", ask)
        except MigrateError as error:
            return error.message[: messages.MAX_TEXT], E.SOURCE_UNDECIDED
        return f"{source} says {said}", source_reported(said)

    def _session_of(self, request: web.Request) -> Session:
        """The session of the URL, if it is the caller's; otherwise there is none for it."""
        session = self._sessions.get(request.match_info["id"])
        # What has ended is in the journal, and can be asked for (`_word`).
        if session is None or session.peer != _peer(request) or session.ended.is_set():
            raise web.HTTPNotFound(text="no such session")
        return session


def _peer(request: web.Request) -> str:
    """Who calls, by the verified certificate: its DNS name."""
    assert request.transport is not None
    certificate = request.transport.get_extra_info("peercert") or {}
    names = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"]
    if len(names) != 1:
        raise web.HTTPForbidden(text="a certificate has exactly one DNS name")
    return str(names[0])


def _refused(code: str, error: MigrateError) -> messages.Refused:
    return messages.Refused((messages.Refusal(code, error.message, error.remedy),))


def _answer(
    message: messages.SessionOpened | messages.Refused | messages.State | messages.Standing,
) -> web.Response:
    status = 409 if isinstance(message, messages.Refused) else 200
    return web.Response(
        body=messages.encode(message), status=status, content_type="application/json"
    )
