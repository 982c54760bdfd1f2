"""The root file system: rsync through the session's own encrypted channel.

rsync runs on both sides as a program; its bytes travel in a WebSocket of the session, so identity,
encryption and authorisation are the session's. On the target rsync is a daemon for one connection
with one module, the container's root, in a chroot of it: no word of the source becomes a path.

    source: rsync ⇄ rsync_relay ⇄ unix socket ⇄ [here] ⇄ WebSocket … ⇄ rsync --server --daemon

The last pass may be *gated*: both sides are started and have shaken hands while the container still
runs; the daemon's "OK" is withheld, so rsync looks at no file, until the container is frozen.

A pass whose channel breaks is begun again, for as long as a broken link is waited for. What has
arrived is not sent again, of a file that was under way neither (`--partial`: it stands there under
its own name until the pass brings the rest, and without a complete pass there is no restore). The
target ends a former try of a pass before it serves the next one (`Passes`), so that at most one
rsync writes for each. An error of rsync itself is not tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import psutil

from criu_glue.urgency import STANDSTILL, make_urgent
from migrate import config
from migrate.errors import TransferFailed
from migrate.processes import module_command, tail
from transport.core.bucket import Bucket
from transport.pace import unlimited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp import web

    # Takes the number of the pass.
    OpenChannel = Callable[[int], Awaitable[aiohttp.ClientWebSocketResponse]]

CHUNK_BYTES = 256 * 1024
# The text message that closes one direction, as a socket's shutdown does; some rsync waits for it.
END = "end"
# rsync's own words on a failure are a few lines; more than this is not kept.
RSYNC_STDERR_BYTES_MAX = 8 * 1024
# After the last byte rsync only sets times and permissions of what it has written.
END_DEADLINE_S = 10.0
# Of one pass. A link that breaks more often than this while a pass lasts will not get it through.
TRIES_MAX = 32
# Passes that a session serves at once: the last one and that over mapped files, and one to spare.
PASSES_MAX = 3

FLAGS = ("-aHAXS", "--numeric-ids", "--partial")
OF_FILES = ("-I", "--force", "--from0", "--files-from=-")
"""Files that are named on standard input, whatever they look like."""
OF_NAMES = ("--delete", "--existing", "--ignore-existing")
"""What has no name at the source is removed; nothing is copied."""
# What the daemon says when the module is open and the client may begin (rsync's clientserver.c).
_MODULE_OPEN = b"@RSYNCD: OK\n"
# rsync ends with 24 when files vanished while it ran: the next pass sees to it.
RSYNC_DONE = (0, 24)
_AT_THE_TARGET = re.compile(r"\[(receiver|generator)\]")
# The target closes the channel with this plus its rsync's exit status, which ours may not know of:
# an error after the last byte is only in the daemon's log. 4000 to 4999 are for applications
# (RFC 6455, 7.4.2).
_CLOSED_WITH_STATUS = 4000
# What fits in a closing frame besides its code (RFC 6455, 5.5).
_CLOSING_WORDS_BYTES_MAX = 123

_DAEMON_CONF = """\
use chroot = yes
uid = 0
gid = 0
numeric ids = yes
reverse lookup = no
max connections = 8
lock file = {lock}
log file = {log}
[rootfs]
path = {path}
read only = no
write only = yes
munge symlinks = no
"""


@dataclass(frozen=True, slots=True)
class RootfsPass:
    """One pass of rsync over the root file system."""

    bytes_sent: int
    duration_ms: float
    ended_us: int


class RootfsPassRun:
    """A pass under way. `ready` is set when it waits at its gate, `release` opens the gate."""

    def __init__(self, target: str, rate: Callable[[], float], *, gated: bool) -> None:
        self._target = target
        self._rate = rate
        self._bucket = Bucket()
        self.ready = asyncio.Event()
        self._gate = asyncio.Event()
        self.is_gated = gated
        if not gated:
            self._gate.set()
        self.bytes_sent = 0
        self._chunks = 0
        self.tries = 0
        self._target_status: int | None = None
        self._target_words = ""
        self.task: asyncio.Task[RootfsPass] | None = None

    async def wait_ready(self, deadline_s: float = config.PREPARE_DEADLINE_S) -> None:
        """Wait until the pass is at its gate; raises what ended it before, or TransferFailed."""
        assert self.task is not None
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait(
            {ready, self.task}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        ready.cancel()
        if self.task.done() and not self.ready.is_set():
            await self.task
        if not self.ready.is_set():
            raise _hangs(f"was not ready within {deadline_s:g} s")

    async def wait(self, deadline_s: float = config.ROOTFS_DEADLINE_S) -> RootfsPass:
        """Wait for the end of the pass. Raises TransferFailed."""
        assert self.task is not None
        try:
            async with asyncio.timeout(deadline_s):
                return await self.task
        except TimeoutError as error:
            raise _hangs(f"did not end within {deadline_s:g} s") from error

    def cancel(self) -> None:
        """End rsync and the pass."""
        assert self.task is not None
        self.task.cancel()

    def release(self) -> None:
        """Let rsync look at the files."""
        self._gate.set()

    def begin_try(self) -> None:
        """Count another try; what the target said in the last one counts no more."""
        self.tries += 1
        self._target_status, self._target_words = None, ""

    @property
    def is_awaited(self) -> bool:
        """Whether the container stands still and waits for this pass."""
        return self.is_gated and self._gate.is_set()

    def release_after(self, other: RootfsPassRun) -> None:
        """Release when another pass has ended, well or not."""
        assert other.task is not None
        other.task.add_done_callback(lambda _: self.release())

    async def pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        channel: aiohttp.ClientWebSocketResponse,
    ) -> None:
        """Carry bytes both ways until rsync or the target ends.

        Raises ConnectionError when the channel broke, TransferFailed when the target's rsync did.
        """
        # Which rsync ends first depends on its version; the other one hears of it by the end of its
        # input, and ends soon after.
        directions = {
            asyncio.create_task(self._send(reader, channel)),
            asyncio.create_task(self._receive(writer, channel)),
        }
        try:
            await self._wait_for_first(directions)
            async with asyncio.timeout(END_DEADLINE_S):
                await asyncio.gather(*directions)
        except TimeoutError as error:
            raise TransferFailed(
                f"rsync of the root file system did not end in {END_DEADLINE_S:g} s", phase="rootfs"
            ) from error
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.wait(directions)
            await channel.close()
            writer.close()
        if self._target_status is None:
            raise ConnectionError("it ended without the exit status of the target's rsync")
        if self._target_status not in RSYNC_DONE:
            raise _failed(
                f"on {self._target}", self._target_status, self._target_words, self._target
            )

    async def _wait_for_first(self, directions: set[asyncio.Task[None]]) -> None:
        """Returns when one of them has ended. Raises TransferFailed when nothing moves."""
        ended: set[asyncio.Task[None]] = set()
        while not ended:
            moved = self._chunks
            ended, _ = await asyncio.wait(
                directions,
                timeout=config.ROOTFS_SILENCE_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ended and self._chunks == moved and self._gate.is_set():
                raise _hangs(f"has said nothing for {config.ROOTFS_SILENCE_S:g} s, on either host")

    async def _send(
        self, reader: asyncio.StreamReader, channel: aiohttp.ClientWebSocketResponse
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            self.bytes_sent += len(data)
            self._chunks += 1
            # rsync waits as well then; its own limit could not be changed.
            await asyncio.sleep(self._bucket.take(len(data), time.monotonic(), self._rate()))
            await channel.send_bytes(data)
        # The target's rsync may have ended first: how, its closing frame says.
        with contextlib.suppress(ConnectionError):
            await channel.send_str(END)

    async def _receive(
        self, writer: asyncio.StreamWriter, channel: aiohttp.ClientWebSocketResponse
    ) -> None:
        greeting: bytes | None = b"" if self.is_gated else None
        following: Callable[[], Awaitable[aiohttp.WSMessage]] = channel.receive
        while (message := await following()).type is aiohttp.WSMsgType.BINARY:
            following = channel.receive
            self._chunks += 1
            data: bytes = message.data
            if greeting is not None:
                # The greeting is lines of text; what comes behind the daemon's "OK" is not.
                lines, newline, unfinished = (greeting + data).rpartition(b"\n")
                data, greeting = lines + newline, unfinished
                if _MODULE_OPEN in data:
                    before, opened, rest = (data + unfinished).partition(_MODULE_OPEN)
                    writer.write(before)
                    self.ready.set()
                    following = await self._wait_at_gate(channel)
                    data, greeting = opened + rest, None
            writer.write(data)
            await writer.drain()
        if message.type is aiohttp.WSMsgType.CLOSE and message.data >= _CLOSED_WITH_STATUS:
            self._target_status = message.data - _CLOSED_WITH_STATUS
            self._target_words = str(message.extra or "")
        if not writer.is_closing():
            writer.write_eof()

    async def _wait_at_gate(
        self, channel: aiohttp.ClientWebSocketResponse
    ) -> Callable[[], Awaitable[aiohttp.WSMessage]]:
        """Wait until the gate opens; returns what receives the next message.

        Raises ConnectionError when the channel breaks before: a new one costs nothing now, and
        downtime later.
        """
        message = asyncio.create_task(channel.receive())
        gate = asyncio.create_task(self._gate.wait())
        try:
            await asyncio.wait({message, gate}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gate.cancel()
            if not self._gate.is_set():
                message.cancel()
        if not self._gate.is_set():
            raise ConnectionError("it ended while the pass waited")
        return lambda: message


@dataclass(frozen=True, slots=True)
class _Matter:
    """What a pass is about: all of `root`; or only `files`, relative to it; or that there is
    nothing which `root` has no name for."""

    root: Path
    files: Sequence[str] | None = None
    is_names_alone: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Of rsync."""
        if self.files is not None:
            return OF_FILES
        if self.is_names_alone:
            return OF_NAMES
        return ("--delete",)


class RootfsSource:
    """Passes of rsync from `rootfs` into the session that `open_channel` leads to.

    `work` is a directory of ours (0700) for the relay's sockets. `patience_s`: how long a broken
    channel is tried to be opened again while the container runs; `silence_s`: and while it stands
    still. `rate`: how many bytes a second a pass may send, asked before each piece. Errors:
    TransferFailed.
    """

    def __init__(
        self,
        rootfs: Path,
        work: Path,
        open_channel: OpenChannel,
        *,
        host: str,
        target: str,
        patience_s: float,
        silence_s: float = config.FROZEN_SILENCE_S,
        rate: Callable[[], float] = unlimited,
    ) -> None:
        self._rootfs = rootfs
        self._target = target
        self._work = work
        self._open_channel = open_channel
        self._host = host
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._rate = rate
        self._passes = 0
        self._runs: list[RootfsPassRun] = []

    def cancel(self) -> None:
        """End every pass that is under way."""
        for run in self._runs:
            run.cancel()

    def start(self, *, gated: bool, files: Sequence[str] | None = None) -> RootfsPassRun:
        """Begin a pass; with `files` only these (relative to the root), compared by content."""
        return self._start(_Matter(self._rootfs, files), gated=gated)

    async def send_snapshot(self, copy: Path, changed: Sequence[str]) -> None:
        """Make of the target's root what a snapshot (`rootfs_snapshot.py`) was taken of. Two
        passes: what has changed, then the names that are gone."""
        await self._start(_Matter(copy, changed), gated=False).wait()
        await self._start(_Matter(copy, is_names_alone=True), gated=False).wait()

    def _start(self, matter: _Matter, *, gated: bool) -> RootfsPassRun:
        self._passes += 1
        run = RootfsPassRun(self._target, self._rate, gated=gated)
        run.task = asyncio.create_task(self._pass(run, self._passes, matter))
        # Whoever waits for it hears how it ended; nobody may be waiting any more.
        run.task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._runs.append(run)
        return run

    async def _pass(self, run: RootfsPassRun, number: int, matter: _Matter) -> RootfsPass:
        """A pass, tried again over a new channel when its channel breaks."""
        started_us = time.monotonic_ns() // 1000
        broke_s: float | None = None
        while True:
            run.begin_try()
            try:
                async with asyncio.timeout(config.CONNECT_DEADLINE_S):
                    channel = await self._open_channel(number)
            except (OSError, aiohttp.ClientError) as error:
                broke_s = broke_s or time.monotonic()
                self._check_patience(run, time.monotonic() - broke_s, error)
                await asyncio.sleep(config.RECONNECT_PAUSE_S)
                continue
            try:
                await self._try(run, number, matter, channel)
            except (OSError, aiohttp.ClientError) as error:
                broke_s = time.monotonic()
                self._check_patience(run, 0.0, error)
            else:
                break
            finally:
                await channel.close()
        ended_us = time.monotonic_ns() // 1000
        return RootfsPass(run.bytes_sent, (ended_us - started_us) / 1000, ended_us)

    def _check_patience(self, run: RootfsPassRun, broken_for_s: float, error: Exception) -> None:
        """Raise TransferFailed when a broken channel is to be waited for no longer."""
        patience_s = self._patience_s
        if run.is_awaited:
            patience_s = min(patience_s, self._silence_s)
        # Whoever answers that there is no such session, or that it takes no files, will stay so.
        is_refused = isinstance(error, aiohttp.WSServerHandshakeError)
        if is_refused or broken_for_s >= patience_s or run.tries >= TRIES_MAX:
            raise TransferFailed(
                f"the channel of the root file system broke: {error}",
                host=self._host,
                phase="rootfs",
            ) from error

    async def _try(
        self,
        run: RootfsPassRun,
        number: int,
        matter: _Matter,
        channel: aiohttp.ClientWebSocketResponse,
    ) -> None:
        """rsync over one channel. Raises OSError or ClientError if that broke, TransferFailed."""
        socket_path = self._work / f"rsync-{number}.sock"
        carried: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await run.pump(reader, writer, channel)
            except (OSError, aiohttp.ClientError, TransferFailed) as error:
                if not carried.done():
                    carried.set_exception(error)
                    # Heard by `_try`, unless that has been ended meanwhile.
                    carried.exception()
            else:
                if not carried.done():
                    carried.set_result(None)
            finally:
                writer.close()

        server = await asyncio.start_unix_server(on_connect, socket_path, limit=CHUNK_BYTES)
        rsync = asyncio.create_task(self._rsync(socket_path, matter, is_urgent=run.is_gated))
        try:
            await asyncio.wait({rsync, carried}, return_when=asyncio.FIRST_COMPLETED)
            # One whose channel has ended ends too, unless it hangs.
            await asyncio.wait({rsync}, timeout=END_DEADLINE_S)
            if not rsync.done():
                await carried
                raise _hangs("did not end")
            try:
                await rsync
            except TransferFailed as failure:
                # An rsync whose channel broke ends badly as well, which is no word of its own.
                with contextlib.suppress(TransferFailed, TimeoutError):
                    async with asyncio.timeout(END_DEADLINE_S):
                        await asyncio.shield(carried)
                raise failure from None
            await carried
        finally:
            rsync.cancel()
            await asyncio.wait({rsync})
            # Heard here at the latest, whatever else has ended this.
            _ = rsync.cancelled() or rsync.exception()
            server.close()
            socket_path.unlink(missing_ok=True)

    async def _rsync(self, socket_path: Path, matter: _Matter, *, is_urgent: bool) -> None:
        relay = Path(__file__).with_name("rsync_relay.py")
        shell = shlex.join([sys.executable, "-ISE", str(relay), str(socket_path)])
        options = (*matter.options, "-e", shell)
        status, words = await run_rsync(
            options, matter.root, "target::rootfs", matter.files, is_urgent=is_urgent
        )
        if status not in RSYNC_DONE:
            raise _failed(f"on {self._host}", status, words, self._target)


async def run_rsync(
    options: Sequence[str],
    source: Path,
    target: str,
    files: Sequence[str] | None,
    *,
    is_urgent: bool = False,
) -> tuple[int, str]:
    """A pass from the directory `source` to `target`, of `files` if they are given: its exit status
    (RSYNC_DONE, or it failed) and what it said. It is ended when this is cancelled. is_urgent: a
    container will stand still for it."""
    process = await asyncio.create_subprocess_exec(
        *("rsync", *FLAGS, *options),
        f"{source}/",
        f"{target}/",
        stdin=asyncio.subprocess.PIPE if files is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    if is_urgent:
        make_urgent(process.pid, STANDSTILL, inherited=True)
    listing = None if files is None else b"\0".join(map(os.fsencode, files))
    try:
        _, stderr = await process.communicate(listing)
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    words = stderr[-RSYNC_STDERR_BYTES_MAX:].decode("utf-8", "replace").strip()
    return process.returncode, words


def _hangs(how: str) -> TransferFailed:
    return TransferFailed(
        f"rsync of the root file system {how}",
        phase="rootfs",
        remedy="it hangs, or looks at one file for so long: see the disks of both hosts",
    )


def _failed(where: str, status: int | None, words: str, target: str) -> TransferFailed:
    return TransferFailed(
        f"rsync of the root file system ended with {status} {where}: {words}",
        # rsync's word for what it does there; in front of it, or when all is well, there is none.
        host=target if _AT_THE_TARGET.search(words) else "",
        phase="rootfs",
        remedy="look at the target's free space (df, df -i) and at what rsync says above",
    )


async def serve_rsync(
    channel: web.WebSocketResponse,
    rootfs: Path,
    work: Path,
    started: Callable[[int], None] = lambda _: None,
) -> None:
    """The target's end of one pass: an rsync daemon for this connection, chrooted to `rootfs`, in a
    cell in which it could write nowhere else.

    `work` is an existing directory of ours for its configuration and log. `started` hears the
    daemon's pid.
    """
    conf, log = work / "rsyncd.conf", work / "rsyncd.log"
    if not conf.exists():  # the daemon of another pass may be reading it
        conf.write_text(_DAEMON_CONF.format(path=rootfs, log=log, lock=work / "rsyncd.lock"))
    ours, theirs = socket.socketpair()
    try:
        daemon = ("rsync", "--server", "--daemon", f"--config={conf}", ".")
        process = await asyncio.create_subprocess_exec(
            *module_command("migrate.agent.cell", str(rootfs), str(work), "--", *daemon),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
        )
    finally:
        theirs.close()
    started(process.pid)
    reader, writer = await asyncio.open_connection(sock=ours, limit=CHUNK_BYTES)

    async def answers() -> None:
        while data := await reader.read(CHUNK_BYTES):
            await channel.send_bytes(data)
        status = await _end(process)
        words = b"" if status in RSYNC_DONE else _last_words(log)
        await channel.close(code=_CLOSED_WITH_STATUS + status, message=words)

    answering = asyncio.create_task(answers())
    try:
        async for message in channel:
            if message.type is aiohttp.WSMsgType.TEXT:
                writer.write_eof()
                continue
            writer.write(message.data)
            await writer.drain()
    except ConnectionError:
        # rsync ended first (an error it has told the other side already).
        pass
    finally:
        writer.close()
        try:
            await asyncio.wait({answering}, timeout=END_DEADLINE_S)
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await answering
            await _end(process)
        finally:
            # Whoever cancels this a second time can't wait until it ends by itself.
            if process.returncode is None:
                process.kill()
                await process.wait()


class Passes:
    """The target's end of all passes of one session: at most one rsync serves each."""

    def __init__(self, rootfs: Path, work: Path) -> None:
        self._rootfs = rootfs
        self._work = work
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._daemons: set[int] = set()
        self._is_urgent = False

    def hurry(self) -> None:
        """From now on a container stands still for them, or is about to."""
        self._is_urgent = True
        for pid in self._daemons:
            with contextlib.suppress(psutil.NoSuchProcess):
                # rsync works in two processes.
                for child in psutil.Process(pid).children():
                    make_urgent(child.pid, STANDSTILL, inherited=True)
            make_urgent(pid, STANDSTILL, inherited=True)

    def can_serve(self, number: int) -> bool:
        """Whether this pass is served already, or there is room for another one."""
        return number in self._serving or len(self._serving) < PASSES_MAX

    async def serve(self, number: int, channel: web.WebSocketResponse) -> None:
        """Serve a pass until it ends; a former try of the same pass has ended then."""
        former = self._serving.get(number)
        task = asyncio.create_task(self._serve_after(former, channel))
        self._serving[number] = task
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            if self._serving.get(number) is task:
                del self._serving[number]
        if not task.cancelled():
            task.result()

    async def end(self) -> None:
        """End every pass that is served; no rsync writes any more when this returns."""
        serving = set(self._serving.values())
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving)

    async def _serve_after(
        self, former: asyncio.Task[None] | None, channel: web.WebSocketResponse
    ) -> None:
        if former is not None:
            former.cancel()
            await asyncio.wait({former})
        daemons: set[int] = set()

        def started(pid: int) -> None:
            daemons.add(pid)
            self._daemons.add(pid)
            if self._is_urgent:
                make_urgent(pid, STANDSTILL, inherited=True)

        try:
            await serve_rsync(channel, self._rootfs, self._work, started)
        finally:
            self._daemons -= daemons


async def _end(process: asyncio.subprocess.Process) -> int:
    """Give rsync the time to end by itself: it sets directories' times after the last byte. Returns
    its exit status, of a byte."""
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            status = await process.wait()
    except TimeoutError:
        process.kill()
        status = await process.wait()
    return status & 0xFF


def _last_words(log: Path) -> bytes:
    """The last line of the daemon's log that is of an error, as far as a closing frame takes it."""
    lines = tail(log, RSYNC_STDERR_BYTES_MAX).splitlines()
    said = [line.partition("rsync: ")[2] for line in lines if "rsync: " in line]
    words = said[-1].encode()[:_CLOSING_WORDS_BYTES_MAX] if said else b""
    return words.decode("utf-8", "ignore").encode()


_SHARED_MAPPING = re.compile(rb"^\S+ .w.s \S+ \S+ (?!0 )\d+ +(/.*)$", re.MULTILINE)


def shared_file_mappings(maps: bytes) -> set[str]:
    """Files that a task maps shared and writable, of the text of its /proc/PID/maps.

    Writing to such a mapping changes a file's time only at the first write after a write-back
    (`page_mkwrite`), so size and time do not tell rsync that it changed.
    """
    return {
        path.decode("utf-8", "surrogateescape")
        for path in _SHARED_MAPPING.findall(maps)
        if not path.endswith(b" (deleted)")
    }
