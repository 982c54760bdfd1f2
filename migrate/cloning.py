"""The coordinator of a copy: the container runs on, and what it was at one moment runs elsewhere.

    preflight ─ session ─ rounds ─ prepare ─ freeze, keep, thaw ─ send ─ restore ─ run ─ fill
                                            └── `capturing.py` ──┘
                 the container stands still:  ^^^^^^^^^^^^^^^^^^^

There is no handover: the container is this host's at every moment. To the journal it is a migration
that is undone when it has what it wants, so that whatever happens to this process, a recovery does
what is right already: it thaws and plugs, and the target keeps nothing that it was not told to run
(decision 0023). Nothing is decided by the order of events as in `coordinator.py`, so there is no
table: one step follows the other, and the first that fails ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog

from criu_glue import images
from criu_glue.errors import CriuGlueError
from migrate import config, copy_identity, preflight, progress, recovery
from migrate.capturing import Capturing
from migrate.copy_session import CopySession
from migrate.copying import Copying
from migrate.core.states import SourceState as S
from migrate.core.throttling import Act
from migrate.driver import quietly
from migrate.errors import (
    Cancelled,
    JournalError,
    MigrateError,
    NotConverging,
    PreflightRefused,
    remedy_of,
    runs_on,
)
from migrate.freezing import Freezing
from migrate.mounts import mount_tmpfs
from migrate.report import CloneReport, CopyReport, ReportBuilder
from migrate.standstill import restore_request
from migrate.target_link import TargetLink
from migrate.throttle import Throttle
from migrate.undertaking import Undertaking, of_below
from transport.errors import TransportError
from transport.sender import default_streams

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from migrate.brakes import BrakePlan
    from migrate.capturing import Capture
    from migrate.core.messages import CopySignal
    from migrate.facts import ContainerFacts
    from migrate.network_identity import IP
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.report import Outcome
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The copy that is asked for. addresses: its own, one of each family that it is to have. hook,
    signal: as `copy_identity.CopyIdentity` has them."""

    name: str
    addresses: tuple[IP, ...]
    hook: str = ""
    signal: CopySignal | None = None


class Cloning:
    """One copy. `run` returns the report or raises what ended it, with `report` set."""

    def __init__(
        self,
        options: Options,
        wanted: Wanted,
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        self._options = options
        self._wanted = wanted
        self._runtime = runtime
        self._paths = paths
        self._observer = observer
        self._migration_id = migration_id
        self._host = socket.gethostname()
        self._directory = paths.session(migration_id, "source")
        self._builder = ReportBuilder(migration_id, options.container, self._host, options.target)
        self._builder.runtime = runtime.name
        self._begun = Undertaking(migration_id, runtime, paths, self._host)
        self._copy: CopySession | None = None
        self._throttle: Throttle | None = None
        self._copying: Copying | None = None
        self._freezing: Freezing | None = None
        self._working: asyncio.Task[None] | None = None
        self._phase = "preflight"
        self._pause_ms: float | None = None
        self._is_told_to_run = False
        self._is_made = False
        self._recorded: S | None = None
        self.report: CloneReport | None = None

    async def run(self) -> CloneReport:
        """Make the copy. Raises MigrateError; the container runs on, unless that says otherwise."""
        try:
            await self._begun.begin(self._options.container, self._options.target)
            self._recorded = S.NEW
            self._working = asyncio.create_task(self._steps())
            try:
                await asyncio.wait({self._working})
                await self._working
            except (Exception, asyncio.CancelledError) as cause:
                error = self._translated(cause).at(host=self._host, phase=self._phase)
                error = await self._explained(error)
                await self._give_up(error)
                self.report = self._built("aborted", error)
                raise error from cause
            self.report = self._built("done")
            return self.report
        finally:
            await self._close()

    async def cancel(self) -> None:
        """The user wants it to end. A copy that runs already stays."""
        if self._working is not None and not self._is_told_to_run:
            self._working.cancel()

    async def _steps(self) -> None:
        facts = await self._preflight()
        copy = await self._open(facts)
        copying = await self._begin_copying(facts, copy)
        await _or_failure(copying.copy_rootfs(), copy)
        while copying.has_rounds and await _or_failure(self._round(copying), copy):
            pass
        capturing = await _or_failure(self._prepare(facts, copy, copying), copy)
        capture = await self._stand_still(capturing)
        await _or_failure(capturing.send(capture), copy)
        await self._restore(copy, copying, capture)
        await self._let_run(copy)

    # --- while the container runs ---

    def _enter(self, phase: str, detail: str = "") -> None:
        self._phase = phase
        self._observer.tell(progress.Phase(phase, detail))

    async def _preflight(self) -> ContainerFacts:
        self._enter("preflight")
        options = self._options
        checked = await asyncio.to_thread(
            preflight.check_source,
            self._runtime,
            options.container,
            options.shared,
            restore=options.restore,
            streams=options.streams or default_streams(),
            host=self._host,
            paths=self._paths,
            target=options.target,
            is_copied=True,
        )
        self._options = replace(options, restore=checked.restore)
        self._builder.restore = checked.restore
        self._builder.memory_bytes = checked.facts.memory_bytes
        self._builder.add_versions(self._host, checked.facts.versions)
        for caution in checked.cautions:
            self._warn(f"{caution.message}; {caution.remedy}")
        return checked.facts

    async def _open(self, facts: ContainerFacts) -> CopySession:
        options = self._options
        wanted = self._wanted
        identity = replace(
            copy_identity.identity_of(facts.network, wanted.name, wanted.addresses),
            hook=wanted.hook,
            signal=wanted.signal,
        )
        taken = preflight.judge_addresses(identity.addresses, preflight.own_addresses())
        if taken:
            raise PreflightRefused(taken, host=self._host)
        for address in copy_identity.left_out(facts.network, identity):
            self._warn(f"the copy has none for the address {address}; give one more --ip")
        link = TargetLink(options.target, options.port, self._paths, options.way)
        await self._record(S.PRECOPY, "preflight_passed")
        self._copy = CopySession(link, identity, patience_s=options.link_patience_s)
        opened = await self._copy.open(
            facts.open_session(
                migration_id=self._migration_id,
                attempt=self._begun.attempt,
                host=self._host,
                streams=options.streams or default_streams(),
                restore=options.restore,
                dry_run=False,
                patience_s=options.link_patience_s,
                copy=identity,
            )
        )
        await self._note(peer_host=opened.host, port=options.port)
        self._builder.add_versions(options.target, opened.versions)
        for caution in opened.cautions:
            self._warn(f"{options.target}: {caution.message}; {caution.remedy}")
        return self._copy

    async def _begin_copying(self, facts: ContainerFacts, copy: CopySession) -> Copying:
        assert copy.link.opened is not None
        self._phase = "precopy"
        await asyncio.to_thread(self._make_directory, facts)
        self._throttle = Throttle(
            facts.container.cgroup, self._directory, self._note_brake, self._warn
        )
        self._copying = Copying(
            facts,
            self._options,
            copy.link,
            self._directory,
            self._host,
            self._observer,
            self._builder,
            self._throttle,
        )
        self._copying.clocks = await copy.talk.relate_clocks()
        await self._copying.start(copy.link.opened, self._runtime, self._migration_id)
        return self._copying

    def _make_directory(self, facts: ContainerFacts) -> None:
        self._directory.mkdir(mode=0o700, parents=True)
        room = facts.memory_bytes + config.SESSION_RESERVE_BYTES + config.SNAPSHOT_BYTES_MAX
        mount_tmpfs(self._directory, room)

    async def _round(self, copying: Copying) -> bool:
        """One round; whether there is to be another one."""
        reaction = await copying.run_round()
        if reaction.act is Act.ABORT:
            raise NotConverging(
                reaction.reason,
                remedy="more bandwidth, a higher --max-downtime, --on-stall throttle,"
                " or --on-stall freeze",
            )
        return reaction.act is not Act.FREEZE

    async def _prepare(
        self, facts: ContainerFacts, copy: CopySession, copying: Copying
    ) -> Capturing:
        """Both runtimes come as far as their gates; the last passes that the container runs
        through."""
        self._enter("prepare", f"{copy.host} starts its restore")
        container = facts.container
        await copy.prepare(container.descriptors)
        self._freezing = Freezing(
            container, self._runtime, facts.network, self._directory, self._host
        )
        plan = await self._freezing.prepare(
            self._migration_id, self._paths, parent=copying.memory.pages.parent
        )
        await self._note(
            guard=msgspec.to_builtins(plan),
            network=msgspec.to_builtins(facts.network_handle),
            bundle=str(container.bundle),
        )
        capturing = Capturing(copying, self._freezing, self._builder, self._directory)
        await capturing.look()
        await copying.copy_rootfs()
        await copying.last_round()
        await copy.prepared()
        return capturing

    async def _stand_still(self, capturing: Capturing) -> Capture:
        assert self._throttle is not None
        self._enter("freeze")
        await self._record(S.FROZEN, "target_prepared")
        # CRIU executes code in the tasks, and the freezer has to be still.
        await self._throttle.lift()
        capture = await capturing.capture()
        self._pause_ms = round(capture.pause_ms, 3)
        await self._record_quietly(S.ROLLING_BACK, "given_back")
        self._enter("send", f"the container stood still for {capture.pause_ms:.0f} ms and runs on")
        return capture

    # --- while it runs on ---

    async def _restore(self, copy: CopySession, copying: Copying, capture: Capture) -> None:
        assert self._freezing is not None
        self._enter("restore", f"on {copy.host}")
        stored = await asyncio.to_thread(images.store_ranges, self._freezing.image_dir)
        carried = await asyncio.to_thread(copying.memory.sender.carried)
        request = restore_request(copy.sealed(self._host, carried), stored, capture.confinement)
        await copy.restore(request, lazy=self._options.restore == "lazy")

    async def _let_run(self, copy: CopySession) -> None:
        self._is_told_to_run = True
        await copy.run()
        self._is_made = True
        await quietly(self._note(copied=copy.identity.name))
        where = ", ".join(copy.identity.addresses)
        self._enter("copied", f"{copy.identity.name} runs on {copy.host} {where}".rstrip())
        fill = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.FILL_DEADLINE_S):
                fill = await copy.talk.wait_filled()
        if fill is None:
            self._warn(f"the fill on {copy.host} was not heard of")
        else:
            self._builder.add_fill(fill)
            self._observer.tell(progress.Filled(fill.fill_ms, fill.faults))

    # --- ends ---

    async def _give_up(self, error: MigrateError) -> None:
        """The container first, then everything else. Raises RollbackFailed."""
        log.info("the copy is given up", why=str(error))
        if self._copying is not None:
            self._copying.abort()
        if self._throttle is not None:
            await self._throttle.lift()
        if self._freezing is not None:
            await self._freezing.undo()
        error.at(container_state=runs_on(self._host))
        if self._copy is not None:
            await self._copy.abandon(error.message)

    async def _close(self) -> None:
        if self._copying is not None:
            await quietly(self._copying.close())
        if self._throttle is not None:
            await quietly(self._throttle.close())
        if self._copy is not None:
            await self._copy.close()
        # Without one the freeze could not be undone, which is left to a recovery.
        if self.report is not None and self._recorded is not None:
            if self._recorded in (S.PRECOPY, S.FROZEN):
                await self._record_quietly(S.ROLLING_BACK, "given_back")
            await asyncio.to_thread(recovery.wipe, self._directory)
            await self._record_quietly(S.ABORTED, "cloned" if self._is_made else "rolled_back")
        await self._begun.close()

    async def _record(self, state: S, event: str) -> None:
        await self._begun.ledger.record(str(state), event)
        self._recorded = state

    async def _record_quietly(self, state: S, event: str) -> None:
        """What a recovery would come to as well may be missing."""
        try:
            await self._record(state, event)
        except JournalError as error:
            self._warn(f"{state} is not in the journal: {error.message}")

    async def _note(self, **facts: Any) -> None:
        await self._begun.journal.note(self._migration_id, "source", **facts)

    async def _note_brake(self, plan: BrakePlan) -> None:
        await self._note(brake=msgspec.to_builtins(plan))

    def _built(self, outcome: Outcome, error: MigrateError | None = None) -> CloneReport:
        identity = self._copy.identity if self._copy else None
        copy = CopyReport(
            self._wanted.name, self._options.target, identity.addresses if identity else ()
        )
        copying = self._builder.build(outcome, error)
        return CloneReport((copy,), self._pause_ms, copying)

    def _translated(self, cause: BaseException) -> MigrateError:
        match cause:
            case MigrateError():
                return cause
            case asyncio.CancelledError():
                return Cancelled("the copy was cancelled")
            case TransportError() | CriuGlueError() | TimeoutError():
                return of_below(cause, self._host, self._options.target, self._phase)
            case OSError():
                return MigrateError(str(cause), remedy=remedy_of(cause))
            case _:
                log.exception("the copy failed", exc_info=cause)
                return MigrateError(f"{self._phase}: {type(cause).__name__}: {cause}")

    async def _explained(self, error: MigrateError) -> MigrateError:
        """What is to be said of the copy, or of the container, in place of what came of it."""
        options = self._options
        if self._is_told_to_run and not self._is_made:
            # A target that did not say that the copy runs lets it run, or wipes it.
            return MigrateError(
                f"it is not known whether {self._wanted.name} runs on {options.target}:"
                f" {error.message}",
                host=error.host,
                phase=error.phase,
                remedy=f"see on {options.target}: migrate status {self._migration_id}",
            )
        if self._copying is not None and await asyncio.to_thread(self._has_ended):
            return MigrateError(
                f"{options.container} has ended while it was copied: {error.message}",
                host=self._host,
                phase=error.phase,
                container_state="does not run",
                remedy="start it, and copy it then",
            )
        return error

    def _has_ended(self) -> bool:
        """Whether the container runs no more, as far as its runtime can tell. Blocking."""
        with contextlib.suppress(MigrateError):
            return self._runtime.state(self._options.container) in (None, "stopped")
        return False

    def _warn(self, message: str) -> None:
        self._builder.warn(message)
        self._observer.tell(progress.Warned(message))


async def _or_failure(work: Coroutine[Any, Any, _T], copy: CopySession) -> _T:
    """The result of `work`, or what ended the copy on its target meanwhile."""
    running = asyncio.create_task(work)
    try:
        ways: set[asyncio.Future[Any]] = {running, copy.failed}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if copy.failed.done():
            copy.failed.result()
        return await running
    finally:
        running.cancel()
