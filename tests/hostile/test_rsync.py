"""A source whose rsync lies: the target's writes nothing outside of the container's root.

The real rsync runs on both sides; what the source's says is changed on its way. Names and options
have the length that they had, where the protocol counts bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from migrate import rootfs
from migrate.errors import TransferFailed
from migrate.rootfs import Passes, RootfsSource

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon's chroot needs root")

OPTION = b"--partial\0"


@dataclass(frozen=True)
class Instead:
    """Says something else wherever `before` would be said."""

    before: bytes
    after: bytes

    def __call__(self, data: bytes) -> bytes:
        return data.replace(self.before, self.after)


@dataclass
class Lie:
    """What is said in the place of what. `told` counts how often there was a chance."""

    change: Callable[[bytes], bytes] = lambda data: data
    told: int = 0
    _held: bytes = b""

    def __call__(self, data: bytes) -> bytes:
        data, self._held = self._held + data, b""
        if isinstance(self.change, Instead) and not self.told:
            data, self._held = self._without_a_beginning(data, self.change.before)
        changed = self.change(data)
        self.told += changed != data
        return changed

    def _without_a_beginning(self, data: bytes, word: bytes) -> tuple[bytes, bytes]:
        """A word may come in two pieces, as a pipe is read: its beginning waits for the rest."""
        for size in range(min(len(word) - 1, len(data)), 0, -1):
            if data.endswith(word[:size]):
                return data[:-size], data[-size:]
        return data, b""


class LyingChannel:
    """The source's end of a channel."""

    def __init__(self, channel: aiohttp.ClientWebSocketResponse, lie: Lie) -> None:
        self._channel = channel
        self._lie = lie

    async def send_bytes(self, data: bytes) -> None:
        if said := self._lie(data):
            await self._channel.send_bytes(said)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


@dataclass
class Hosts:
    """A target that serves passes, and a source that lies to it. `base` is all there is to see."""

    base: Path
    session: aiohttp.ClientSession
    port: int
    lie: Lie = field(default_factory=Lie)

    @property
    def source(self) -> Path:
        return self.base / "source"

    @property
    def target(self) -> Path:
        return self.base / "bundle" / "rootfs"

    async def copy(self) -> None:
        """One pass. Raises TransferFailed."""
        copier = RootfsSource(
            self.source, self.base / "work", self._open, host="A", target="B", patience_s=0.0
        )
        await copier.start(gated=False).wait(60)

    async def attack(self, change: Callable[[bytes], bytes]) -> bool:
        """One pass that lies; whether the target's rsync went along. Nothing is written outside."""
        before = self._outside()
        self.lie = Lie(change)
        try:
            await self.copy()
        except TransferFailed:
            went_along = False
        else:
            went_along = True
        assert self.lie.told, "the lie was never told"
        assert self._outside() == before
        self.lie = Lie()
        return went_along

    async def check_honest(self) -> None:
        """The same target serves an honest source."""
        (self.source / "honest").write_text("x")
        await self.copy()
        assert (self.target / "honest").read_text() == "x"

    async def _open(self, number: int) -> aiohttp.ClientWebSocketResponse:
        url = f"http://127.0.0.1:{self.port}/rootfs?pass={number}"
        channel = await self.session.ws_connect(url, compress=0)
        return cast("aiohttp.ClientWebSocketResponse", LyingChannel(channel, self.lie))

    def _outside(self) -> dict[str, tuple[object, ...]]:
        """Everything that is there besides what the target's rsync may write, and its log."""
        found: dict[str, tuple[object, ...]] = {"/zzescape": (Path("/zzescape").exists(),)}
        for path in self.base.rglob("*"):
            if path.is_relative_to(self.target) or path.is_relative_to(self.base / "target-work"):
                continue
            if path.is_relative_to(self.base / "work"):
                continue
            status = path.lstat()
            is_file = stat.S_ISREG(status.st_mode)
            content = path.read_bytes() if is_file else None
            found[str(path)] = (status.st_mode, status.st_uid, content)
        return found


@pytest.fixture
async def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosts]:
    # Each rsync that has lost its way is waited for.
    monkeypatch.setattr(rootfs, "END_DEADLINE_S", 1.0)
    for name in ("source", "work", "target-work", "outside", "bundle/rootfs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "secret").write_text("of another container")
    passes = Passes(tmp_path / "bundle/rootfs", tmp_path / "target-work")

    async def serve(request: web.Request) -> web.WebSocketResponse:
        channel = web.WebSocketResponse(compress=False)
        await channel.prepare(request)
        with contextlib.suppress(ConnectionError):
            await passes.serve(int(request.query["pass"]), channel)
        return channel

    app = web.Application()
    app.router.add_get("/rootfs", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        yield Hosts(tmp_path, session, runner.addresses[0][1])
    await passes.end()
    await runner.cleanup()


@pytest.mark.parametrize(
    "name",
    [b"../escape", b"/zzescape", b"zz/../../", b"zz\0escape", b"a/../../e", b"//../../x"],
    ids=["parent", "absolute", "above", "nul", "through", "slashes"],
)
async def test_names(hosts: Hosts, name: bytes) -> None:
    (hosts.source / "zzzescape").write_text("hostile")
    await hosts.attack(Instead(b"zzzescape", name))
    await hosts.check_honest()


async def test_a_link_that_leads_out_is_not_followed_out(hosts: Hosts) -> None:
    """First a link, then a file in the directory that it points to, links to be kept."""
    outside = hosts.base / "outside"
    (hosts.source / "out").symlink_to(outside)
    await hosts.copy()
    assert (hosts.target / "out").readlink() == outside
    (hosts.source / "out").unlink()
    (hosts.source / "out").mkdir()
    (hosts.source / "out" / "secret").write_text("hostile")
    await hosts.attack(Instead(OPTION, OPTION + b"--keep-dirlinks\0"))
    await hosts.check_honest()


@pytest.mark.parametrize(
    "option",
    [
        b"--log-file={}/outside/log",
        b"--temp-dir={}/outside",
        b"--partial-dir={}/outside",
        b"--backup\0--backup-dir=../../outside",
        b"--suffix=/../../../outside/x\0--backup",
        b"--compare-dest={}/outside",
        b"--link-dest={}/outside",
        b"--files-from={}/outside/secret",
        b"--write-batch={}/outside/batch",
        b"--no-munge-links",
        b"--chown=1:1",
        b"--daemon\0--config=/dev/null",
    ],
)
async def test_options(hosts: Hosts, option: bytes) -> None:
    (hosts.source / "secret").write_text("hostile")
    (hosts.target / "secret").write_text("something to make a backup of")
    told = option.replace(b"{}", str(hosts.base).encode())
    await hosts.attack(Instead(OPTION, OPTION + told + b"\0"))
    await hosts.check_honest()


async def test_a_module_with_a_path_in_it(hosts: Hosts) -> None:
    (hosts.source / "secret").write_text("hostile")
    await hosts.attack(Instead(b"rootfs/\0", b"rootfs/../../outside/\0"))
    await hosts.check_honest()


async def test_a_device_is_not_written_through(hosts: Hosts) -> None:
    """A source may bring devices, as containers have some, but never write what is behind them."""
    os.mknod(hosts.source / "disk", 0o600 | stat.S_IFBLK, os.makedev(7, 254))
    await hosts.copy()
    assert stat.S_ISBLK((hosts.target / "disk").lstat().st_mode)
    (hosts.source / "disk").unlink()
    (hosts.source / "disk").write_text("hostile")
    assert not await hosts.attack(Instead(OPTION, OPTION + b"--write-devices\0"))
    await hosts.check_honest()


@pytest.mark.parametrize("seed", range(4))
async def test_noise(hosts: Hosts, seed: int) -> None:
    """Bytes changed at random behind the greeting: rsync may give up, but nothing else happens."""
    chance = random.Random(seed)
    for number in range(30):
        (hosts.source / f"file-{number}").write_bytes(chance.randbytes(1000))

    def change(data: bytes) -> bytes:
        if data.startswith(b"@RSYNCD") or OPTION in data:
            return data
        noisy = bytearray(data)
        for _ in range(1 + len(noisy) // 300):
            noisy[chance.randrange(len(noisy))] ^= 1 << chance.randrange(8)
        return bytes(noisy)

    await hosts.attack(change)
    await hosts.check_honest()
