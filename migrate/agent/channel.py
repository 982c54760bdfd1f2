"""The target's end of a session's control channel: one conversation over any number of connections.

    connection 1 ──breaks──┐            ┌── connection 2: "heard 3", then what it has not heard
                           └─ patience ─┘
                                   └──────── over: the link is lost

What the session tells while there is no connection waits in the outbox. A connection that takes
over ends the former one first. How long a broken link is waited for depends on how it ended:

- with a closing frame: not at all, the source has said that it goes
- by the source's kernel (FIN), as of a process that died: `config.LINK_ORPHAN_S`
- by a reset or by silence: as long as the source tries, and a bit more

and on the session, which is asked how long its source tries (`patience_s`; 0: at once). This
module does not know what messages mean.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from migrate import config
from migrate.agent.front_link import HUNG_UP, REFUSED
from migrate.core import messages
from migrate.core.outbox import Outbox
from migrate.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger()

# What fits in a closing frame besides its code (RFC 6455, 5.5).
_CLOSING_BYTES_MAX = 123
# ASCII digits alone, below messages.MAX_HEARD.
_COUNT = re.compile(r"[0-9]{1,9}")


class Connection:
    """One WebSocket of the source, as the front hands it on, from the request that opens it."""

    def __init__(self, request: web.Request) -> None:
        self.socket = web.WebSocketResponse(
            heartbeat=config.HEARTBEAT_S,
            compress=False,
            max_msg_size=messages.MAX_MESSAGE_BYTES,
        )
        assert request.transport is not None
        self._transport = request.transport

    def was_hung_up(self) -> bool:
        """Whether the source's kernel has ended it in order, as the front says. When it has
        ended."""
        return self.socket.close_code == HUNG_UP

    def abort(self) -> None:
        """End it now, without a word."""
        self._transport.abort()


class ControlChannel:
    """See the module. `hear` takes the messages one by one; `lost` and `back` tell of the link."""

    def __init__(
        self,
        hear: Callable[[messages.SourceMessage], Awaitable[None]],
        *,
        lost: Callable[[], Awaitable[None]],
        back: Callable[[], Awaitable[None]],
        patience_s: Callable[[], float],
    ) -> None:
        self._hear = hear
        self._lost = lost
        self._back = back
        self._patience_s = patience_s
        self._outbox = Outbox()
        self._heard = 0
        self._connection: Connection | None = None
        self._hearing = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._waiting: asyncio.Task[None] | None = None
        self._is_lost = False
        self._is_over = False
        # Whether the source has ever come.
        self.was_open = False

    @property
    def is_open(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None

    async def answer(self, request: web.Request) -> web.WebSocketResponse:
        """Speak over the connection that `request` opens, until it ends.

        `?heard=N` says how many messages the source has heard, and goes on from there; without,
        both sides begin anew, whatever was told before. 409 answers a number that can't be.
        """
        heard = _heard(request)
        if heard is not None and not self._outbox.can_resume(heard):
            raise web.HTTPConflict(text="one of both ends has lost what it had told")
        connection = Connection(request)
        try:
            await connection.socket.prepare(request)
            await self._serve(connection, heard)
        except ConnectionError as error:
            log.info("the connection broke as it began", why=str(error))
        except ProtocolError as error:
            log.warning("message refused", why=str(error))
            await connection.socket.close(
                code=WSCloseCode.PROTOCOL_ERROR, message=str(error).encode()[:_CLOSING_BYTES_MAX]
            )
        return connection.socket

    async def _serve(self, connection: Connection, heard: int | None) -> None:
        is_end = False
        try:
            await self._take_over(connection, heard)
            is_end = await self._listen(connection)
        except ProtocolError:
            is_end = True
            raise
        except ConnectionError as error:
            log.info("the connection broke", why=str(error))
        finally:
            if self._connection is connection:
                self._connection = None
                await self._broke(0.0 if is_end else self._grace_s(connection))

    async def tell(self, message: messages.TargetMessage) -> None:
        """Send to the source, now or when it is back; a telling never fails: the machine's rule."""
        text = messages.encode(message).decode()
        if isinstance(message, messages.Pong):
            await self._send(text)
            return
        async with self._sending:
            self._outbox.add(text)
            await self._send(text)

    async def part(self, why: str) -> None:
        """End the conversation: the source is told that there is nothing to come back to."""
        self._is_over = True
        if self._waiting is not None:
            self._stop_waiting()
            await self._lose()
        if self._connection is not None:
            await self._connection.socket.close(
                code=WSCloseCode.GOING_AWAY, message=why.encode()[:_CLOSING_BYTES_MAX]
            )

    async def _take_over(self, connection: Connection, heard: int | None) -> None:
        """Make this connection the channel, the former one ended, and say what was not heard."""
        self._cut()
        # What the former one has brought is heard to its end, and counted.
        async with self._hearing, self._sending:
            # Another one may have been quicker.
            self._cut()
            if heard is None:
                self._outbox, self._heard, heard = Outbox(), 0, 0
            again = self._outbox.resume(heard)
            self._stop_waiting()
            self._connection = connection
            self.was_open = True
            for message in (messages.encode(messages.Heard(self._heard)).decode(), *again):
                await connection.socket.send_str(message)
        if self._is_lost:
            self._is_lost = False
            await self._back()

    def _cut(self) -> None:
        former, self._connection = self._connection, None
        if former is not None:
            former.abort()

    async def _listen(self, connection: Connection) -> bool:
        """Hear messages until the connection ends; whether the source has ended it itself, or has
        said what may not be said."""
        while (frame := await connection.socket.receive()).type is WSMsgType.TEXT:
            async with self._hearing:
                if self._connection is not connection:
                    return False
                message = messages.decode_from_source(frame.data)
                if not isinstance(message, messages.Ping):
                    self._heard += 1
                await self._hear(message)
        if frame.type is WSMsgType.BINARY:
            raise ProtocolError("a control channel carries text")
        return frame.type is WSMsgType.CLOSE and frame.data in (WSCloseCode.OK, REFUSED)

    def _grace_s(self, connection: Connection) -> float:
        patience_s = 0.0 if self._is_over else self._patience_s()
        if patience_s == 0:
            return 0.0
        grace_s = patience_s + config.LINK_GRACE_MORE_S
        return min(config.LINK_ORPHAN_S, grace_s) if connection.was_hung_up() else grace_s

    async def _broke(self, grace_s: float) -> None:
        if grace_s == 0:
            await self._lose()
            return
        log.info("the link is broken", waiting_s=grace_s)
        self._waiting = asyncio.create_task(self._lose_after(grace_s))

    async def _lose_after(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        self._waiting = None
        await self._lose()

    async def _lose(self) -> None:
        self._is_lost = True
        await self._lost()

    def _stop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()

    async def _send(self, text: str) -> None:
        if self._connection is not None:
            try:
                await self._connection.socket.send_str(text)
            except ConnectionError:
                log.info("the source does not hear")


def _heard(request: web.Request) -> int | None:
    text = request.query.get("heard")
    if text is None:
        return None
    if not _COUNT.fullmatch(text):
        raise web.HTTPBadRequest(text="heard is a number of messages")
    return int(text)
