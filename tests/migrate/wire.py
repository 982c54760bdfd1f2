"""A wire between two ends of a connection on this machine, which a test can break."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Wire:
    """Passes connections on to `port`, until it breaks them."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.port = 0
        # Bytes after which a connection is reset; drawn for each of its directions.
        self.budget: Callable[[], int] = lambda: 1 << 40

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Connections are refused from now on; those that are there stay."""
        assert self._server is not None
        self._server.close()

    async def close(self) -> None:
        """End everything; returns when nothing is left."""
        await self.stop()
        self.reset()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def reset(self) -> None:
        """Both ends of every connection get a reset."""
        for pair in self._pairs:
            for writer in pair:
                self._abort(writer)
        self._pairs.clear()

    def hang_up(self) -> None:
        """The target's end of every connection gets a FIN, as if the source had died."""
        for near, far in self._pairs:
            far.close()
            self._abort(near)
        self._pairs.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there, far = await asyncio.open_connection("127.0.0.1", self._target)
        self.connections += 1
        pair = (writer, far)
        self._pairs.append(pair)
        await asyncio.gather(self._pump(reader, far, pair), self._pump(there, writer, pair))
        for each in pair:
            each.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        left = self.budget()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(min(4096, left)):
                writer.write(data)
                await writer.drain()
                left -= len(data)
                if left <= 0:
                    for each in pair:
                        self._abort(each)
                    return
            writer.close()

    @staticmethod
    def _abort(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
