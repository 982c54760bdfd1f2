"""A thousand connections that take their time, on both ports: others are served meanwhile, and the
process stays as small as it was."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.hostile.scene import ADDRESS, Scene
from tests.migrate.test_front import TARGET
from tests.transport.transfer_parts import DEADLINE_S, wait_until
from transport.door import INSIDE_OF_ONE_MAX, WAITING_MAX

CONNECTIONS = 1000
ATTACKER = "127.0.0.66"
# Each that waits or is inside has a thread, or a buffer of 256 KiB; so have some that were turned
# away, until the garbage is collected. A thousand such buffers are 250 MiB.
GROWTH_BYTES_MAX = 128 << 20
DESCRIPTORS_MAX = 2 * (WAITING_MAX + INSIDE_OF_ONE_MAX) + 100
# A quarter of a ClientHello: the record's head promises 512 bytes.
HALF_A_HANDSHAKE = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)


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


def check(scene: Scene, begin: Callable[[socket.socket], socket.socket]) -> None:
    """Others are served while the floods last; memory, descriptors and the log stay bounded."""
    scene.check_others()
    before_bytes = scene.process.memory_info().rss
    control, data = (Flood(port, begin) for port in scene.ports)
    with control, data:
        scene.check_others()
        assert scene.process.memory_info().rss - before_bytes < GROWTH_BYTES_MAX
        assert scene.process.num_fds() < DESCRIPTORS_MAX
    wait_until(lambda: scene.process.num_fds() < 60, "the connections are gone")
    scene.check_others()
    about = [line for line in scene.lines() if ATTACKER in line]
    assert 2 <= len(about) < 200, about
    assert all("reason=" in line for line in about)
    assert "Traceback" not in "".join(scene.lines())


@pytest.mark.parametrize("begin", [silent, half_a_handshake])
async def test_strangers(scene: Scene, begin: Callable[[socket.socket], socket.socket]) -> None:
    await asyncio.to_thread(check, scene, begin)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"POST /v1/sessions HT",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx",
    ],
    ids=["nothing", "half-a-head", "half-a-body"],
)
async def test_a_host_that_is_enrolled(scene: Scene, text: bytes) -> None:
    """It gets further, and no further than its share."""
    hostile = scene.host("hostile.test")

    def begin(plain: socket.socket) -> socket.socket:
        stream = hostile.wrap_socket(plain, server_hostname=TARGET)
        stream.sendall(text)
        return stream

    await asyncio.to_thread(check, scene, begin)
