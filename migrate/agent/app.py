"""The agent: a daemon that receives containers, by HTTP and WebSockets over mutual TLS 1.3.

It is root, and listens on a unix socket alone. What talks to the network is its front (`front.py`),
a process without rights; what comes from there has been decoded, and says who has proven to be the
caller (`front_link.py`).

    POST /v1/sessions                 OpenSession -> SessionOpened | Refused
    POST /v1/migrations/ID/ROLE       Ask | Commit | Abort -> State      (`peer.py`)
    POST /v1/operator                 Recover -> Standing       (an operator, or this host itself)
                                      Drain -> Drained, Status | Cancel -> Overview  (the same)
    POST /v1/host                     Describe -> Description, GiveBack -> GivingBack  (hosts)
    PUT  /v1/crl                      the authority's list of revoked identities (anybody's)
    GET  /v1/sessions/ID/control      WebSocket: the messages of core/messages.py; with ?heard=N it
                                      goes on where the former connection broke
    GET  /v1/sessions/ID/rootfs?pass=N  WebSocket: one pass of rsync
    the data port                     pages and image files: the front, for `Sessions.sink_of`

A caller is who its certificate says (`transport/identity.py`); a session answers only to the host
that opened it.

When it starts it goes on with the sessions of the agent before it, and recovers the migrations of
this host whose coordinator is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from aiohttp import web

from migrate import config, policy_checks, preflight
from migrate.agent import copy_hook
from migrate.agent.custodian import Custodian
from migrate.agent.drains import Drains
from migrate.agent.front_keeper import Front
from migrate.agent.front_link import PEER_HEADER, Caller
from migrate.agent.sessions import Sessions
from migrate.agent.ticket import Ticket
from migrate.agent.words import Words
from migrate.claim import Claim
from migrate.core import messages
from migrate.errors import MigrateError, ProtocolError, UsageError
from migrate.facts import free_memory_bytes, host_versions
from migrate.identity import own_identity
from migrate.journal import JournalWriter
from migrate.policy import PolicyError, PolicyFile
from migrate.rootfs import CHUNK_BYTES
from transport.errors import TransportError
from transport.identity import Peer, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiohttp.typedefs import Handler

    from migrate.agent.session import Session
    from migrate.refusals import Refusal
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

# ASCII digits alone; nobody makes more passes.
_PASS = re.compile(r"[0-9]{1,6}")


class Agent:
    """The agent of this host. Make it inside the event loop that serves it."""

    def __init__(
        self,
        paths: config.HostPaths,
        runtimes: dict[str, Runtime],
        address: str,
        port: int = config.CONTROL_PORT,
        data_port: int = config.DATA_PORT,
    ) -> None:
        """Listens from now on; port 0 takes a free one. Raises MigrateError."""
        self._paths = paths
        self._runtimes = runtimes
        self._host = socket.gethostname()
        self._policy = PolicyFile(paths.policy)
        self._policy.current()
        self._opening = asyncio.Lock()
        self._identity = own_identity(paths)
        self._check_name()
        self._claim = Claim.take(paths.agent_claim, "agent")
        self._journal = JournalWriter(paths.journal)
        self._custodian = Custodian(self._journal, runtimes, paths)
        self._sessions = Sessions(paths, runtimes, self._journal, self._host)
        self._front = Front(paths, address, port, data_port, self._sessions.sink_of)
        self._sessions.data = self._front
        self._drains = Drains(paths, runtimes, self._journal, self._policy)
        self._words = Words(self._sessions, self._journal, self._custodian, paths)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(
            client_max_size=messages.MAX_MESSAGE_BYTES, middlewares=[self._with_peer]
        )
        app.router.add_post("/v1/sessions", self._open)
        app.router.add_post("/v1/migrations/{id}/{role:source|target}", self._word)
        app.router.add_post("/v1/operator", self._operate)
        app.router.add_post("/v1/host", self._host_word)
        app.router.add_put("/v1/crl", self._revocations)
        app.router.add_get("/v1/sessions/{id}/control", self._control)
        app.router.add_get("/v1/sessions/{id}/rootfs", self._rootfs)
        return app

    @property
    def ports(self) -> tuple[int, int]:
        """Where it listens: control, data."""
        return self._front.port, self._front.data_port

    @property
    def is_busy(self) -> bool:
        """Whether there is a session that has not ended, or one that an operator has to decide."""
        return bool(self._sessions.live() or self._sessions.unknown)

    async def serve(self, until: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, or until `until`, begun when it listens, has ended.
        Sessions that hold nothing yet are undone then."""
        loop = asyncio.get_running_loop()
        # What blocks in one session, for half a minute where something hangs, may not keep
        # another one waiting that stands still. asyncio's own has six on two processors.
        loop.set_default_executor(ThreadPoolExecutor(config.AGENT_THREADS, "agent"))
        await self._sessions.adopt_former()
        chores = [asyncio.create_task(one()) for one in (self._custodian.run, self._keep_identity)]
        runner = web.AppRunner(self.application(), access_log=None)
        await runner.setup()
        await web.SockSite(runner, self._front.socket).start()
        await self._front.start()
        port, data_port = self.ports
        log.info("agent listens", host=self._host, port=port, data_port=data_port)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if until is not None:
            chores.append(asyncio.create_task(until()))
            chores[-1].add_done_callback(lambda _: stop.set())
        await stop.wait()
        for chore in chores:
            chore.cancel()
        await self._sessions.stop()
        await self._front.stop()
        await runner.cleanup()
        self._journal.close()
        self._claim.release()

    @web.middleware
    async def _with_peer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The front alone may call, and says for whom."""
        try:
            if not self._front.is_caller(request):
                raise ProtocolError("it is not the front that calls")
            _caller(request)
        except (msgspec.DecodeError, ProtocolError) as error:
            log.warning("request refused", path=request.path, why=str(error))
            raise web.HTTPForbidden(text=str(error)) from error
        return await handler(request)

    async def _open(self, request: web.Request) -> web.Response:
        peer = _host(request)
        try:
            message = messages.decode_from_source(await _body(request))
            if not isinstance(message, messages.OpenSession):
                raise ProtocolError("a session is opened by OpenSession")
            if message.host != peer:
                raise ProtocolError(f"{peer} can't open a session in the name of {message.host}")
        except MigrateError as error:
            log.warning("session refused", **_who(request), why=str(error))
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
        try:
            if not message.dry_run:
                await self._sessions.end_former(message, peer)
        except MigrateError as error:
            return _refused("held", error)
        if any(one.request.container == message.container for one in self._sessions.live()):
            taken = MigrateError(f"{message.container} is being received by {self._host} already")
            return _refused("name-taken", taken)
        try:
            refusals = await asyncio.to_thread(self._look, message, runtime)
        except PolicyError as error:
            log.warning("policy unusable", why=error.message, remedy=error.remedy)
            # What is wrong in its file is not for the peer.
            said = f"{self._host} can't read its policy, and receives nothing"
            return _refused("policy", PolicyError(said, remedy="see its agent's log"))
        except MigrateError as error:
            return _refused("preflight", error)
        if refusals:
            codes = [one.code for one in refusals]
            log.warning("session refused", peer=peer, container=message.container, why=codes)
            return messages.Refused(_few(refusals))
        ticket = Ticket(peer, message.streams)
        opened = messages.SessionOpened(
            session_id=message.migration_id,
            ticket=ticket.secret.hex(),
            data_port=self._front.data_port,
            host=self._host,
            versions=await asyncio.to_thread(host_versions, runtime),
            free_memory_bytes=free_memory_bytes(),
            cautions=tuple(messages.Caution(*one) for one in preflight.target_cautions(message)),
        )
        if message.dry_run:
            return opened
        try:
            await self._sessions.begin(message, peer, runtime, ticket)
        except MigrateError as error:
            return _refused("session", error)
        return opened

    def _look(self, message: messages.OpenSession, runtime: Runtime) -> list[Refusal]:
        """Why the container can't come or may not. Blocking."""
        rules = self._policy.current()
        live = self._sessions.live()
        others = [
            policy_checks.Load.of(one.peer, one.request) for one in live if not one.is_on_demand
        ]
        promised = (
            preflight.judge_promised(message.copy_of, (one.request for one in live))
            if message.copy_of
            else []
        )
        return [
            *policy_checks.judge_quotas(rules, message, others),
            *promised,
            *preflight.check_target(message, runtime, self._paths, rules),
            *copy_hook.refusals(message, self._paths.copy_hooks),
        ]

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
        with contextlib.suppress(ConnectionError):
            await channel.prepare(request)
            await session.passes.serve(int(number), channel)
        return channel

    async def _word(self, request: web.Request) -> web.Response:
        """A peer's word about a migration, outside of its session's channel."""
        caller, migration_id = _host(request), request.match_info["id"]
        answer = {"source": self._words.as_source, "target": self._words.as_target}
        try:
            word = messages.decode_from_source(await _body(request))
            if getattr(word, "migration_id", None) != migration_id:
                raise ProtocolError("the word is about another migration")
            return _answer(await answer[request.match_info["role"]](word, caller))
        except MigrateError as error:
            log.warning("word refused", **_who(request), why=str(error))
            raise web.HTTPConflict(text=error.message) from error

    async def _operate(self, request: web.Request) -> web.Response:
        peer = _peer(request)
        if peer.role is not Role.OPERATOR and peer.name != self._host:
            raise _forbidden(request, "only an operator or this host itself may say that")
        try:
            word = messages.decode_from_source(await _body(request))
            match word:
                case messages.Drain():
                    return _answer(await self._drains.asked(word))
                case messages.Status() | messages.Cancel():
                    return _answer(await self._words.overview(word))
                case messages.Recover():
                    standing = await self._words.operate(word)
                case _:
                    raise ProtocolError("that is no word of an operator")
        except UsageError as error:
            raise web.HTTPBadRequest(text=error.message) from error
        except MigrateError as error:
            raise web.HTTPConflict(text=error.message) from error
        if standing is None:
            raise web.HTTPNotFound(text="this agent has no such migration in its hands")
        return _answer(standing)

    async def _host_word(self, request: web.Request) -> web.Response:
        """About this host or what it has received, from another one."""
        caller = _host(request)
        try:
            word = messages.decode_from_source(await _body(request))
            return _answer(await self._drains.told(word, caller))
        except MigrateError as error:
            log.warning("word refused", **_who(request), why=str(error))
            raise web.HTTPConflict(text=error.message) from error

    async def _revocations(self, request: web.Request) -> web.Response:
        """The authority's list of revoked identities, whoever brings it: it proves itself."""
        try:
            is_new = await asyncio.to_thread(self._identity.take_revocations, await _body(request))
        except TransportError as error:
            log.warning("revocations refused", **_who(request), why=str(error))
            raise web.HTTPConflict(text=str(error)) from error
        if is_new:
            number = self._identity.revocations.number
            log.info("revocations taken", **_who(request), number=number)
        return web.Response(status=204)

    async def _keep_identity(self) -> None:
        """Renew this host's certificate for TLS, and take what commands have put beside it."""
        while True:
            await asyncio.sleep(config.IDENTITY_PERIOD_S)
            try:
                if await asyncio.to_thread(self._identity.renew):
                    log.info("certificate renewed")
                await asyncio.to_thread(self._identity.refresh)
            except TransportError as error:
                log.warning("certificate not renewed", why=str(error))

    def _check_name(self) -> None:
        owner = self._identity.owner
        if owner.role is not Role.HOST or owner.name != self._host:
            raise MigrateError(
                f"the identity here is that of {owner.role} {owner.name}, and this host is called"
                f" {self._host}",
                remedy="enrol this host by its own name",
            )

    def _session_of(self, request: web.Request) -> Session:
        """The session of the URL, if it is the caller's; otherwise there is none for it."""
        session = self._sessions.find(request.match_info["id"], _host(request))
        if session is None:
            log.warning("channel refused", **_who(request), path=request.path, why="no session")
            raise web.HTTPNotFound(text="no such session")
        return session


async def _body(request: web.Request) -> bytes:
    """What the caller sends; one that hangs up meanwhile hears no answer either."""
    try:
        return await request.read()
    except ConnectionError as error:
        raise web.HTTPBadRequest(text="the request broke off") from error


def _peer(request: web.Request) -> Peer:
    """Who calls, as has been proven to the front."""
    return _caller(request).peer


def _caller(request: web.Request) -> Caller:
    """What the front says of who calls. Raises msgspec.DecodeError, which `_with_peer` has seen to
    before anybody else asks."""
    return Caller.from_header(request.headers.get(PEER_HEADER, ""))


def _host(request: web.Request) -> str:
    """The name of the host that calls. Raises HTTPForbidden for anybody else."""
    peer = _peer(request)
    if peer.role is not Role.HOST:
        raise _forbidden(request, "only hosts send containers")
    return peer.name


def _forbidden(request: web.Request, why: str) -> web.HTTPForbidden:
    log.warning("request refused", **_who(request), path=request.path, why=why)
    return web.HTTPForbidden(text=why)


def _who(request: web.Request) -> dict[str, str]:
    """For the log."""
    caller = _caller(request)
    return {"peer": str(caller.peer), "address": caller.address}


def _refused(code: str, error: MigrateError) -> messages.Refused:
    return messages.Refused((messages.Refusal(code, error.message, error.remedy),))


def _few(refusals: list[Refusal]) -> tuple[messages.Refusal, ...]:
    """As many and as long as a message takes: a configuration can be wrong in a thousand ways."""
    return tuple(
        messages.Refusal(
            one.code, one.message[: messages.MAX_TEXT], one.remedy[: messages.MAX_TEXT]
        )
        for one in refusals[: messages.MAX_REFUSALS]
    )


def _answer(
    message: messages.TargetMessage,
) -> web.Response:
    status = 409 if isinstance(message, messages.Refused) else 200
    return web.Response(
        body=messages.encode(message), status=status, content_type="application/json"
    )
