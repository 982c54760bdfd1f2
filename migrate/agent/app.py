"""The agent: a daemon that receives containers, by HTTP and WebSockets over mutual TLS 1.3.

    POST /v1/sessions                 OpenSession -> SessionOpened | Refused
    GET  /v1/sessions/ID/control      WebSocket: the messages of core/messages.py
    GET  /v1/sessions/ID/rootfs       WebSocket: one pass of rsync
    the data port                     pages and image files (transport.receiver)

A caller is who its certificate says; a session answers only to the host that opened it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from migrate import config, preflight, remains
from migrate.agent.session import Session, new_ticket
from migrate.core import messages
from migrate.core.events import TargetEventKind as E
from migrate.core.states import TARGET_TERMINAL
from migrate.core.states import TargetState as S
from migrate.errors import MigrateError, ProtocolError
from migrate.facts import free_memory_bytes, host_versions
from migrate.journal import JournalWriter
from migrate.rootfs import CHUNK_BYTES, serve_rsync
from transport import tls
from transport.receiver import DataListener

if TYPE_CHECKING:
    from migrate.journal import Migration, Role
    from migrate.runtimes.base import Runtime
    from transport.core.frames import Hello
    from transport.inbound import PageSink

log = structlog.get_logger()

ROLES: tuple[Role, ...] = ("source", "target")

# Sessions that outlive the agent: a copy that is held, or that runs and is being filled.
HELD = frozenset({S.HELD, S.IN_DOUBT, S.COMMITTED, S.RUNNING})

# Ended sessions that may still be asked about by their source.
ENDED_MAX = 64

# A channel on which nothing was heard for this long after a ping is closed, which the session's
# machine hears as a lost link.
HEARTBEAT_S = 10.0


class Agent:
    """Sessions of this host. Make it inside the event loop that serves it."""

    def __init__(self, paths: config.HostPaths, runtimes: dict[str, Runtime], address: str) -> None:
        self._paths = paths
        self._runtimes = runtimes
        self._host = socket.gethostname()
        self._sessions: dict[str, Session] = {}
        self._running: set[tuple[Session, asyncio.Task[S]]] = set()
        self._opening = asyncio.Lock()
        self._held: list[Migration] = []
        identity = tls.TlsPaths(paths.tls.ca, paths.tls.certificate, paths.tls.key)
        self._context = tls.server_context(identity)
        self._journal = JournalWriter(paths.journal)
        self._data = DataListener(address, config.DATA_PORT, self._context, self._sink_of)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=messages.MAX_MESSAGE_BYTES)
        app.router.add_post("/v1/sessions", self._open)
        app.router.add_get("/v1/sessions/{id}/control", self._control)
        app.router.add_get("/v1/sessions/{id}/rootfs", self._rootfs)
        return app

    async def serve(self, address: str, port: int) -> None:
        """Serve until SIGTERM or SIGINT; sessions that hold nothing yet are undone then."""
        self._held = await self._clean_remains()
        for migration in self._held:
            log.warning(
                "held since before this start",
                migration=migration.migration_id,
                container=migration.container,
                role=migration.role,
                peer=migration.peer,
            )
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
        await self._end_sessions()
        await runner.cleanup()
        await asyncio.to_thread(self._data.stop)
        self._journal.close()

    async def _end_sessions(self) -> None:
        """Close the channels: what holds nothing is undone, what holds something stays held."""
        for session in self._live():
            await session.part("the agent stops")
        undoing = [task for session, task in self._running if session.driver.state not in HELD]
        if undoing:
            await asyncio.wait(undoing, timeout=config.STOP_DEADLINE_S)

    async def _clean_remains(self) -> list[Migration]:
        now_s = time.time()
        held: list[Migration] = []
        for role in ROLES:
            clean = partial(remains.clean, role=role, runtimes=self._runtimes, paths=self._paths)
            held += await self._journal.call(partial(clean, at_wall_s=now_s))
        return held

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
        """End what is held here of an earlier attempt of the same source.

        Its coordinator opens no session for a container that it has committed and not heard of
        since, so a higher attempt is its word that it kept the container.
        """

        def is_former(container: str, source: str, attempt: int) -> bool:
            return (container, source) == (message.container, peer) and attempt < message.attempt

        for session in self._live():
            request = session.request
            if is_former(request.container, session.peer, request.attempt):
                if session.driver.state is not S.IN_DOUBT:
                    continue
                await session.driver.post(E.SOURCE_SAYS_ABORTED)
                try:
                    async with asyncio.timeout(remains.HOLD_END_DEADLINE_S):
                        await session.ended.wait()
                except TimeoutError as error:
                    raise MigrateError(
                        f"the copy of {request.container} that is held here does not end"
                    ) from error
        for migration in list(self._held):
            if not is_former(migration.container, migration.peer, migration.attempt):
                continue
            await asyncio.to_thread(remains.end_held, migration, runtime, self._paths)
            await self._journal.record(
                migration.migration_id, "target", str(S.ABORTED), "source_says_aborted"
            )
            self._held.remove(migration)

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
            opened=opened,
        )
        self._sessions[message.migration_id] = session
        task = asyncio.create_task(session.run())
        self._running.add((session, task))
        task.add_done_callback(partial(self._ended, session))
        either: set[asyncio.Future[Any]] = {session.ready, task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if session.ready.done() and session.ready.exception() is None:
            return opened
        error = session.ready.exception() if session.ready.done() else task.exception()
        if isinstance(error, MigrateError):
            return _refused("session", error)
        return _refused("session", MigrateError(f"the session could not be started: {error!r}"))

    def _ended(self, session: Session, task: asyncio.Task[S]) -> None:
        self._running.discard((session, task))
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
        session = self._session_of(request)
        channel = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, compress=False, max_msg_size=messages.MAX_MESSAGE_BYTES
        )
        await channel.prepare(request)
        try:
            await session.serve(channel)
        except ProtocolError as error:
            log.warning("message refused", peer=session.peer, why=str(error))
            await channel.close(code=1002, message=str(error).encode()[:120])
        return channel

    async def _rootfs(self, request: web.Request) -> web.StreamResponse:
        session = self._session_of(request)
        if not session.is_receiving:
            raise web.HTTPConflict(text="this session takes no files any more")
        channel = web.WebSocketResponse(compress=False, max_msg_size=4 * CHUNK_BYTES)
        await channel.prepare(request)
        with contextlib.suppress(ConnectionError):
            await serve_rsync(channel, session.workspace.rootfs, session.workspace.work_dir)
        return channel

    def _session_of(self, request: web.Request) -> Session:
        """The session of the URL, if it is the caller's; otherwise there is none for it."""
        session = self._sessions.get(request.match_info["id"])
        if session is None or session.peer != _peer(request):
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


def _answer(message: messages.SessionOpened | messages.Refused) -> web.Response:
    status = 200 if isinstance(message, messages.SessionOpened) else 409
    return web.Response(
        body=messages.encode(message), status=status, content_type="application/json"
    )
