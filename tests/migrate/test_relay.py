"""A WebSocket of a peer that the front hands on to the agent: how it ends is told as it was."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from migrate.agent.front_link import BROKEN
from migrate.agent.relay import Relay

DEADLINE_S = 30.0
GREETING = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER for 0 seconds: closed by a reset."""


class Stage:
    """An agent, and a front that relays to it; the agent answers when `gate` is open."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.gate = asyncio.Event()
        self.asked, self.relayed = asyncio.Event(), asyncio.Event()
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.failure: BaseException | None = None
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        front, agent = web.Application(), web.Application()
        front.router.add_get("/", self._front)
        agent.router.add_get("/", self._agent)
        for app in (front, agent):
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            self._runners.append(runner)
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        await web.SockSite(self._runners[0], listening).start()
        await web.UnixSite(self._runners[1], self.path).start()

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _agent(self, request: web.Request) -> web.StreamResponse:
        self.asked.set()
        await self.gate.wait()
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        await channel.receive()
        self.ended.set_result(channel.close_code)
        return channel

    async def _front(self, request: web.Request) -> web.StreamResponse:
        near = web.WebSocketResponse()
        assert request.transport is not None
        tcp = request.transport.get_extra_info("socket").dup()
        connector = aiohttp.UnixConnector(self.path)
        try:
            async with aiohttp.ClientSession(connector=connector) as client:
                far = await client.ws_connect("http://agent/")
                await Relay(near, far, tcp, str, carries_bytes=False).run(request)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            tcp.close()
            self.relayed.set()
        return near


@pytest.fixture
async def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "agent.sock")


async def test_a_peer_that_is_reset_before_it_is_answered(stage: Stage) -> None:
    """Its link broke; it has not said that it leaves. (aiohttp 3.11 would fail over it.)"""
    await stage.start()
    async with asyncio.timeout(DEADLINE_S):
        _, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        writer.write(GREETING)
        await stage.asked.wait()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        writer.transport.abort()
        # The front hears of it in a turn of its loop, which is this one.
        while any(one.transport for one in connections(stage._runners[0])):  # noqa: ASYNC110
            await asyncio.sleep(0)
        stage.gate.set()
        assert await stage.ended == BROKEN
        await stage.relayed.wait()
    assert stage.failure is None
    await stage.stop()


def connections(runner: web.AppRunner) -> list[web.RequestHandler]:
    assert runner.server is not None
    return list(runner.server.connections)
