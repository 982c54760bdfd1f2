"""The source's end of the control channel: HTTP and WebSockets to the agent, over mutual TLS.

Knows how to reach the agent and to carry messages; what they mean is the coordinator's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

import aiohttp

from migrate import config
from migrate.core import messages
from migrate.core.clock_relation import PingSample
from migrate.errors import MigrateError, ProtocolError, SessionRefused, Unreachable
from migrate.rootfs import CHUNK_BYTES
from transport import tls
from transport.errors import TransportError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator

    from migrate.core.messages import OpenSession, SourceMessage, TargetMessage

# Samples of the two hosts' clocks; the best round trip of them counts.
PINGS = 16
HEARTBEAT_S = 10.0


class TargetLink:
    """One migration's way to the agent of `host`. Close it; one event loop."""

    def __init__(self, host: str, port: int, paths: config.HostPaths) -> None:
        self.host = host
        self._port = port
        self.context = client_context(paths)
        self._http: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientWebSocketResponse | None = None
        self.opened: messages.SessionOpened | None = None
        self._pongs: asyncio.Queue[messages.Pong] = asyncio.Queue(PINGS)

    async def open_session(self, request: OpenSession) -> messages.SessionOpened:
        """Ask for a session. Raises SessionRefused, Unreachable, ProtocolError."""
        with self._errors(is_first=True):
            async with (
                asyncio.timeout(config.OPEN_DEADLINE_S),
                self._client().post(
                    self._url("/v1/sessions"), data=messages.encode(request)
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

    async def connect(self) -> None:
        """Open the control channel of the session, or open it again."""
        if self._control is not None:
            await self._control.close()
        with self._errors():
            self._control = await self._client().ws_connect(
                self._session_url("control"),
                heartbeat=HEARTBEAT_S,
                compress=0,
                max_msg_size=messages.MAX_MESSAGE_BYTES,
            )

    async def rootfs_channel(self) -> aiohttp.ClientWebSocketResponse:
        """A channel for one pass of rsync."""
        return await self._client().ws_connect(
            self._session_url("rootfs"), compress=0, max_msg_size=4 * CHUNK_BYTES
        )

    async def tell(self, message: SourceMessage) -> None:
        """Send a message; raises Unreachable when the channel is down."""
        if self._control is None or self._control.closed:
            raise Unreachable(f"the control channel to {self.host} is down", host=self.host)
        with self._errors():
            await self._control.send_str(messages.encode(message).decode())

    async def listen(self) -> AsyncIterator[TargetMessage]:
        """Messages of the target until the channel ends; answers to pings are kept apart."""
        assert self._control is not None
        async for frame in self._control:
            if frame.type is not aiohttp.WSMsgType.TEXT:
                continue
            message = messages.decode_from_target(frame.data)
            if isinstance(message, messages.Pong):
                # More than were asked for are worth nothing.
                with contextlib.suppress(asyncio.QueueFull):
                    self._pongs.put_nowait(message)
            else:
                yield message

    async def ping(self, count: int = PINGS) -> list[PingSample]:
        """Samples of the two clocks; needs somebody in `listen`."""
        samples = []
        for _ in range(count):
            sent_us = time.monotonic_ns() // 1000
            await self.tell(messages.Ping(sent_us))
            async with asyncio.timeout(config.CONNECT_DEADLINE_S):
                pong = await self._pongs.get()
            samples.append(PingSample(sent_us, pong.now_us, time.monotonic_ns() // 1000))
        return samples

    async def close(self) -> None:
        """Close everything. Idempotent."""
        if self._control is not None:
            await self._control.close()
        if self._http is not None:
            await self._http.close()
            self._http = None

    def _client(self) -> aiohttp.ClientSession:
        if self._http is None:
            connector = aiohttp.TCPConnector(ssl=self.context)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.CONNECT_DEADLINE_S)
            self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._http

    def _url(self, path: str) -> str:
        return f"https://{self.host}:{self._port}{path}"

    def _session_url(self, channel: str) -> str:
        assert self.opened is not None
        return self._url(f"/v1/sessions/{self.opened.session_id}/{channel}")

    @contextlib.contextmanager
    def _errors(self, *, is_first: bool = False) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise unreachable(self.host, self._port, error, is_first=is_first) from error


def client_context(paths: config.HostPaths) -> ssl.SSLContext:
    """This host's identity, to speak to an agent with. Raises MigrateError."""
    identity = tls.TlsPaths(paths.tls.ca, paths.tls.certificate, paths.tls.key)
    try:
        return tls.client_context(identity)
    except TransportError as error:
        raise MigrateError(
            str(error),
            phase="preflight",
            remedy=f"this host needs an identity in {paths.tls.ca.parent}",
        ) from error


def unreachable(host: str, port: int, error: Exception, *, is_first: bool = False) -> Unreachable:
    """What an error of the connection means. `is_first`: nothing was heard of the target yet."""
    message = f"the agent of {host} does not answer on port {port}"
    remedy = f"is `migrate agent` running on {host}, and is the port reachable?"
    match error:
        case aiohttp.ClientConnectorCertificateError():
            wrong = error.certificate_error
            reason = getattr(wrong, "verify_message", "") or str(wrong)
            message = f"the certificate of {host} proves nothing here: {reason}"
            remedy = "give both hosts certificates of one authority (/etc/migrate/tls)"
        case aiohttp.ClientConnectorDNSError():
            message = f"no host is known by the name {host}"
            remedy = "check the name, or give an address"
        case _ if is_first and _is_hang_up(error):
            # A server of asyncio ends a handshake that fails without an alert.
            message = f"the agent of {host} hung up: it does not accept this host's certificate"
            remedy = "give both hosts certificates of one authority (/etc/migrate/tls)"
        case aiohttp.ClientConnectorError() if error.os_error.errno:
            message += f": {os.strerror(error.os_error.errno)}"
        case TimeoutError():
            message += ": it is silent"
        case _:
            message += f": {error}"
    return Unreachable(message, host=host, remedy=remedy)


def _is_hang_up(error: Exception) -> bool:
    """Whether the peer ended the connection, noticed by reading or by writing."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET)
