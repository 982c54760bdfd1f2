"""The agent's side of its front: started, given what it may have, and started again when it ends.

    RUN/front/            what the front sees as "/", read-only (lockdown.py)
        agent.sock        the agent's HTTP, for the front alone
        tls/              copies of ca.pem, crl.pem, host.pem; the identity's key is not among them

The listening sockets are made here and outlive every front: whoever connects while there is none is
served by the next one. A stream that was broken goes on with it, by the session's ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from criu_glue.urgency import Urgency
from migrate import config
from migrate.agent import front_link
from migrate.agent.front_link import (
    Done,
    Failed,
    FrontLostError,
    Granted,
    Greeting,
    Link,
    Message,
    NotGranted,
    Ready,
    Revoke,
    front_user,
)
from migrate.errors import MigrateError
from migrate.processes import Outliving, module_command
from transport.errors import StreamRefusedError, TransportError
from transport.identity import IdentityPaths
from transport.receiver import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from aiohttp import web

    from migrate.agent.workspace import Workspace
    from transport.core.frames import Hello
    from transport.identity import Peer

log = structlog.get_logger()

SOCKET_NAME = "agent.sock"
TLS_NAME = "tls"
_SOCKET_BACKLOG = 128
# Nearly all of it is Python's imports, which a busy or emulated host takes half a minute for;
# one that is both has taken more than 90 s.
_START_DEADLINE_S = 300.0
_TAKEN_DEADLINE_S = 5.0
_TAKEN_PAUSE_S = 0.05
# Between a front's end and the next one's start: a broken link is waited for ten times as long.
_PAUSE_S = 0.2
# How soon renewed certificates and revocations are the front's.
_COPY_PERIOD_S = 1.0
# struct ucred of unix(7): pid, uid, gid
_CREDENTIALS = struct.Struct("=iII")


@dataclass(eq=False, slots=True)
class _Process:
    """One front and the agent's ends of its links."""

    process: Outliving
    asks: Link
    orders: Link
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Front:
    """See the module. `sink_of` says which session a data stream's greeting belongs to, for a peer
    that has proven itself; it is called in a thread of its own. In one event loop, whose thread is
    the process's first."""

    def __init__(
        self,
        paths: config.HostPaths,
        address: str,
        port: int,
        data_port: int,
        sink_of: Callable[[Hello, Peer], Workspace | None],
    ) -> None:
        """Listens from now on. Raises TransportError, MigrateError."""
        self._directory = paths.front
        self._identity = paths.tls
        self._sink_of = sink_of
        self._user = front_user()
        # Of the agent and its front, which all that is for it goes through.
        self.urgency = Urgency(self._pids)
        self._now: _Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._copied: dict[str, tuple[int, int]] = {}
        self._control = _listen(address, port)
        self._data = _listen(address, data_port)
        self._make_directory()
        self.socket = self._listen_for_front()

    @property
    def port(self) -> int:
        """Where the control port is."""
        return int(self._control.getsockname()[1])

    @property
    def data_port(self) -> int:
        """Where the data port is."""
        return int(self._data.getsockname()[1])

    async def start(self) -> None:
        """Start the front, and keep one running; returns when it serves. Raises MigrateError."""
        self._copy_identity()
        first = self._spawn()
        ended = asyncio.create_task(first.process.wait())
        ready = asyncio.create_task(first.ready.wait())
        await asyncio.wait(
            {ended, ready}, timeout=_START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        is_ready = ready.done()
        for task in (ended, ready):
            task.cancel()
        if not is_ready:
            await self.stop()
            raise MigrateError(
                "the agent's front does not start", remedy="its own words are above this line"
            )
        self._tasks = [
            asyncio.create_task(self._keep(first)),
            asyncio.create_task(self._keep_copies()),
        ]

    async def stop(self) -> None:
        """End the front; nobody listens any more but whoever serves `socket`. Idempotent."""
        for task in self._tasks:
            task.cancel()
        now, self._now = self._now, None
        if now is not None:
            await self._end(now)
        self._control.close()
        self._data.close()

    def revoke(self, ticket: bytes) -> None:
        """Have the streams of a session ended and its files closed. Blocking, from any thread.

        Whether it has been done is not known by the front's word but by the directories
        (`Workspace.take_over`). Raises MigrateError when the front says that it can't.
        """
        now = self._now
        if now is None:
            return
        try:
            answer, _ = now.orders.ask(Revoke(ticket.hex()))
        except FrontLostError as error:
            log.warning("the front was not told that a session ended", why=str(error))
            return
        if isinstance(answer, Failed):
            raise MigrateError(answer.why)

    def kill(self) -> None:
        """End the front at once, from any thread: it has something open that it must not have."""
        now = self._now
        if now is not None:
            now.process.kill()

    def is_caller(self, request: web.Request) -> bool:
        """Whether a request on the unix socket comes from the front."""
        assert request.transport is not None
        end: socket.socket = request.transport.get_extra_info("socket")
        data = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(data)
        return self._now is not None and int(pid) == self._now.process.pid

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            (self._directory / TLS_NAME).mkdir(mode=0o750, exist_ok=True)
            for directory in (self._directory, self._directory / TLS_NAME):
                os.chown(directory, 0, self._user)
        except OSError as error:
            raise MigrateError(f"no directory for the agent's front: {error}") from error

    def _listen_for_front(self) -> socket.socket:
        path = self._directory / SOCKET_NAME
        end = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            end.bind(str(path))
            path.chmod(0o660)
            os.chown(path, 0, self._user)
            end.listen(_SOCKET_BACKLOG)
        except OSError as error:
            end.close()
            raise MigrateError(f"no socket for the agent's front: {error}") from error
        return end

    def _pids(self) -> tuple[int, ...]:
        return () if self._now is None else (self._now.process.pid,)

    def _spawn(self) -> _Process:
        asks, its_asks = front_link.pair()
        orders, its_orders = front_link.pair()
        given = {
            "control": self._control.fileno(),
            "data": self._data.fileno(),
            "asks": its_asks.fileno(),
            "orders": its_orders.fileno(),
        }
        words = [f"--{name}={number}" for name, number in given.items()]
        words += [f"--root={self._directory}", f"--user={self._user}"]
        with its_asks, its_orders:
            process = Outliving(
                module_command("migrate.agent.front", *words),
                cwd=self._directory,
                stderr=None,
                pass_fds=tuple(given.values()),
            )
        self._now = now = _Process(process, Link(asks), Link(orders))
        answer = _Answers(self._sink_of, now.ready, asyncio.get_running_loop())
        threading.Thread(
            target=now.asks.serve, args=(answer,), name="front-asks", daemon=True
        ).start()
        return now

    async def _keep(self, now: _Process) -> None:
        """Whenever the front ends, start another one."""
        while True:
            status = await now.process.wait()
            log.error("the front ended", status=status)
            await self._end(now)
            await asyncio.sleep(_PAUSE_S)
            now = self._spawn()

    async def _end(self, now: _Process) -> None:
        now.process.kill()
        await now.process.wait()
        now.asks.close()
        now.orders.close()

    async def _keep_copies(self) -> None:
        while True:
            await asyncio.sleep(_COPY_PERIOD_S)
            try:
                self._copy_identity()
            except MigrateError as error:
                log.warning("certificates not taken", why=str(error))

    def _copy_identity(self) -> None:
        """Give the front what of this host's identity has changed. Small files: not blocking."""
        for path in (self._identity.ca, self._identity.crl, self._identity.leaf):
            try:
                found = path.stat()
                version = (found.st_ino, found.st_mtime_ns)
                if self._copied.get(path.name) != version:
                    self._copy(path)
                    self._copied[path.name] = version
            except OSError as error:
                raise MigrateError(
                    f"{path} can't be given to the agent's front: {error}"
                ) from error

    def _copy(self, path: Path) -> None:
        there = self._directory / TLS_NAME / path.name
        partial = there.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(path.read_bytes())
            os.fchown(descriptor, self._user, self._user)
        partial.replace(there)


class _Answers:
    """What the agent says to a question of its front's, in the thread that hears them."""

    def __init__(
        self,
        sink_of: Callable[[Hello, Peer], Workspace | None],
        ready: asyncio.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._sink_of = sink_of
        self._ready = ready
        self._loop = loop

    def __call__(self, message: Message) -> tuple[Message, Sequence[int]]:
        match message:
            case Ready():
                self._loop.call_soon_threadsafe(self._ready.set)
                return Done(), ()
            case Greeting():
                return self._grant(message)
            case _:
                return Failed("that is no question"), ()

    def _grant(self, greeting: Greeting) -> tuple[Message, Sequence[int]]:
        try:
            workspace = self._sink_of(greeting.hello, greeting.caller.peer)
            if workspace is not None:
                return Granted(workspace.quota_bytes), workspace.lend()
        except (MigrateError, StreamRefusedError, ValueError) as error:
            peer = greeting.caller.name
            log.warning("not granted", peer=peer, stream=greeting.stream, why=str(error))
        return NotGranted(), ()


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens there. The front of an agent that was killed has it for a moment more.
    Raises TransportError."""
    cutoff_s = time.monotonic() + _TAKEN_DEADLINE_S
    while True:
        try:
            return listen(address, port)
        except TransportError:
            if time.monotonic() > cutoff_s:
                raise
            time.sleep(_TAKEN_PAUSE_S)


def identity_in(root: Path) -> IdentityPaths:
    """Where a front finds its copies."""
    return IdentityPaths(root / TLS_NAME)
