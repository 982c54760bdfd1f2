"""The agent's front, as the process that it is, over real TLS: root is needed to make it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migrate import config
from migrate.agent.front_keeper import Front
from migrate.agent.lending import LentDirectory
from tests.identities import Fleet
from tests.migrate.wire import Wire
from tests.transport.transfer_parts import Memory
from transport import tls
from transport.core.frames import Hello
from transport.core.transcript import Carried
from transport.errors import StreamRefusedError
from transport.identity import HostIdentity, Peer
from transport.ledger import carried_in
from transport.sender import PageSender
from transport.worker import ReadPages

DEADLINE_S = 60.0
TARGET = "target.test"
SOURCE = "source.test"
TICKET = bytes(range(32))
USER = 65530


async def until(what: str, condition: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  (of things that know no events)
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {DEADLINE_S} s: {what}") from None


class Directories:
    """What a session lends; a workspace, as far as the front's keeper knows it."""

    quota_bytes = 64 << 20

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lent = [LentDirectory(place / name, USER) for name in ("mem", "img", "kept")]

    def lend(self) -> list[int]:
        return [lent.descriptor() for lent in self._lent]

    def take_back(self) -> Carried:
        for lent in self._lent:
            lent.take_back()
        return carried_in(self.place / "kept")

    def memory(self, memory: Memory, task: int) -> bytes:
        with (self.place / "mem" / f"pages-{task}.img").open("rb") as file:
            file.seek(memory.base)
            return file.read(len(memory.content.tobytes()))

    def close(self) -> None:
        for lent in self._lent:
            lent.close()


class Rig:
    """A front, its keeper, and a source that knows it."""

    def __init__(self, base: Path, directories: Directories, fleet: Fleet) -> None:
        self.directories = directories
        self.paths = config.HostPaths(base / "run", base / "state", base / "config")
        fleet.host(TARGET, at=self.paths.tls.directory)
        self.identity = HostIdentity.load(fleet.host(SOURCE))
        self.asked: list[tuple[int, Peer]] = []
        self.is_open = True
        self.front = Front(self.paths, "127.0.0.1", 0, 0, self._sink_of)  # type: ignore[arg-type]

    def _sink_of(self, hello: Hello, peer: Peer) -> Directories | None:
        self.asked.append((hello.stream, peer))
        return self.directories if self.is_open and hello.ticket == TICKET else None

    @property
    def pid(self) -> int:
        now = self.front._now
        assert now is not None
        return now.process.pid

    def sender(self, memory: Memory, port: int = 0, read: ReadPages | None = None) -> PageSender:
        context = self.identity.client_context()
        at = port or self.front.data_port

        def open_stream(_: int) -> tls.ssl.SSLSocket:
            return tls.connect("127.0.0.1", at, context, server_name=TARGET)

        return PageSender(open_stream, ticket=TICKET, read=read or memory.read, streams=2)


@pytest.fixture
def directories() -> Iterator[Directories]:
    place = Path(tempfile.mkdtemp(prefix="front-", dir="/dev/shm"))
    directories = Directories(place)
    yield directories
    directories.close()
    shutil.rmtree(place)


@pytest.fixture
async def rig(tmp_path: Path, directories: Directories) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, directories, Fleet(tmp_path / "fleet"))
    await rig.front.start()
    yield rig
    await rig.front.stop()


def names_in(directory: str) -> set[str]:
    return set(os.listdir(directory))  # noqa: PTH208


def text(path: str | Path) -> str:
    return Path(path).read_text()


# -- what it is --


async def test_a_front_has_no_rights(rig: Rig) -> None:
    lines = text(f"/proc/{rig.pid}/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["Uid"].split() == status["Gid"].split() == [str(USER)] * 4
    assert status["Groups"].strip() == ""
    nothing = "0" * 16
    kinds = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {status[kind] for kind in kinds} == {nothing}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for kind in ("mnt", "net", "ipc", "uts"):
        there, here = (os.stat(f"/proc/{pid}/ns/{kind}") for pid in (rig.pid, "self"))  # noqa: PTH116
        assert there.st_ino != here.st_ino
    assert names_in(f"/proc/{rig.pid}/root") == {"agent.sock", "tls"}
    mounts = text(f"/proc/{rig.pid}/mounts").splitlines()
    assert len(mounts) == 1
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mounts[0].split()[3].split(","))


async def test_the_key_of_the_identity_is_out_of_its_reach(rig: Rig) -> None:
    given = f"/proc/{rig.pid}/root/tls"
    assert names_in(given) == {"ca.pem", "crl.pem", "host.pem"}
    secret = text(rig.paths.tls.identity).split("-----END")[0].splitlines()[1]
    assert len(secret) > 40
    assert not any(secret in text(f"{given}/{name}") for name in names_in(given))


async def test_what_is_renewed_or_revoked_becomes_the_fronts(rig: Rig) -> None:
    leaf = rig.paths.tls.leaf
    before = (rig.paths.front / "tls" / "host.pem").read_bytes()
    leaf.rename(leaf.with_suffix(".old"))
    HostIdentity.load(rig.paths.tls)
    await until("a new leaf", lambda: leaf.exists() and leaf.read_bytes() != before)
    there = rig.paths.front / "tls" / "host.pem"
    await until("it is copied", lambda: there.read_bytes() == leaf.read_bytes())
    await asyncio.to_thread(rig.sender(Memory(1)).connect)


# -- what arrives through it --


async def test_pages_and_files_arrive_and_are_kept_account_of(rig: Rig, tmp_path: Path) -> None:
    memory = Memory(700)
    image = tmp_path / "core-1.img"
    image.write_bytes(b"image")
    with rig.sender(memory) as sender:
        await asyncio.to_thread(sender.connect)
        await asyncio.to_thread(sender.send_round, 1, [(7, memory.runs)])
        await asyncio.to_thread(sender.send_files, [("core-1.img", image)])
        await asyncio.to_thread(rig.front.revoke, TICKET)
        carried = await asyncio.to_thread(rig.directories.take_back)
        assert carried == sender.carried()
    assert {file.name for file in carried.files} == {"core-1.img"}
    assert rig.directories.memory(memory, 7) == memory.content.tobytes()
    assert (rig.directories.place / "img" / "core-1.img").read_bytes() == b"image"
    assert {(index, peer.name) for index, peer in rig.asked} == {(0, SOURCE), (1, SOURCE)}


async def test_a_stream_goes_on_with_the_next_front(rig: Rig) -> None:
    memory = Memory(4000)
    wire = Wire(rig.front.data_port)
    await wire.start()
    killed = threading.Event()
    first = rig.pid
    loop = asyncio.get_running_loop()

    def read(task: int, runs: np.ndarray, out: memoryview) -> np.ndarray:
        if memory.reads == 5 and not killed.is_set():
            killed.set()
            loop.call_soon_threadsafe(rig.front.kill)
        return memory.read(task, runs, out)

    with rig.sender(memory, wire.port, read) as sender:
        await asyncio.to_thread(sender.connect)
        await asyncio.to_thread(sender.send_round, 1, [(7, memory.runs)])
        assert killed.is_set()
        await until("another front", lambda: rig.pid != first)
        memory.rewrite(3, 5)
        await asyncio.to_thread(sender.send_round, 2, [(7, memory.runs_of(3, 5))])
        await asyncio.to_thread(rig.front.revoke, TICKET)
        assert await asyncio.to_thread(rig.directories.take_back) == sender.carried()
    assert rig.directories.memory(memory, 7) == memory.content.tobytes()
    await wire.close()


async def test_a_ticket_that_the_agent_does_not_know(rig: Rig) -> None:
    rig.is_open = False
    with rig.sender(Memory(1)) as sender, pytest.raises(StreamRefusedError):
        await asyncio.to_thread(sender.connect)
