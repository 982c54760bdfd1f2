"""One restore on the target: the runtime, its held CRIU and the pager, as one thing.

    prepare   the runtime is started and comes as far as its CRIU, which waits at the gate
    restore   the images are complete: CRIU restores and is held before the first instruction
    commit    CRIU is let go: the port is plugged in, the tasks run
    abort     everything that was made is undone; allowed until commit

Every step has a deadline; a step that fails leaves the rest to `abort`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog

from criu_glue import images
from criu_glue.hooks import (
    CriuHold,
    HoldPlan,
    criu_pid,
    has_seen,
    is_let_go,
    is_refused,
)
from criu_glue.urgency import STANDSTILL, give_timers_slack, make_urgent
from migrate import cgroup, config, confinement, masked, output_keeper
from migrate.agent.ending import end_restore, stop_on_zeros, wait_criu_ended
from migrate.agent.pager_process import PagerProcess
from migrate.criu_run import OWN_NETWORK, RuntimeOrCriu
from migrate.errors import RestoreFailed
from migrate.grace_periods import GracePeriods
from migrate.processes import Outliving, waited
from migrate.runtimes.command import DESCRIPTORS_NAME, descriptors_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from criu_glue.page_store import PageStore
    from migrate.agent.pager_process import FillResult
    from migrate.core.confinement import Confinements
    from migrate.network_identity import IP, Port
    from migrate.runtimes.base import Runtime


log = structlog.get_logger()

_CRIU_OPTIONS = ("manage-cgroups ignore", "network-lock skip", "verbosity 2")
# The original has them still; its copy gets sockets that are not connected.
_NO_CONNECTIONS = "tcp-close"


class CopyRefused(RestoreFailed):
    """The restored tasks were held back less than on their source, and were killed before their
    first instruction."""


@dataclass(frozen=True, slots=True)
class Renaming:
    """What a copy's images are made to say in place of the original's."""

    hostname: str
    addresses: Mapping[IP, IP]


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What is restored and where: all paths are the agent's own, none came from the wire.

    root_group: which group of the host is root's in the container's user namespace, if it has one.
    renaming: of a copy, whose original runs on. fill: whether all of a lazy restore's memory is
    brought in, needed or not.
    """

    container: str
    bundle: Path
    run: Path
    session: Path
    lazy: bool
    ports: tuple[Port, ...]
    root_group: int | None
    renaming: Renaming | None = None
    fill: bool = True

    @property
    def image_dir(self) -> Path:
        """CRIU's small image files."""
        return self.session / "img"

    @property
    def memory_dir(self) -> Path:
        """The page store, which is also the parent of the images."""
        return self.session / "mem"

    @property
    def work_dir(self) -> Path:
        """Logs, sockets and the programs of the hold."""
        return self.session / "work"

    @property
    def fill_deadline_s(self) -> float | None:
        """For the last page to come; without a fill it may never be needed."""
        return config.FILL_DEADLINE_S if self.fill else None

    @property
    def confinement(self) -> Path:
        """What the source said of its tasks, for a judge that comes when the agent is gone."""
        return self.work_dir / "confinement.json"


class Restoring:
    """See the module. Methods are to be called once each, in order, from one event loop.

    make_network: fills the network namespace of a task, by its pid, where CRIU is to make that
    namespace; blocking. Without, the container is in one that was made before.
    """

    def __init__(
        self,
        plan: RestorePlan,
        runtime: Runtime,
        host: str,
        make_network: Callable[[int], None] | None = None,
    ) -> None:
        self.plan = plan
        self._make_network = make_network
        self._runtime = runtime
        self._host = host
        self._hold: CriuHold | None = None
        self._pager: PagerProcess | None = None
        self._process: Outliving | None = None
        self._keeper: Outliving | None = None
        self._expected: Confinements | None = None
        self._making: asyncio.Future[None] | None = None
        self._grace_periods = GracePeriods(plan.run, "agent")

    async def prepare(self, descriptors: tuple[str, str, str], orphaned: tuple[str, ...]) -> None:
        """Start the runtime and the pager; returns when CRIU waits at its gate. `orphaned` is who
        looks after the hold when this agent is gone."""
        plan = self.plan
        (plan.image_dir / DESCRIPTORS_NAME).write_bytes(descriptors_json(descriptors))
        at_unlock = tuple(
            ("ip", "link", "set", "dev", port.host_end, "master", str(port.bridge), "up")
            for port in plan.ports
        )
        self._hold = CriuHold.prepare(
            plan.work_dir / "hold",
            HoldPlan(
                "post-restore",
                (
                    *_CRIU_OPTIONS,
                    masked.restore_option(plan.session / "masked"),
                    *(("lazy-pages",) if plan.lazy else ()),
                    *(self._copy_options() if plan.renaming else ()),
                    *((OWN_NETWORK,) if self._make_network else ()),
                ),
                at_unlock,
                join=self._cgroup(),
                outside=cgroup.own() if self._runtime.sets_limits_late else None,
                orphaned=orphaned,
                judged=confinement.command(
                    plan.confinement, self._cgroup(), plan.work_dir / "hold"
                ),
                at_refusal=tuple(
                    ("ip", "link", "set", "dev", port.host_end, "nomaster") for port in plan.ports
                ),
                needs_network=self._make_network is not None,
            ),
        )
        if plan.lazy:
            self._pager = await PagerProcess.start(
                plan.work_dir, plan.memory_dir, plan.image_dir, on_demand=not plan.fill
            )
        command = self._runtime.restore_command(
            plan.container, plan.bundle, plan.image_dir, plan.work_dir, lazy=plan.lazy
        )
        output = self._output(descriptors)
        environment = self._hold.environment(os.environ)
        self._process = Outliving(
            command,
            cwd=plan.bundle,
            env=environment,
            stdout=output,
            stderr=output,
            # CRIU gives a task that had none those that it has itself: an agent that was started
            # over SSH has root's.
            groups=(),
        )
        if output != subprocess.DEVNULL:
            os.close(output)
        await self._until("gate", config.PREPARE_DEADLINE_S)

    def _copy_options(self) -> tuple[str, ...]:
        """A runtime's word on cgroups outweighs `manage-cgroups`, and the images have the
        original's path (`criu/cgroup.c: rewrite_cgroup_roots`). cgroup v2's controller has no name.
        """
        if not self._runtime.renames_cgroups:
            return (_NO_CONNECTIONS,)
        return (_NO_CONNECTIONS, f"cgroup-root :{self._cgroup_path()}")

    def _output(self, descriptors: tuple[str, str, str]) -> int:
        """What the container's output is connected to here: the runtime puts its own streams in the
        place of pipes. The keeper ends with the container."""
        if not any(descriptor.startswith("pipe:") for descriptor in descriptors[1:]):
            return subprocess.DEVNULL
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            log = str(self.plan.bundle / "output.log")
            self._keeper = Outliving(
                [sys.executable, "-ISE", output_keeper.__file__, log], stdin=read_fd
            )
        finally:
            os.close(read_fd)
        return write_fd

    async def restore(self, store: PageStore, expected: Confinements) -> dict[str, int]:
        """Restore from the complete images and the store of all else; returns the marks (µs) of
        gate and hold. `expected` is what has to hold the tasks back before they may run."""
        plan = self.plan
        self._expected = expected
        plan.confinement.write_bytes(msgspec.json.encode(expected))
        await asyncio.to_thread(self._complete_images, store)
        assert self._process is not None
        # Not what the runtime starts: hooks of the container's, which may leave a daemon behind.
        make_urgent(self._process.pid, STANDSTILL, inherited=False)
        self._grace_periods.shorten()
        try:
            return await self._restored()
        finally:
            self._grace_periods.put_back()

    async def _restored(self) -> dict[str, int]:
        assert self._hold is not None
        plan = self.plan
        deadline_s = config.RESTORE_DEADLINE_S if plan.lazy else config.EAGER_RESTORE_DEADLINE_S
        marks = {"restore": self._hold.open_gate()}
        if self._make_network is not None:
            await self._until("setup-namespaces", deadline_s)
            making = asyncio.to_thread(self._make_network, self._hold.init_pid())
            self._making = asyncio.ensure_future(making)
            await asyncio.shield(self._making)
            self._hold.network_is_made()
        marks["held"] = await self._until("post-restore", deadline_s)
        return marks

    def _complete_images(self, store: PageStore) -> None:
        images.attach_page_store(self.plan.image_dir, store)
        images.rearm_timers(self.plan.image_dir)
        if self.plan.renaming is not None:
            renaming = self.plan.renaming
            group = None if self._runtime.renames_cgroups else self._cgroup_path()
            images.rename(self.plan.image_dir, renaming.hostname, renaming.addresses, group)
        if self.plan.root_group is not None:
            self._let_read(self.plan.root_group)

    def _let_read(self, group: int) -> None:
        """In a user namespace CRIU opens images as its root (`criu/image.c: do_open_image`), by a
        descriptor of their directory: nobody else comes to the session, whoever has that group."""
        self.plan.session.parent.chmod(0o700)
        for directory in (self.plan.image_dir, self.plan.memory_dir):
            for path in directory.iterdir():
                if not path.is_symlink():
                    _open_to(path, group, 0o640)
            _open_to(directory, group, 0o750)
        _open_to(self.plan.session, group, 0o710)

    async def commit(self, let_in: Callable[[], Awaitable[None]]) -> dict[str, int]:
        """Let the container run, unless it is held back less than its source was (CopyRefused);
        returns the marks (µs) of the release and of the first run. `let_in` is awaited as soon as
        nothing but its tasks' first instruction is missing: its connections are awake."""
        self._grace_periods.shorten()
        try:
            return await self._resumed(let_in)
        finally:
            self._grace_periods.put_back()

    async def _resumed(self, let_in: Callable[[], Awaitable[None]]) -> dict[str, int]:
        assert self._hold is not None
        marks = {"released": self._hold.decide("commit")}
        deadline_s = config.HANDOVER_DEADLINE_S
        try:
            await self._until("pre-resume", deadline_s)
            await self._judge()
            await let_in()
            marks["resumed"] = await self._until("post-resume", deadline_s)
        except CopyRefused:
            raise
        except RestoreFailed:
            # A runtime that was killed does not keep its CRIU from letting the tasks run.
            if not await asyncio.to_thread(self._is_resumed, deadline_s):
                raise
            marks["resumed"] = time.monotonic_ns() // 1000
        if self._runtime.sets_limits_late:
            await self._settle()
            marks["resumed"] = time.monotonic_ns() // 1000
        return marks

    async def _settle(self) -> None:
        """Wait until the tasks have their limits and are thawed. A runtime that hangs is killed:
        they run without, rather than not at all."""
        assert self._process is not None
        is_settled = partial(has_seen, self.plan.work_dir / "hold", "settled")
        if not await asyncio.to_thread(waited, is_settled, config.RUNTIME_EXIT_DEADLINE_S):
            self._process.kill()
            await asyncio.to_thread(waited, is_settled, config.RUNTIME_EXIT_DEADLINE_S)
        if await self._process.wait() != 0:
            log.error("the runtime failed when its copy was to run", container=self.plan.container)

    async def _judge(self) -> None:
        """Only here have the tasks what holds them back; CRIU gives it to them at the very end."""
        assert self._hold is not None
        assert self._expected is not None
        await asyncio.to_thread(give_timers_slack, self._cgroup())
        found = await asyncio.to_thread(confinement.differences, self._expected, self._cgroup())
        self._hold.judge("refuse" if found else "run")
        if not found:
            return
        hold = self.plan.work_dir / "hold"
        is_dead = await asyncio.to_thread(
            waited, partial(is_refused, hold), config.RUNTIME_EXIT_DEADLINE_S
        )
        kind = CopyRefused if is_dead else RestoreFailed
        raise kind(
            f"the copy is held back less than its source: {'; '.join(found)}",
            host=self._host,
            phase="committed",
            remedy="see whether this host's kernel and security modules are like the source's",
        )

    def _cgroup_path(self) -> str:
        """From the mount on, "/…"."""
        return f"/{self._cgroup().relative_to(cgroup.MOUNT)}"

    def _cgroup(self) -> Path:
        group = self._runtime.restored_cgroup(self.plan.bundle, self.plan.container)
        assert group is not None
        return group

    async def is_lost(self) -> bool:
        """Returns when the runtime or its CRIU has ended: whether without the copy having been let
        go.

        It is dead then: a CRIU that has lost its runtime, and could not tell it of the restore's
        end, is told to undo it.
        """
        assert self._process is not None
        hold = self.plan.work_dir / "hold"
        await RuntimeOrCriu(self._process, self.plan.work_dir).wait()
        if is_let_go(hold):
            return False
        if self._hold is not None:
            self._hold.decide("abort")
        await asyncio.to_thread(wait_criu_ended, hold, config.RUNTIME_EXIT_DEADLINE_S)
        return not is_let_go(hold)

    def _is_resumed(self, deadline_s: float) -> bool:
        """Whether CRIU comes to its end by itself. Blocking."""
        hold = self.plan.work_dir / "hold"

        def is_over() -> bool:
            return has_seen(hold, "post-resume") or criu_pid(hold) is None

        return waited(is_over, deadline_s) and has_seen(hold, "post-resume")

    async def finish(self) -> FillResult | None:
        """Wait for the runtime's end and for the last page; None for an eager restore. Raises
        PagerLost, with the container frozen, when memory is lost."""
        assert self._process is not None
        async with asyncio.timeout(config.RUNTIME_EXIT_DEADLINE_S):
            await self._process.wait()
        self.close()
        if self._pager is None:
            return None
        on_lost = partial(stop_on_zeros, self.plan, self._runtime)
        return await self._pager.wait_filled(self.plan.fill_deadline_s, on_lost=on_lost)

    async def abort(self) -> None:
        """Undo all of it: nothing restored remains, neither do the processes that did it."""
        # As long as it is open here, its words would be taken for heard.
        self.close()
        if self._making is not None:
            # A thread goes on; what it makes has to be there when it is removed.
            await asyncio.wait([self._making])
        if self._process is not None:
            await asyncio.to_thread(end_restore, self.plan.session)
            await self._process.wait()
        if self._pager is not None:
            await self._pager.end()
        if self._process is not None:
            await asyncio.to_thread(self._delete)

    def _delete(self) -> None:
        """Blocking. A restore that failed leaves a cgroup that the runtime may know nothing of."""
        self._runtime.delete(self.plan.container, bundle=self.plan.bundle)

    def close(self) -> None:
        """Give up the observation of the hooks."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    async def _until(self, action: str, deadline_s: float) -> int:
        assert self._hold is not None
        assert self._process is not None
        run = RuntimeOrCriu(self._process, self.plan.work_dir)
        seen_us = await self._hold.wait_or_end(action, run, deadline_s)
        if seen_us is None:
            why = run.why("restore.log")
            raise RestoreFailed(
                f"the restore did not come to {action}: {why.line}",
                host=self._host,
                phase="restore",
                remedy=why.remedy,
            )
        return seen_us


def _open_to(path: Path, group: int, mode: int) -> None:
    os.chown(path, -1, group)
    path.chmod(mode)
