"""One WebSocket of a peer, and one of the agent behind the front: what comes on one goes on on the
other, message by message, checked.

    peer ══TLS══ near ⇄ [check] ⇄ far ──unix socket── agent

How the peer's connection ends is told as a closing frame: in order (its own word), or one of the
codes of front_link.py. What the agent closes is closed with its words; what it aborts is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web

from migrate.agent.front_link import BROKEN, HUNG_UP, REFUSED
from migrate.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # The message as it is handed on; ProtocolError for one that may not be.
    CheckText = Callable[[str], str]

# For the other end to answer a closing frame; the agent's is on this host.
CLOSE_DEADLINE_S = 2.0
# What fits in a closing frame besides its code (RFC 6455, 5.5).
CLOSING_BYTES_MAX = 123
# TCP_CLOSE_WAIT of include/net/tcp_states.h: the peer has ended its side in order.
_CLOSE_WAIT = 8


class Relay:
    """See the module. `near` is made, not prepared; `tcp` is what it will be on, by a descriptor
    of its own: its state can be read after the event loop has closed the other one. `far` is
    open. `run` lasts until both have ended."""

    def __init__(
        self,
        near: web.WebSocketResponse,
        far: aiohttp.ClientWebSocketResponse,
        tcp: socket.socket,
        check_text: CheckText,
        *,
        carries_bytes: bool,
    ) -> None:
        self._tcp = tcp
        self._near = near
        self._far = far
        self._check_text = check_text
        self._carries_bytes = carries_bytes

    async def run(self, request: web.Request) -> None:
        """Carry messages both ways. Raises ProtocolError for a peer's, its connection closed."""
        try:
            if request.transport is None:
                raise ConnectionResetError("the peer has gone before it was answered")
            await self._near.prepare(request)
            await self._carry()
        except ConnectionError:
            await self._close_far(BROKEN)

    async def _carry(self) -> None:
        inwards = asyncio.create_task(self._carry_in())
        outwards = asyncio.create_task(self._carry_out())
        try:
            done, _ = await asyncio.wait({inwards, outwards}, return_when=asyncio.FIRST_COMPLETED)
            if outwards in done:
                await self._close_near(outwards.result())
                return
            try:
                how = inwards.result()
            except ProtocolError as error:
                await self._close_far(REFUSED)
                words = str(error).encode()[:CLOSING_BYTES_MAX]
                await self._near.close(code=WSCloseCode.PROTOCOL_ERROR, message=words)
                raise
            await self._close_far(_code_of(how, self._tcp))
        finally:
            for task in (inwards, outwards):
                task.cancel()
            await asyncio.wait({inwards, outwards})

    async def _carry_in(self) -> aiohttp.WSMessage:
        """From the peer to the agent; returns how the peer has ended."""
        while True:
            frame = await self._near.receive()
            if frame.type is WSMsgType.TEXT:
                await _told(self._far.send_str(self._check_text(frame.data)))
            elif frame.type is WSMsgType.BINARY:
                if not self._carries_bytes:
                    raise ProtocolError("a control channel carries text")
                await _told(self._far.send_bytes(frame.data))
            else:
                return frame

    async def _carry_out(self) -> aiohttp.WSMessage:
        """From the agent to the peer; returns how the agent has ended."""
        while True:
            frame = await self._far.receive()
            try:
                if frame.type is WSMsgType.TEXT:
                    await self._near.send_str(frame.data)
                elif frame.type is WSMsgType.BINARY:
                    await self._near.send_bytes(frame.data)
                else:
                    return frame
            except ConnectionError:
                # Its end is heard where it is listened to; nothing more can be said to it.
                await asyncio.Event().wait()

    async def _close_near(self, how: aiohttp.WSMessage) -> None:
        if how.type is not WSMsgType.CLOSE:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._tcp.shutdown(socket.SHUT_RDWR)
            return
        words = (how.extra or "").encode()[:CLOSING_BYTES_MAX]
        await self._near.close(code=how.data or WSCloseCode.OK, message=words)

    async def _close_far(self, code: int) -> None:
        with contextlib.suppress(ConnectionError):
            await self._far.close(code=code)


async def _told(sending: Awaitable[None]) -> None:
    """The agent's end is heard by whoever listens to it, with the words that it ended with."""
    with contextlib.suppress(ConnectionError):
        await sending


def _code_of(how: aiohttp.WSMessage, tcp: socket.socket) -> int:
    """What the agent is told of a peer's end; how the peer calls it counts only for OK."""
    if how.type is WSMsgType.CLOSE and how.data == WSCloseCode.OK:
        return WSCloseCode.OK
    if how.type is not WSMsgType.CLOSE and _is_hung_up(tcp):
        return HUNG_UP
    return BROKEN


def _is_hung_up(tcp: socket.socket) -> bool:
    """Whether the peer's kernel has ended the connection in order. When it has ended."""
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSE_WAIT
