"""The agent's front, as the process that it is, over real TLS: root is needed to make it."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from migrate import config
from migrate.agent.app import Agent
from migrate.agent.front_keeper import Front
from migrate.agent.front_link import PEER_HEADER, Caller
from migrate.agent.lending import LentDirectory
from migrate.core import messages as m
from tests.identities import Fleet
from tests.migrate.wire import Wire
from tests.transport.transfer_parts import Memory
from transport import tls
from transport.core.frames import Hello
from transport.core.transcript import Carried
from transport.errors import StreamRefusedError
from transport.fan import Outlet
from transport.identity import HostIdentity, IdentityPaths, Peer
from transport.ledger import carried_in
from transport.sender import PageSender
from transport.worker import ReadPages

DEADLINE_S = 60.0
TARGET = "target.test"
SOURCE = "source.test"
HERE = socket.gethostname()
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

        def open_stream(_: int) -> ssl.SSLSocket:
            return tls.connect("127.0.0.1", at, context, server_name=TARGET)

        return PageSender([Outlet(open_stream, TICKET)], read=read or memory.read, streams=2)


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
    rig.front.socket.close()


def owner_of(paths: IdentityPaths) -> Peer:
    return HostIdentity.load(paths).owner


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


# -- what a peer says through it --


class Served:
    """An agent with its front, and somebody who speaks to it over TLS."""

    def __init__(self, base: Path) -> None:
        self.paths = config.HostPaths(base / "run", base / "state", base / "config")
        self.fleet = Fleet(base / "fleet")
        self.fleet.host(HERE, at=self.paths.tls.directory)
        self.agent = Agent(self.paths, {}, "127.0.0.1", 0, 0)

    async def say(
        self, who: IdentityPaths, method: str, path: str, data: bytes, **headers: str
    ) -> tuple[int, str]:
        context = HostIdentity.load(who).client_context()
        url = f"https://127.0.0.1:{self.agent.ports[0]}{path}"
        async with (
            aiohttp.ClientSession() as client,
            client.request(
                method,
                url,
                data=io.BytesIO(data),
                headers=headers,
                ssl=context,
                server_hostname=HERE,
            ) as answer,
        ):
            return answer.status, await answer.text()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    serving = asyncio.create_task(served.agent.serve())
    await until("it serves", lambda: served.agent._front._tasks or serving.done())
    yield served
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


RECOVER = m.encode(m.Recover("m-1", "target"))


async def test_who_calls_is_who_has_proven_it(served: Served) -> None:
    operator = served.fleet.operator("ada")
    other = served.fleet.host("other.test")
    status, words = await served.say(operator, "POST", "/v1/operator", RECOVER)
    assert (status, words) == (404, "this agent has no such migration in its hands")
    claim = Caller.of(owner_of(operator)).header()
    status, words = await served.say(other, "POST", "/v1/operator", RECOVER, **{PEER_HEADER: claim})
    assert (status, words) == (403, "only an operator or this host itself may say that")


async def test_nobody_but_the_front_is_heard(served: Served, tmp_path: Path) -> None:
    """Not even root: what runs beside the agent has certificates to show, as everybody has."""
    path = str(served.paths.front / "agent.sock")
    claim = Caller.of(owner_of(served.fleet.operator("ada"))).header()
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as client,
        client.post(
            "http://agent/v1/operator", data=RECOVER, headers={PEER_HEADER: claim}
        ) as answer,
    ):
        assert answer.status == 403


REFUSED: tuple[tuple[Any, ...], ...] = (
    ("POST", "/v1/sessions", b"{", 409),
    ("POST", "/v1/sessions", b"[" * 100_000, 409),
    ("POST", "/v1/sessions", bytes(m.MAX_MESSAGE_BYTES + 1), 413),
    ("POST", "/v1/migrations/m-1/target", b'{"type":"unheard-of"}', 409),
    ("POST", "/v1/migrations/../target", RECOVER, 404),
    ("POST", "/v1/migrations/a%2Fb/target", RECOVER, 404),
    ("POST", "/v1/migrations/" + "a" * 65 + "/target", RECOVER, 404),
    ("PUT", "/v1/crl", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", 409),
    ("GET", "/v1/sessions/m-1/control?heard=-1", b"", 400),
    ("GET", "/v1/sessions/m-1/rootfs?pass=1e3", b"", 400),
    ("GET", "/v1/sessions/m-1/control", b"", 404),
    ("GET", "/", b"", 404),
)


async def test_what_may_not_be_said_does_not_get_through(served: Served) -> None:
    host = served.fleet.host("other.test")
    answers = [(await served.say(host, *words), expected) for *words, expected in REFUSED]
    assert [status for (status, _), _ in answers] == [expected for _, expected in answers]
    status, _ = await served.say(host, "PUT", "/v1/crl", served.fleet.authority.crl_pem)
    assert status == 204
