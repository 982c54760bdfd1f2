"""A front as the process that it is, and what a test needs to attack it and see the outcome."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from tests.identities import Fleet
from tests.migrate.test_front import SOURCE, TARGET, Directories, Rig
from tests.transport.transfer_parts import DEADLINE_S, Memory
from transport import tls
from transport.core.frames import Hello
from transport.fan import Outlet
from transport.identity import HostIdentity, IdentityPaths, Peer
from transport.sender import PageSender

ADDRESS: Final = "127.0.0.1"


class Sessions(Rig):
    """A front whose agent has as many sessions of SOURCE as a test begins."""

    def __init__(self, base: Path, place: Path, fleet: Fleet) -> None:
        self._place = place
        self.sessions: dict[bytes, Directories] = {}
        super().__init__(base, self._lend("unused"), fleet)

    def begin(self) -> bytes:
        """The ticket of another session."""
        ticket = os.urandom(32)
        self.sessions[ticket] = self._lend(f"session-{len(self.sessions)}")
        return ticket

    def close(self) -> None:
        for one in (self.directories, *self.sessions.values()):
            one.close()

    def _lend(self, name: str) -> Directories:
        (self._place / name).mkdir()
        return Directories(self._place / name)

    def _sink_of(self, hello: Hello, peer: Peer) -> Directories | None:
        return self.sessions.get(hello.ticket) if peer.name == SOURCE else None


class Scene:
    """A fleet, a front in it, and the front's log."""

    def __init__(self, base: Path, place: Path) -> None:
        self.fleet = Fleet(base / "fleet")
        self.rig = Sessions(base, place, self.fleet)
        self.place = place
        self._log = base / "log"

    async def start(self) -> None:
        with self._log.open("w") as file, standard_error(file.fileno()):
            await self.rig.front.start()
        self.process = psutil.Process(self.rig.pid)

    async def stop(self) -> None:
        await self.rig.front.stop()
        # The agent's HTTP server would close it.
        self.rig.front.socket.close()
        self.rig.close()

    @property
    def ports(self) -> tuple[int, int]:
        """For control, and for data."""
        return self.rig.front.port, self.rig.front.data_port

    def lines(self) -> list[str]:
        """The front's log so far."""
        return self._log.read_text().splitlines()

    def host(self, name: str) -> ssl.SSLContext:
        """For calling as another host of the fleet."""
        return HostIdentity.load(self.fleet.host(name)).client_context()

    def identity(self, name: str) -> IdentityPaths:
        return self.fleet.host(name)

    def ask(self, context: ssl.SSLContext) -> bytes:
        """The first line of the answer to a request over the control port."""
        with tls.connect(ADDRESS, self.ports[0], context, server_name=TARGET) as stream:
            stream.settimeout(DEADLINE_S)
            with tls.handshake_errors(TARGET):
                stream.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: stream.recv(4096), b""))
        return answer.partition(b"\r\n")[0]

    def check_others(self) -> None:
        """The source of a session is served on both ports, over connections that it opens now."""
        context = self.rig.identity.client_context()
        for _ in range(5):
            assert self.ask(context) == b"HTTP/1.1 404 Not Found"
        memory = Memory(300)
        ticket = self.rig.begin()

        def opened(_index: int) -> ssl.SSLSocket:
            return tls.connect(ADDRESS, self.ports[1], context, server_name=TARGET)

        with PageSender([Outlet(opened, ticket)], read=memory.read, streams=2) as sender:
            sender.send_round(1, [(1, memory.runs)])
        assert self.rig.sessions[ticket].memory(memory, 1) == memory.content.tobytes()
        assert self.process.is_running()


@contextmanager
def standard_error(descriptor: int) -> Iterator[None]:
    """Of this process, for children that are started meanwhile."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
