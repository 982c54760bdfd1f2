"""One side of a migration for tests of what comes after a crash: a journal, a container that CRIU
holds, and a peer with an agent's words, over real TLS.

A shell plays CRIU's hook and the runtime above it; the cgroup is a directory with its files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from migrate.config import HostPaths
from migrate.core import messages as m
from migrate.guard import GuardPlan
from migrate.journal import Journal, Migration, Role
from tests.identities import Fleet
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from migrate.runtimes.base import Runtime

DEADLINE_S = 20.0
PEER = "localhost"
MIGRATION = "m-1"
ATTEMPT = 7
COPIED = ("precopy", "frozen")
GIVEN = (*COPIED, "committed")
RECEIVED = ("receiving", "prepared")
# As the hook of criu_glue/hooks.py waits; its output is the word that it got.
_HOOK = 'read -r verdict <> "$1/verdict"; echo "$verdict"'


def make_paths(base: Path) -> HostPaths:
    """Directories of a host with an identity that its peer accepts."""
    paths = HostPaths(run=base / "run", state=base / "state", config=base / "config")
    Fleet(base).host(PEER, at=paths.tls.directory)
    return paths


class Peer:
    """The agent of the other host. It gives `answers` one after the other, the last for ever."""

    def __init__(self, paths: HostPaths) -> None:
        self.answers: list[str] = ["unknown"]
        self.subject = MIGRATION
        self.heard: list[Any] = []
        self.port = 0
        self._context = HostIdentity.load(paths.tls).server_context()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post(f"/v1/migrations/{MIGRATION}/target", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Nobody listens there any more, until `start`."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        self.heard.append(m.decode_from_source(await request.read()))
        name = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(body=m.encode(m.State(self.subject, ATTEMPT, name)))


class FakeRuntime:
    """A runtime that knows of containers, and keeps what it was told to delete."""

    name = "runc"

    def __init__(self) -> None:
        self.known = {"web"}
        self.deleted: list[str] = []

    def exists(self, name: str) -> bool:
        return name in self.known

    def delete(self, name: str, *, bundle: Path | None = None) -> None:
        self.deleted.append(name)
        self.known.discard(name)


class Stage:
    """The source's side, on which a container is frozen and held."""

    def __init__(self, base: Path) -> None:
        self.paths = make_paths(base)
        self.peer = Peer(self.paths)
        self.runtime = FakeRuntime()
        self.cgroup = base / "cgroup"
        self.session = self.paths.session(MIGRATION, "source")
        self.hold = self.session / "work" / "hold"
        self._hook: subprocess.Popen[str] | None = None

    @property
    def runtimes(self) -> dict[str, Runtime]:
        return {"runc": self.runtime}  # type: ignore[dict-item]

    def freeze(self) -> None:
        """The container stands still and CRIU holds it."""
        self.hold.mkdir(parents=True)
        self.cgroup.mkdir()
        (self.cgroup / "cgroup.freeze").write_text("1")
        for fifo in ("gate", "verdict"):
            os.mkfifo(self.hold / fifo)
        command = ["sh", "-c", _HOOK, "hook", str(self.hold)]
        self._hook = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def enter(self, *states: str, role: Role = "source", **facts: Any) -> None:
        """The migration is in the journal, with these states."""
        known = {"peer_host": PEER, "port": self.peer.port, **facts}
        if role == "source" and self._hook is not None:
            known["guard"] = msgspec.to_builtins(self.plan)
        migration = Migration(MIGRATION, role, ATTEMPT, "web", "runc", PEER, time.time(), known)
        with Journal.open(self.paths.journal) as journal:
            journal.begin(migration)
        self.append(*states, role=role)

    def append(self, *states: str, role: Role = "source") -> None:
        with Journal.open(self.paths.journal) as journal:
            for state in states:
                journal.append(MIGRATION, role, state, "test", at_wall_s=time.time())

    def states(self, role: Role = "source") -> Sequence[str]:
        with Journal.open_read_only(self.paths.journal) as journal:
            return [record.state for record in journal.records(MIGRATION, role)]

    @property
    def migration(self) -> Migration:
        with Journal.open_read_only(self.paths.journal) as journal:
            return journal.migration(MIGRATION, "source")

    @property
    def plan(self) -> GuardPlan:
        assert self._hook is not None
        return GuardPlan(
            migration_id=MIGRATION,
            journal=str(self.paths.journal),
            hold_directory=str(self.hold),
            runtime_pid=self._hook.pid,
            cgroup=str(self.cgroup),
            ports=(("no-such-port", "no-such-bridge"),),
            run=str(self.paths.run),
        )

    @property
    def is_frozen(self) -> bool:
        return (self.cgroup / "cgroup.freeze").read_text() == "1"

    @property
    def is_held(self) -> bool:
        return self._hook is not None and self._hook.poll() is None

    def lose_power(self) -> None:
        """The host comes back without the container, and without what it had in memory."""
        assert self._hook is not None
        self._hook.kill()
        self._hook.communicate()
        shutil.rmtree(self.session)
        self.runtime.known.clear()

    def word(self) -> str:
        """What the hook has been told."""
        assert self._hook is not None
        return self._hook.communicate(timeout=DEADLINE_S)[0].strip()

    def close(self) -> None:
        if self._hook is not None and self._hook.returncode is None:
            self._hook.kill()
            self._hook.communicate()
