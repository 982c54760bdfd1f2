"""The source's freeze and hold: runtime, CRIU, cgroup, ports and guard of one container.

prepare    the runtime is started and comes as far as its CRIU, which waits at the gate
freeze     ports unplugged, what comes for them is kept, cgroup frozen
dump       CRIU writes its images and is held with the tasks
release    CRIU kills the tasks, the runtime forgets the container     (after the commit only)
undo       CRIU gives the tasks back, cgroup thawed, ports plugged in  (before the commit only)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

import msgspec
import psutil

from criu_glue.errors import CriuGlueError
from criu_glue.hooks import PAGE_SERVER_FD, CriuHold, HoldPlan, criu_pid
from criu_glue.kerndat import KernelCacheError
from criu_glue.known_pages import KnownPages
from criu_glue.urgency import STANDSTILL, Urgency, make_normal, make_urgent
from migrate import cgroup, config, custody, holder, masked, tcp_repair
from migrate.criu_run import OWN_NETWORK, RuntimeOrCriu
from migrate.errors import DumpFailed, RollbackFailed
from migrate.grace_periods import GracePeriods
from migrate.guard import GuardPlan, end_criu
from migrate.held_frames import HeldFrames
from migrate.network import PortSwitch
from migrate.processes import Outliving, module_command
from migrate.runtimes.oci import has_user_namespace
from migrate.unshielding import unshield

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.config import HostPaths
    from migrate.network_identity import HeldFrame, NetworkIdentity
    from migrate.runtimes.base import Container, Runtime

# No page server is opened: CRIU is given a socket that is at its end (`criu_glue/hooks.py`). It
# would hold only what is not in the parent (`criu_glue/known_pages.py`).
_LAZY = ("lazy-pages", f"ps-socket {PAGE_SERVER_FD}")


class Freezing:
    """See the module. For one event loop; `undo` may be called at any point before `release`."""

    def __init__(
        self,
        container: Container,
        runtime: Runtime,
        network: NetworkIdentity,
        session: Path,
        host: str,
    ) -> None:
        self.container = container
        self._runtime = runtime
        self._ports = [PortSwitch(port.host_end, str(port.bridge)) for port in network.ports]
        self._frames = HeldFrames(network)
        self._session = session
        self.image_dir = session / "img"
        self._work_dir = session / "work"
        self._host = host
        self._hold: CriuHold | None = None
        self._process: Outliving | None = None
        self._plan: GuardPlan | None = None
        self._guard: Outliving | None = None
        self._to_guard: asyncio.StreamWriter | None = None
        self._from_guard: asyncio.StreamReader | None = None
        self._is_frozen = False
        # When the container was given back (µs).
        self.given_back_us: int | None = None
        self._known: KnownPages | None = None
        self._grace_periods: GracePeriods | None = None
        self._hurry = contextlib.ExitStack()
        # Processor time that the guard took to start.
        self.started_cpu_ms = 0.0
        # Why CRIU takes hold of every page of a lazy dump, "" if it does not.
        self.why_slow = ""

    async def prepare(
        self, migration_id: str, paths: HostPaths, *, parent: Path | None
    ) -> GuardPlan:
        """Start the runtime up to its CRIU's gate, and the guard; returns what that is to do.

        The dump has what was written since the images `parent`; without them it is a lazy one,
        which leaves all pages to who reads them from the frozen tasks.
        """
        self.image_dir.mkdir(mode=0o700)
        self._work_dir.mkdir(mode=0o700)
        is_lazy = parent is None
        if is_lazy:
            parent = await self._prepare_known()
        options = (
            "manage-cgroups ignore",
            "network-lock skip",
            "verbosity 2",
            *(_LAZY if is_lazy else ()),
            *(("track-mem",) if parent is not None else ()),
            *await asyncio.to_thread(masked.dump_options, self.container.spec, self.container.pid),
            f"ghost-limit {config.GHOST_FILE_BYTES_MAX}",
            *([OWN_NETWORK] if has_user_namespace(self.container.spec) else []),
        )
        directory = self._work_dir / "hold"
        orphaned = holder.command(paths, migration_id, "source", directory)
        plan = HoldPlan(
            "post-dump",
            options,
            freeze=self.container.cgroup,
            orphaned=orphaned,
            prefix=self._known.prefix if self._known else (),
        )
        self._hold = CriuHold.prepare(directory, plan)
        command = self._dump_command(parent, is_lazy=is_lazy)
        self._process = Outliving(command, env=self._hold.environment(os.environ))
        self._plan = GuardPlan(
            migration_id=migration_id,
            journal=str(paths.journal),
            hold_directory=str(directory),
            runtime_pid=self._process.pid,
            cgroup=str(self.container.cgroup),
            ports=tuple((port.name, port.bridge) for port in self._ports),
            run=str(paths.run),
        )
        self._grace_periods = GracePeriods(paths.run, "coordinator")
        await self._start_guard(self._plan)
        await self._until("gate", config.PREPARE_DEADLINE_S)
        return self._plan

    async def freeze(self) -> dict[str, int]:
        """Unplug and freeze; marks (µs): `unplug` when it began, `frozen` when all tasks stood.

        The guard takes the tasks into custody beside what follows, until the dump starts.
        """
        assert self._guard is not None
        assert self._to_guard is not None
        assert self._process is not None
        assert self._grace_periods is not None
        if self._guard.returncode is not None:
            raise DumpFailed("the guard of the freeze has ended", host=self._host)
        self._grace_periods.shorten()
        self._hurry.enter_context(Urgency())
        for process in (self._guard, self._process):
            make_urgent(process.pid, STANDSTILL, inherited=False)
        self._is_frozen = True
        marks = {"unplug": time.monotonic_ns() // 1000}
        self._frames.watch()
        for port in self._ports:
            port.unplug()
        self._frames.begin()
        marks["frozen"] = await asyncio.to_thread(
            cgroup.freeze, self.container.cgroup, config.FREEZE_DEADLINE_S
        )
        self._frames.send_on()
        self._to_guard.write(b"keep\n")
        if self._known is not None:
            await asyncio.to_thread(self._known.name_tasks, self.container.cgroup)
        return marks

    async def start_dump(self) -> None:
        """Let CRIU begin."""
        assert self._hold is not None
        assert self._from_guard is not None
        async with asyncio.timeout(config.FREEZE_DEADLINE_S):
            answer = await self._from_guard.readline()
        if answer != b"kept\n":
            why = answer.decode(errors="replace").strip() or "the guard of the freeze has ended"
            raise DumpFailed(f"the dump can't begin: {why}", host=self._host, phase="dump")
        self._hold.open_gate()

    async def dumped(self) -> int:
        """Wait for CRIU's images to be complete; returns when they were (µs)."""
        seen_us = await self._until("post-dump", config.DUMP_DEADLINE_S)
        try:
            await asyncio.to_thread(unshield, self._work_dir / "hold", self.image_dir)
        except (CriuGlueError, OSError) as error:
            raise DumpFailed(f"an image can't be cleaned: {error}", host=self._host) from error
        self._lengthen()
        return seen_us

    def frames(self) -> tuple[HeldFrame, ...]:
        """What has come for the container since the freeze."""
        return self._frames.take()

    async def release(self) -> None:
        """Let CRIU kill the frozen tree; returns when the runtime has forgotten the container."""
        assert self._hold is not None
        assert self._process is not None
        self._hurry.close()
        for pid in (self._process.pid, criu_pid(self._work_dir / "hold")):
            if pid is not None:
                make_normal(pid)
        self._hold.decide("commit")
        async with asyncio.timeout(config.RUNTIME_EXIT_DEADLINE_S):
            await self._process.wait()
        if self._runtime.exists(self.container.name):
            # The dump ended badly after the commit: the tree must die all the same.
            self._runtime.delete(self.container.name)
        await self._end()

    async def undo(self) -> None:
        """Give the container back to its users. Idempotent. Raises RollbackFailed."""
        if self._hold is not None:
            # As long as it is open here, its words would be taken for heard.
            self._hold.close()
        directory = self._work_dir / "hold"
        if self._process is not None:
            await asyncio.to_thread(end_criu, directory, self._process.pid, self.container.cgroup)
        try:
            if self._is_frozen:
                await asyncio.to_thread(custody.mend, directory, self.container.cgroup)
                await asyncio.to_thread(tcp_repair.leave, self.container.cgroup)
                cgroup.thaw(self.container.cgroup)
                for port in self._ports:
                    port.plug()
                self.given_back_us = time.monotonic_ns() // 1000
                self._is_frozen = False
                await asyncio.to_thread(self._frames.give_back)
        except (CriuGlueError, OSError) as error:
            raise RollbackFailed(
                f"{self.container.name} could not be thawed: {error}",
                host=self._host,
                container_state=f"may be frozen on {self._host}",
                remedy=f"echo 0 > {self.container.cgroup}/cgroup.freeze",
            ) from error
        finally:
            await self._end()

    def _lengthen(self) -> None:
        if self._grace_periods is not None:
            self._grace_periods.put_back()

    async def _end(self) -> None:
        self._lengthen()
        self._hurry.close()
        if self._guard is not None and self._to_guard is not None:
            with contextlib.suppress(ConnectionError):
                self._to_guard.write(b"disarm\n")
                await self._to_guard.drain()
            await self._guard.wait()
            self._to_guard.close()
            self._guard = None
        for port in self._ports:
            port.close()
        await asyncio.to_thread(self._frames.close)
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    async def _prepare_known(self) -> Path | None:
        """The parent of a lazy dump, if CRIU takes one."""
        try:
            self._known = await asyncio.to_thread(KnownPages.prepare, self._session / "known")
        except (KernelCacheError, OSError) as error:
            self.why_slow = str(error)
            return None
        return self._known.directory

    def _dump_command(self, parent: Path | None, *, is_lazy: bool) -> list[str]:
        return self._runtime.checkpoint_command(
            self.container,
            self.image_dir,
            self._work_dir,
            lazy=is_lazy,
            parent=os.path.relpath(parent, self.image_dir) if parent else None,
        )

    async def _start_guard(self, plan: GuardPlan) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._guard = Outliving(
                module_command("migrate.guard"),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=None,
            )
        self._from_guard, self._to_guard = await asyncio.open_connection(sock=ours)
        self._to_guard.write(msgspec.json.encode(plan) + b"\n")
        async with asyncio.timeout(config.PREPARE_DEADLINE_S):
            armed = await self._from_guard.readline()
        if armed != b"armed\n":
            raise DumpFailed("the guard of the freeze did not start", host=self._host)
        took = psutil.Process(self._guard.pid).cpu_times()
        self.started_cpu_ms = 1000 * (took.user + took.system)

    async def _until(self, action: str, deadline_s: float) -> int:
        assert self._hold is not None
        assert self._process is not None
        run = RuntimeOrCriu(self._process, self._work_dir)
        seen_us = await self._hold.wait_or_end(action, run, deadline_s)
        if seen_us is None:
            why = run.why("dump.log")
            raise DumpFailed(
                f"the dump did not come to {action}: {why.line}",
                host=self._host,
                phase="dump",
                remedy=why.remedy,
            )
        return seen_us
