"""A thousand connections that take their time, on both ports: others are served meanwhile, and the
process stays as small as it was."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.identities import Fleet
from tests.migrate.test_front import TARGET, Directories, Rig
from tests.transport.transfer_parts import DEADLINE_S, Memory, wait_until
from transport import tls
from transport.door import INSIDE_OF_ONE_MAX, WAITING_MAX
from transport.identity import TlsIdentity

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a front is made by root")

CONNECTIONS = 1000
ADDRESS = "127.0.0.1"
ATTACKER = "127.0.0.66"
# Each that waits or is inside has a thread, or a buffer of 256 KiB; so have some that were turned
# away, until the garbage is collected. A thousand such buffers are 250 MiB.
GROWTH_BYTES_MAX = 128 << 20
DESCRIPTORS_MAX = 2 * (WAITING_MAX + INSIDE_OF_ONE_MAX) + 100
# A quarter of a ClientHello: the record's head promises 512 bytes.
HALF_A_HANDSHAKE = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)


@dataclass
class Ports:
    """A front, the contexts of an honest host and of a hostile one, both enrolled."""

    rig: Rig
    process: psutil.Process
    hostile: ssl.SSLContext
    log: Path

    @property
    def honest(self) -> ssl.SSLContext:
        return self.rig.identity.client_context()

    def check_others(self) -> None:
        """An honest host is served on both ports, over connections that it opens now."""
        for _ in range(5):
            port = self.rig.front.port
            with tls.connect(ADDRESS, port, self.honest, server_name=TARGET) as stream:
                stream.settimeout(DEADLINE_S)
                stream.sendall(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: stream.recv(4096), b""))
                assert answer.startswith(b"HTTP/1.1 404 Not Found"), answer
        memory = Memory(300)
        with self.rig.sender(memory) as sender:
            sender.send_round(1, [(1, memory.runs)])


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


@pytest.fixture
async def ports(tmp_path: Path) -> AsyncIterator[Ports]:
    fleet = Fleet(tmp_path / "fleet")
    place = Path(tempfile.mkdtemp(prefix="front-", dir="/dev/shm"))
    directories = Directories(place)
    rig = Rig(tmp_path, directories, fleet)
    log = tmp_path / "log"
    with log.open("w") as file, standard_error(file.fileno()):
        await rig.front.start()
    hostile = TlsIdentity(fleet.host("hostile.test")).client_context()
    yield Ports(rig, psutil.Process(rig.pid), hostile, log)
    await rig.front.stop()
    directories.close()
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CONNECTIONS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Flood:
    """Connections of the attacker to one port; `begin` is what each does before it falls silent."""

    def __init__(self, port: int, begin: Callable[[socket.socket], socket.socket]) -> None:
        self._port = port
        self._begin = begin
        self.connections: list[socket.socket] = []

    def __enter__(self) -> Flood:
        threads = [threading.Thread(target=self._open, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.connections:
            one.close()

    def _open(self, part: int) -> None:
        for _ in range(part, CONNECTIONS, 4):
            plain = socket.create_connection(
                (ADDRESS, self._port), timeout=DEADLINE_S, source_address=(ATTACKER, 0)
            )
            try:
                self.connections.append(self._begin(plain))
            except OSError:  # turned away already
                plain.close()


def silent(plain: socket.socket) -> socket.socket:
    return plain


def half_a_handshake(plain: socket.socket) -> socket.socket:
    plain.sendall(HALF_A_HANDSHAKE)
    return plain


def check(ports: Ports, begin: Callable[[socket.socket], socket.socket]) -> None:
    """Others are served while the floods last; memory, descriptors and the log stay bounded."""
    ports.check_others()
    before_bytes = ports.process.memory_info().rss
    control, data = (
        Flood(port, begin) for port in (ports.rig.front.port, ports.rig.front.data_port)
    )
    with control, data:
        ports.check_others()
        assert ports.process.memory_info().rss - before_bytes < GROWTH_BYTES_MAX
        assert ports.process.num_fds() < DESCRIPTORS_MAX
    wait_until(lambda: ports.process.num_fds() < 60, "the connections are gone")
    ports.check_others()
    assert ports.process.is_running()
    lines = ports.log.read_text().splitlines()
    about = [line for line in lines if ATTACKER in line]
    assert 2 <= len(about) < 200, lines
    assert all("reason=" in line for line in about)
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("begin", [silent, half_a_handshake])
async def test_strangers(ports: Ports, begin: Callable[[socket.socket], socket.socket]) -> None:
    await asyncio.to_thread(check, ports, begin)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"POST /v1/sessions HT",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx",
    ],
    ids=["nothing", "half-a-head", "half-a-body"],
)
async def test_a_host_that_is_enrolled(ports: Ports, text: bytes) -> None:
    """It gets further, and no further than its share."""

    def begin(plain: socket.socket) -> socket.socket:
        stream = ports.hostile.wrap_socket(plain, server_hostname=TARGET)
        stream.sendall(text)
        return stream

    await asyncio.to_thread(check, ports, begin)
