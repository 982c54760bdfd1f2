"""The agent's HTTPS port: connections that waste its time are ended, whatever they do.

    accept -> TLS handshake -> head of a request -> served
              `--- HANDSHAKE -' `-- HEAD ------'    `- idle for KEEPALIVE at most
    `---------- waits at the door ------------'     inside

asyncio and aiohttp have no limit of connections, a minute for a handshake and for ever for the head
of a request; a buffer of 256 KiB comes with each TLS connection before anything is known of it. So
connections are accepted here, go through a `Door`, and are given to aiohttp's server when their
handshake is done. One that is ended here is one line in the log.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiohttp import web

from transport import tls
from transport.complaints import Complaints
from transport.door import Door, Guest
from transport.errors import TransportError

if TYPE_CHECKING:
    import socket
    import ssl

log = structlog.get_logger()

HANDSHAKE_DEADLINE_S: Final = tls.HANDSHAKE_DEADLINE_S
# A head is a few hundred bytes; who has shaken hands sends it at once.
HEAD_DEADLINE_S: Final = 10.0
# Of messages.MAX_MESSAGE_BYTES at most, over a link of 1 Mbit/s.
BODY_DEADLINE_S: Final = 30.0
# An idle connection is kept for so long; opening another one takes two round trips.
KEEPALIVE_S: Final = 20.0
# Before accepting again when the process is out of descriptors.
_PAUSE_S: Final = 0.1
_SHUTDOWN_DEADLINE_S: Final = 2.0


class Site:
    """Serves `application` on `listening` (bound, owned from now on) until `stop`."""

    def __init__(
        self,
        application: web.Application,
        listening: socket.socket,
        context: ssl.SSLContext,
        *,
        door: Door | None = None,
        handshake_deadline_s: float = HANDSHAKE_DEADLINE_S,
        head_deadline_s: float = HEAD_DEADLINE_S,
    ) -> None:
        application.middlewares.append(self._admit)
        self._runner = web.AppRunner(application, access_log=None, keepalive_timeout=KEEPALIVE_S)
        self._listening = listening
        self._context = context
        self._door = door or Door()
        self._handshake_deadline_s = handshake_deadline_s
        self._head_deadline_s = head_deadline_s
        self._complaints = Complaints()
        self._accepting: asyncio.Task[None] | None = None
        self._shaking: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.BaseTransport, Connection] = {}

    async def start(self) -> None:
        """Returns when the port is served."""
        await self._runner.setup()
        self._listening.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def stop(self) -> None:
        """End the port and all connections; handlers have aiohttp's time to end."""
        assert self._accepting is not None
        tasks = {self._accepting, *self._shaking}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listening.close()
        await self._runner.cleanup()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                plain, address = await loop.sock_accept(self._listening)
            except OSError as error:
                log.warning("accepting failed", why=str(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            task = asyncio.create_task(self._shake_hands(plain, address))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _shake_hands(self, plain: socket.socket, address: tuple[Any, ...]) -> None:
        """From an accepted connection to one of aiohttp's; what goes wrong is one line."""
        task = asyncio.current_task()
        assert task is not None
        # Between other awaits this task would not be in the handshake, but it has only this one.
        guest = Guest(str(address[0]), task.cancel)
        if not self._door.enter(guest):
            plain.close()
            self._complain(address, "too many connections of this host, or in all")
            return
        assert self._runner.server is not None
        connection = Connection(self, self._runner.server(), guest, address)
        try:
            plain.setblocking(False)
            with tls.handshake_errors("the caller"):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection,
                    plain,
                    ssl=self._context,
                    ssl_handshake_timeout=self._handshake_deadline_s,
                    ssl_shutdown_timeout=_SHUTDOWN_DEADLINE_S,
                )
        except asyncio.CancelledError:
            self._door.leave(guest)
            if not guest.was_turned_away:
                raise
            self._complain(address, "too many connections that have not said who they are")
        except TransportError as error:
            self._door.leave(guest)
            self._complain(address, str(error))
        finally:
            if not connection.was_made:
                plain.close()

    def made(self, connection: Connection, transport: asyncio.Transport) -> None:
        """A handshake is done; the head of a request comes next."""
        self._connections[transport] = connection
        guest = connection.guest
        loop = asyncio.get_running_loop()
        guest.turn_away = lambda: loop.call_soon_threadsafe(
            connection.end, "too many connections that have not asked for anything"
        )
        connection.deadline = loop.call_later(
            self._head_deadline_s, connection.end, "no request came in time"
        )

    def lost(self, connection: Connection, transport: asyncio.BaseTransport) -> None:
        """A connection has ended."""
        self._connections.pop(transport, None)
        self._door.leave(connection.guest)

    def complain(self, connection: Connection, reason: str) -> None:
        """One line about a connection that is ended here."""
        self._complain(connection.address, reason)

    @web.middleware
    async def _admit(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """The head of a request is here: its connection waits no longer."""
        connection = None if request.transport is None else self._connections.get(request.transport)
        if connection is None or not self._door.admit(connection.guest):
            raise web.HTTPServiceUnavailable(text="too many connections")
        connection.settle()
        response: web.StreamResponse = await handler(request)
        return response

    def _complain(self, address: tuple[Any, ...], reason: str) -> None:
        fields = self._complaints.allow(str(address[0]))
        if fields is not None:
            peer = f"{address[0]}:{address[1]}"
            log.warning("connection refused", address=peer, reason=reason, **fields)


class Connection(asyncio.Protocol):
    """Stands in front of aiohttp's protocol, to see a connection begin and end."""

    def __init__(self, site: Site, served: Any, guest: Guest, address: tuple[Any, ...]) -> None:
        self._site = site
        self._served = served
        self.guest = guest
        self.address = address
        self.was_made = False
        self.deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.was_made = True
        self._transport = transport
        self._site.made(self, transport)
        self._served.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.settle()
        assert self._transport is not None
        self._site.lost(self, self._transport)
        self._served.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._served.data_received(data)

    def eof_received(self) -> None:
        self._served.eof_received()

    def pause_writing(self) -> None:
        self._served.pause_writing()

    def resume_writing(self) -> None:
        self._served.resume_writing()

    def settle(self) -> None:
        """What was waited for has come."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def end(self, reason: str) -> None:
        """End the connection now, because of this."""
        self.settle()
        if self._transport is not None and not self._transport.is_closing():
            self._site.complain(self, reason)
            self._transport.abort()
