"""rsync through a WebSocket, with the real rsync on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import psutil
import pytest
from aiohttp import web

from migrate import config, rootfs
from migrate.errors import TransferFailed
from migrate.rootfs import CHUNK_BYTES, PASSES_MAX, Passes, RootfsSource, shared_file_mappings
from migrate.rootfs_snapshot import RootfsSnapshot
from tests.migrate.wire import Wire
from transport.core.bucket import BURST_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon's chroot needs root")


class Pair:
    """A source directory, a target directory, and a wire between them."""

    def __init__(self, base: Path, session: aiohttp.ClientSession, wire: Wire) -> None:
        self.wire = wire
        self.source = base / "source"
        self.target = base / "target"
        self.work = base / "work"
        self.bytes_s = float("inf")
        self.asked = 0
        self.copier = RootfsSource(
            self.source,
            self.work,
            lambda number: session.ws_connect(
                f"http://127.0.0.1:{wire.port}/rootfs?pass={number}", compress=0
            ),
            host="A",
            target="B",
            patience_s=2.0,
            rate=self._rate,
        )

    def _rate(self) -> float:
        self.asked += 1
        return self.bytes_s


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    passes = Passes(tmp_path / "target", tmp_path / "target-work")

    async def serve(request: web.Request) -> web.WebSocketResponse:
        if not passes.can_serve(int(request.query["pass"])):
            raise web.HTTPConflict
        channel = web.WebSocketResponse(compress=False)
        await channel.prepare(request)
        with contextlib.suppress(ConnectionError):
            await passes.serve(int(request.query["pass"]), channel)
        return channel

    app = web.Application()
    app.router.add_get("/rootfs", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    wire = Wire(runner.addresses[0][1])
    await wire.start()
    for name in ("source", "target", "work", "target-work"):
        (tmp_path / name).mkdir()
    async with aiohttp.ClientSession() as session:
        yield Pair(tmp_path, session, wire)
    await passes.end()
    await wire.close()
    await runner.cleanup()


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a container could notice of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes()
        xattrs = () if path.is_symlink() else tuple(sorted(os.listxattr(path)))
        # rsync keeps the times of files only: those of devices, and of directories that it makes
        # hard links in, become the present.
        mtime_ns = status.st_mtime_ns if path.is_file() and not path.is_symlink() else 0
        key = str(path.relative_to(top))
        facts = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, mtime_ns)
        found[key] = (*facts, content, xattrs)
    return found


def populate(top: Path) -> None:
    (top / "etc").mkdir()
    (top / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    os.link(top / "etc/passwd", top / "etc/passwd-")
    (top / "link").symlink_to("/etc/passwd")
    (top / "escape").symlink_to("../../../../etc")
    with (top / "sparse").open("wb") as file:
        file.truncate(8 << 20)
        file.seek(5 << 20)
        file.write(os.urandom(70_000))
    os.setxattr(top / "sparse", "user.dolly", b"1")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", 0o020666, os.makedev(1, 3))
    (top / "setuid").write_text("x")
    os.chown(top / "setuid", 1234, 5678)
    (top / "setuid").chmod(0o4755)


async def test_a_pass_makes_both_trees_equal(pair: Pair) -> None:
    populate(pair.source)
    (pair.target / "left-from-before").write_text("x")
    done = await pair.copier.start(gated=False).wait()
    assert tree(pair.target) == tree(pair.source)
    assert done.bytes_sent > 70_000
    assert (pair.target / "sparse").stat().st_blocks == (pair.source / "sparse").stat().st_blocks


async def test_a_pass_keeps_to_what_it_may_send(pair: Pair) -> None:
    """Asked before each piece, however the bytes fall into pieces, and no machine is faster."""
    size_bytes, pair.bytes_s = 3 << 20, 8 << 20
    (pair.source / "data").write_bytes(os.urandom(size_bytes))
    done = await pair.copier.start(gated=False).wait()
    assert tree(pair.target) == tree(pair.source)
    assert pair.asked >= size_bytes / CHUNK_BYTES
    # The last piece does not wait for itself.
    sent_bytes = size_bytes - CHUNK_BYTES - BURST_S * pair.bytes_s
    assert done.duration_ms >= 1000 * sent_bytes / pair.bytes_s


async def test_a_gated_pass_sees_what_was_written_before_its_release(pair: Pair) -> None:
    populate(pair.source)
    await pair.copier.start(gated=False).wait()
    run = pair.copier.start(gated=True)
    async with asyncio.timeout(30):
        await run.ready.wait()
    before = tree(pair.target)
    (pair.source / "log").write_text("written while the pass waits\n")
    (pair.source / "etc/passwd-").unlink()
    assert tree(pair.target) == before
    run.release()
    assert run.task is not None
    await run.task
    assert tree(pair.target) == tree(pair.source)


async def test_listed_files_are_compared_by_content(pair: Pair) -> None:
    """A write through a mapping may leave size and time as they were."""
    data = pair.source / "mapped"
    data.write_bytes(b"a" * 8192)
    await pair.copier.start(gated=False).wait()
    times = data.stat()
    data.write_bytes(b"b" * 8192)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    await pair.copier.start(gated=False).wait()
    assert (pair.target / "mapped").read_bytes() == b"a" * 8192
    run = pair.copier.start(gated=False, files=["mapped"])
    assert run.task is not None
    await run.task
    assert (pair.target / "mapped").read_bytes() == b"b" * 8192


async def test_a_snapshot_is_what_was_there_at_one_moment(pair: Pair, tmp_path: Path) -> None:
    """Whatever is written, made, removed or replaced since the last pass, and afterwards."""
    populate(pair.source)
    (pair.source / "was").mkdir()
    (pair.source / "was/directory").write_text("x")
    (pair.source / "gone").write_text("x")
    snapshot = RootfsSnapshot(pair.source, tmp_path / "copy", room_bytes=1 << 20)
    snapshot.look()
    await pair.copier.start(gated=False).wait()
    (pair.source / "gone").unlink()
    (pair.source / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (pair.source / "new").mkdir()
    (pair.source / "new/file").write_text("1")
    shutil.rmtree(pair.source / "was")
    (pair.source / "was").write_text("a file now")
    (pair.source / "setuid").chmod(0o755)
    mapped, times = pair.source / "sparse", (pair.source / "sparse").stat()
    with mapped.open("r+b") as file:
        file.write(b"through a mapping")
    os.utime(mapped, ns=(times.st_atime_ns, times.st_mtime_ns))
    wanted = tree(pair.source)
    snapshot.take(["sparse"])
    (pair.source / "etc/passwd").write_text("later")
    (pair.source / "new/file").unlink()
    (pair.source / "later").write_text("later")
    snapshot.fill()
    await pair.copier.send_snapshot(snapshot.copy, snapshot.changed)
    assert tree(pair.target) == wanted


def test_a_snapshot_says_how_much_it_may_keep(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    snapshot = RootfsSnapshot(tmp_path / "root", tmp_path / "copy", room_bytes=4096)
    snapshot.look()
    (tmp_path / "root/large").write_bytes(bytes(4097))
    with pytest.raises(TransferFailed, match="written since the last pass"):
        snapshot.take([])
    assert not snapshot.copy.exists()


async def test_a_failing_daemon_is_reported_with_rsyncs_words(pair: Pair) -> None:
    populate(pair.source)
    pair.target.rmdir()
    with pytest.raises(TransferFailed, match=r"rsync of the root file system ended with \d+"):
        await pair.copier.start(gated=False).wait()


def set_attribute(change: str, path: Path) -> None:
    """chattr(1); an immutable file can't be replaced."""
    subprocess.run(["chattr", change, path], check=True)


async def test_an_error_after_the_last_byte_is_heard_of(pair: Pair) -> None:
    """rsync on the source may end well although the target's could not put a file in place."""
    (pair.source / "file").write_bytes(os.urandom(1 << 20))
    (pair.target / "file").write_text("old")
    set_attribute("+i", pair.target / "file")
    try:
        with pytest.raises(TransferFailed, match="ended with 23"):
            await pair.copier.start(gated=False).wait()
    finally:
        set_attribute("-i", pair.target / "file")


async def test_a_pass_waits_for_another_one_to_end(pair: Pair) -> None:
    populate(pair.source)
    await pair.copier.start(gated=False).wait()
    first, second = pair.copier.start(gated=True), pair.copier.start(gated=True, files=["log"])
    second.release_after(first)
    async with asyncio.timeout(30):
        await asyncio.gather(first.wait_ready(), second.wait_ready())
        (pair.source / "log").write_text("of the second pass")
        (pair.source / "setuid").write_text("of the first pass")
        first.release()
        done = [await first.wait(), await second.wait()]
    assert done[0].ended_us < done[1].ended_us
    assert tree(pair.target) == tree(pair.source)


BIG_BYTES = 64 << 20


async def test_a_pass_goes_on_where_its_channel_broke(pair: Pair) -> None:
    """A file that was under way is not begun anew, and nothing of the tries is left over."""
    populate(pair.source)
    (pair.source / "big").write_bytes(os.urandom(BIG_BYTES))
    budgets = iter([BIG_BYTES // 2, 1 << 40, BIG_BYTES // 4, 1 << 40])
    pair.wire.budget = lambda: next(budgets, 1 << 40)
    run = pair.copier.start(gated=False)
    await run.wait()
    assert run.tries == 3
    assert tree(pair.target) == tree(pair.source)
    # Begun anew it would be 1.75 times as much; what the buffers had on the way comes on top.
    assert run.bytes_sent < BIG_BYTES + 2 * (12 << 20)


async def test_a_pass_at_its_gate_gets_a_new_channel_before_it_is_needed(pair: Pair) -> None:
    populate(pair.source)
    await pair.copier.start(gated=False).wait()
    run = pair.copier.start(gated=True)
    async with asyncio.timeout(30):
        await run.wait_ready()
        while run.tries < 3:
            pair.wire.reset()
            await asyncio.sleep(0.002)
    (pair.source / "log").write_text("written while the pass waits")
    run.release()
    await run.wait()
    assert run.tries >= 3
    assert tree(pair.target) == tree(pair.source)


async def test_the_end_of_patience_ends_a_pass(pair: Pair) -> None:
    await pair.wire.stop()
    with pytest.raises(TransferFailed, match="the channel of the root file system broke"):
        await pair.copier.start(gated=False).wait()


async def test_a_target_that_takes_no_files_is_not_asked_again(pair: Pair) -> None:
    runs = [pair.copier.start(gated=True) for _ in range(PASSES_MAX)]
    for run in runs:
        await run.wait_ready()
    more = pair.copier.start(gated=False)
    with pytest.raises(TransferFailed, match="409"):
        await more.wait()
    assert more.tries == 1
    pair.copier.cancel()
    await asyncio.wait([run.task for run in runs if run.task is not None])


def test_shared_writable_file_mappings_are_found() -> None:
    maps = Path("tests/migrate/data/maps-shared.txt").read_bytes()
    assert shared_file_mappings(maps) == {"/var/db/data.mdb", "/srv/with space"}


# ---- an rsync that hangs ----


def stop_rsync() -> list[psutil.Process]:
    """Every rsync of this process is stopped, and never answers again."""
    found = [one for one in psutil.Process().children(recursive=True) if one.name() == "rsync"]
    for process in found:
        process.suspend()
    return found


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def test_rsync_hangs_while_it_looks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "ROOTFS_SILENCE_S", 0.1)
    monkeypatch.setattr(rootfs, "END_DEADLINE_S", 1.0)
    populate(pair.source)
    run = pair.copier.start(gated=True)
    await run.wait_ready()
    stopped = stop_rsync()
    assert stopped
    run.release()
    with pytest.raises(TransferFailed, match=r"has said nothing for 0\.1 s"):
        await run.wait()
    end(stopped)


async def test_rsync_hangs_while_the_container_stands_still(pair: Pair) -> None:
    populate(pair.source)
    run = pair.copier.start(gated=True)
    await run.wait_ready()
    stopped = stop_rsync()
    run.release()
    with pytest.raises(TransferFailed, match=r"did not end within 0\.2 s"):
        await run.wait(0.2)
    end(stopped)


async def test_a_pass_is_not_silent_while_it_waits_at_its_gate(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for both rsyncs to start on a busy machine.
    monkeypatch.setattr(config, "ROOTFS_SILENCE_S", 2.0)
    populate(pair.source)
    run = pair.copier.start(gated=True)
    await run.wait_ready()
    assert run.task is not None
    await asyncio.wait({run.task}, timeout=3.0)
    assert not run.task.done()
    monkeypatch.setattr(config, "ROOTFS_SILENCE_S", 60.0)
    run.release()
    await run.wait()
    assert tree(pair.target) == tree(pair.source)
