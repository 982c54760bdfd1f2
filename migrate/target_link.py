"""The source's end of the control channel: HTTP and WebSockets to the agent, over mutual TLS.

Knows how to reach the agent and to carry messages, each exactly once and in order over any number
of connections (`core/outbox.py`); what they mean, and how long a broken link is waited for, is the
conversation's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from typing import TYPE_CHECKING

import aiohttp

from migrate import config
from migrate.core import messages
from migrate.core.clock_relation import PingSample
from migrate.core.outbox import Outbox
from migrate.errors import ProtocolError, SessionRefused, Unreachable
from migrate.identity import own_identity
from migrate.rootfs import CHUNK_BYTES
from migrate.way import DIRECT
from transport.identity import peer_of

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator

    from migrate.core.messages import OpenSession, SourceMessage, TargetMessage
    from migrate.way import Way

# Samples of the two hosts' clocks; the best round trip of them counts.
PINGS = 16
# On a slow link fewer samples do: what they say is no more exact than its round trip anyway.
PINGS_DEADLINE_S = 2.0
# For the target to answer a closing frame.
CLOSE_DEADLINE_S = 2.0


# tcp(7): a connection whose peer acknowledges nothing for 15 s is broken, an idle one too.
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 5),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_USER_TIMEOUT, 15_000),
)


class SessionGone(Unreachable):
    """The target answers, and says that there is no channel to go on with."""


class NobodyListens(Unreachable):
    """The host answers, and refuses the connection: no agent runs there."""


class TargetLink:
    """One migration's way to the agent of `host`. Close it; one event loop."""

    def __init__(self, host: str, port: int, paths: config.HostPaths, way: Way = DIRECT) -> None:
        self.host = host
        self.way = way
        self.port = port
        self.identity = own_identity(paths)
        self._http: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientWebSocketResponse | None = None
        self.opened: messages.SessionOpened | None = None
        self._outbox = Outbox()
        self._heard = 0
        self._sending = asyncio.Lock()
        # When the target was heard last, by the monotonic clock.
        self.heard_s = 0.0
        # None: the connection is over.
        self._pongs: asyncio.Queue[messages.Pong | None] = asyncio.Queue(PINGS)

    async def open_session(self, request: OpenSession) -> messages.SessionOpened:
        """Ask for a session. Raises SessionRefused, Unreachable, ProtocolError."""
        with self._errors(is_first=True):
            async with (
                asyncio.timeout(config.OPEN_DEADLINE_S),
                self._client().post(
                    self._url("/v1/sessions"), data=messages.encode(request), ssl=self.context
                ) as response,
            ):
                body = await response.content.read(messages.MAX_MESSAGE_BYTES + 1)
        answer = messages.decode_from_target(body)
        match answer:
            case messages.SessionOpened():
                self.opened = answer
                return answer
            case messages.Refused(refusals=refusals):
                raise SessionRefused(
                    [(one.code, one.message, one.remedy) for one in refusals], host=self.host
                )
            case _:
                raise ProtocolError(f"{self.host} answered {type(answer).__name__}", host=self.host)

    async def connect(self, *, anew: bool = False) -> None:
        """Open the control channel of the session, or open it again where it broke.

        `anew`: what either side has told before, heard or not, is forgotten by both. Raises
        Unreachable: SessionGone, NobodyListens, or another that may pass.
        """
        if self._control is not None:
            await self._control.close()
        if anew:
            self._outbox, self._heard = Outbox(), 0
        with self._errors():
            async with asyncio.timeout(config.CONNECT_DEADLINE_S):
                control = await self._client().ws_connect(
                    self._session_url("control" if anew else f"control?heard={self._heard}"),
                    ssl=self.context,
                    heartbeat=config.HEARTBEAT_S,
                    compress=0,
                    max_msg_size=messages.MAX_MESSAGE_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_DEADLINE_S),
                )
                try:
                    self._check_host(control)
                    await self._resume(control)
                except BaseException:
                    await control.close()
                    raise
        self.heard_s = time.monotonic()

    def _check_host(self, control: aiohttp.ClientWebSocketResponse) -> None:
        """Data streams are opened to the host that the target calls itself: it has proven that."""
        assert self.opened is not None
        peer = peer_of(control.get_extra_info("ssl_object"))
        if peer.name != self.opened.host:
            raise ProtocolError(f"{peer} calls itself {self.opened.host}", host=self.host)

    async def _resume(self, control: aiohttp.ClientWebSocketResponse) -> None:
        """Send what the target has not heard, as it says before anything else."""
        first = await control.receive()
        if first.type is not aiohttp.WSMsgType.TEXT:
            raise Unreachable(f"{self.host} ended the connection as it began", host=self.host)
        try:
            message = messages.decode_from_target(first.data)
            if not isinstance(message, messages.Heard):
                raise ProtocolError(f"{self.host} began with {type(message).__name__}")
            async with self._sending:
                for text in self._outbox.resume(message.messages):
                    await control.send_str(text)
                self._control = control
            while not self._pongs.empty():
                self._pongs.get_nowait()
        except ProtocolError as error:
            raise SessionGone(error.message, host=self.host) from error

    async def rootfs_channel(self, number: int) -> aiohttp.ClientWebSocketResponse:
        """A channel for pass `number` of rsync; a former one for the same pass is ended there."""
        channel = await self._client().ws_connect(
            self._session_url(f"rootfs?pass={number}"),
            ssl=self.context,
            compress=0,
            max_msg_size=4 * CHUNK_BYTES,
        )
        # Nobody reads it while the pass waits at its gate, so a heartbeat would be in vain.
        tcp = channel.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            tcp.setsockopt(socket.IPPROTO_TCP, option, value)
        return channel

    @property
    def context(self) -> ssl.SSLContext:
        """For a connection that is made now: this host's certificate may have been renewed."""
        return self.identity.client_context()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._control is not None and not self._control.closed

    async def tell(self, message: SourceMessage) -> None:
        """Send a message, now or on the next connection."""
        text = messages.encode(message).decode()
        async with self._sending:
            self._outbox.add(text)
            # The listener hears of the end too.
            with contextlib.suppress(Unreachable):
                await self._send(text)

    async def listen(self) -> AsyncIterator[TargetMessage]:
        """Messages of the target until the connection ends; answers to pings are kept apart.

        Raises SessionGone when the target has ended it itself.
        """
        assert self._control is not None
        control = self._control
        while (frame := await control.receive()).type is aiohttp.WSMsgType.TEXT:
            self.heard_s = time.monotonic()
            message = messages.decode_from_target(frame.data)
            if isinstance(message, messages.Pong):
                # More than were asked for are worth nothing.
                with contextlib.suppress(asyncio.QueueFull):
                    self._pongs.put_nowait(message)
            else:
                self._heard += 1
                yield message
        # Who waits for an answer waits in vain.
        with contextlib.suppress(asyncio.QueueFull):
            self._pongs.put_nowait(None)
        if frame.type is aiohttp.WSMsgType.CLOSE:
            why = f": {frame.extra}" if frame.extra else ""
            raise SessionGone(f"{self.host} ended the session{why}", host=self.host)

    async def ping(self, count: int = PINGS) -> list[PingSample]:
        """Samples of the two clocks, one at least; needs somebody in `listen`.

        Raises Unreachable, also when the connection breaks meanwhile.
        """
        samples: list[PingSample] = []
        end_s = time.monotonic() + PINGS_DEADLINE_S
        while not samples or (len(samples) < count and time.monotonic() < end_s):
            samples.append(await self._ping())
        return samples

    async def _ping(self) -> PingSample:
        sent_us = time.monotonic_ns() // 1000
        with self._errors():
            async with asyncio.timeout(config.CONNECT_DEADLINE_S):
                await self._send(messages.encode(messages.Ping(sent_us)).decode())
                while (pong := await self._pongs.get()) is None or pong.t_us != sent_us:
                    if pong is None:
                        raise Unreachable(f"the link to {self.host} broke", host=self.host)
                    # It answers one that was given up.
        return PingSample(sent_us, pong.now_us, time.monotonic_ns() // 1000)

    async def _send(self, text: str) -> None:
        if self._control is None or self._control.closed:
            raise Unreachable(f"the control channel to {self.host} is down", host=self.host)
        with self._errors():
            await self._control.send_str(text)

    async def close(self) -> None:
        """Close everything. Idempotent."""
        if self._control is not None:
            await self._control.close()
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _client(self) -> aiohttp.ClientSession:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.CONNECT_DEADLINE_S)
            connector = aiohttp.TCPConnector(resolver=self.way.resolver())
            self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._http

    def _url(self, path: str) -> str:
        return f"https://{self.host}:{self.port}{path}"

    def _session_url(self, channel: str) -> str:
        assert self.opened is not None
        return self._url(f"/v1/sessions/{self.opened.session_id}/{channel}")

    @contextlib.contextmanager
    def _errors(self, *, is_first: bool = False) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise unreachable(self.host, self.port, error, is_first=is_first) from error


def unreachable(host: str, port: int, error: Exception, *, is_first: bool = False) -> Unreachable:
    """What an error of the connection means. `is_first`: nothing was heard of the target yet."""
    kind: type[Unreachable] = Unreachable
    message = f"the agent of {host} does not answer on port {port}"
    remedy = f"is `migrate agent` running on {host}, and is the port reachable?"
    match error:
        case aiohttp.ClientConnectorCertificateError():
            wrong = error.certificate_error
            reason = getattr(wrong, "verify_message", "") or str(wrong)
            message = f"the certificate of {host} proves nothing here: {reason}"
            remedy = "are both hosts enrolled in one fleet? migrate identity show"
        case aiohttp.WSServerHandshakeError() if 400 <= error.status < 500:
            kind = SessionGone
            message = f"{host} has no such session any more ({error.status} {error.message})"
            remedy = f"its agent was started again or gave the migration up: see its log on {host}"
        case aiohttp.ClientConnectorDNSError():
            message = f"no host is known by the name {host}"
            remedy = "check the name, or give an address"
        case _ if is_first and _is_hang_up(error):
            # A server of asyncio ends a handshake that fails without an alert.
            message = f"the agent of {host} hung up: it does not accept this host's certificate"
            remedy = "are both hosts enrolled in one fleet? migrate identity show"
        case aiohttp.ClientConnectorError() if error.os_error.errno:
            kind = NobodyListens if error.os_error.errno == errno.ECONNREFUSED else Unreachable
            message += f": {os.strerror(error.os_error.errno)}"
        case TimeoutError():
            message += ": it is silent"
        case _:
            message += f": {error}"
    return kind(message, host=host, remedy=remedy)


def _is_hang_up(error: Exception) -> bool:
    """Whether the peer ended the connection, noticed by reading or by writing."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET)
