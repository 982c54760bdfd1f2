"""What copying a container takes that runs on, wherever the copies go.

    preflight ─ sessions ─ rounds ─ prepare ─ freeze, keep, thaw ─ send ─ finish
                                             └── `capturing.py` ──┘
                  the container stands still:  ^^^^^^^^^^^^^^^^^^^

What is sent and finished, and to whom, say `cloning.py` (hosts) and `saving.py` (a directory).

There is no handover: the container is this host's at every moment. To the journal each copy is a
migration that is undone when it has what it wants, so that whatever happens to this process, a
recovery does what is right already: it thaws and plugs, and the targets keep nothing that they were
not told to run (decisions 0023, 0024). Nothing is decided by the order of events as in
`coordinator.py`, so there is no table: one step follows the other, and the first that fails
everywhere ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog

from criu_glue.errors import CriuGlueError
from migrate import config, progress, recovery
from migrate.capturing import Capturing, send
from migrate.copying import Rounds
from migrate.core.clock_relation import ClockRelation
from migrate.core.prediction import pace
from migrate.core.states import SourceState as S
from migrate.core.throttling import Act
from migrate.driver import quietly
from migrate.errors import (
    Cancelled,
    JournalError,
    MigrateError,
    NotConverging,
    remedy_of,
    runs_on,
)
from migrate.first_steps import FirstSteps, make_directory
from migrate.freezing import Freezing
from migrate.report import CloneReport, CopyReport, ReportBuilder, error_report
from migrate.throttle import Throttle
from migrate.undertaking import Undertaking, of_below
from transport.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence
    from pathlib import Path

    from migrate.brakes import BrakePlan
    from migrate.capturing import Capture
    from migrate.copies_wanted import Wanted
    from migrate.copy_session import CopySession
    from migrate.core.confinement import Confinements
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.report import Outcome
    from migrate.rootfs_snapshot import RootfsSnapshot
    from migrate.runtimes.base import Runtime
    from migrate.target_link import TargetLink
    from migrate.undertaking import Entry

log = structlog.get_logger()

_T = TypeVar("_T")


class Duplicating(ABC):
    """Copies of one container. `run` returns the report or raises what ended it; `report` is set.

    `options.target` names all targets, for people. `wanted`: for the report.
    """

    def __init__(
        self,
        options: Options,
        wanted: Sequence[Wanted],
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        self._wanted = tuple(wanted)
        self._runtime = runtime
        self._paths = paths
        self._observer = observer
        self._migration_id = migration_id
        self._host = socket.gethostname()
        self._directory = paths.session(migration_id, "source")
        self._builder = ReportBuilder(migration_id, options.container, self._host, options.target)
        self._first = FirstSteps(options, runtime, paths, self._host, self._builder, observer)
        self._begun = Undertaking(migration_id, runtime, paths, self._host)
        self._throttle: Throttle | None = None
        self._rounds: Rounds | None = None
        self._freezing: Freezing | None = None
        # With whom a copy is talked about; of a directory with nobody.
        self._sessions: list[CopySession] = []
        self._working: asyncio.Task[None] | None = None
        self._phase = "preflight"
        self._pause_ms: float | None = None
        # What is made is there, or somebody else's to make: it is too late to cancel.
        self._is_given = False
        self._errors: dict[str, MigrateError] = {}
        self._recorded: S | None = None
        self.report: CloneReport | None = None

    async def run(self) -> CloneReport:
        """Make the copies. Raises MigrateError when there is none; the container runs on, unless
        that says otherwise."""
        try:
            await self._begun.begin(self._options.container, self._wanted[0].host)
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
        """The user wants it to end. Copies that run already stay."""
        if self._working is not None and not self._is_given:
            self._working.cancel()

    # --- what a kind of copies says for itself ---

    @property
    @abstractmethod
    def _targets(self) -> tuple[str, ...]:
        """The hosts that have to be let have it."""

    @abstractmethod
    async def _open(self, facts: ContainerFacts) -> None:
        """Ask for room where the copies go; S.PRECOPY is recorded before anything is there."""

    @abstractmethod
    async def _copy_rootfs(self) -> None:
        """A pass over the root file system while the container runs."""

    @abstractmethod
    async def _prepare_targets(self, descriptors: tuple[str, str, str]) -> None:
        """Have all that takes its time begin before the freeze."""

    @abstractmethod
    async def _send_snapshot(self, snapshot: RootfsSnapshot) -> None:
        """Make of the files there what they were in the freeze."""

    @abstractmethod
    async def _finish(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        """All is there: make what was wanted of it."""

    def _new_rounds(self, *given: Any) -> Rounds:
        """What copies the memory there."""
        return Rounds(*given)

    def _links(self) -> Sequence[TargetLink]:
        """Of the targets, which are ready for files from here on."""
        return ()

    def _lost(self, link: TargetLink, error: TransportError) -> None:
        """The streams can't reach this target any more. Raises `error` where there is no other."""
        raise error

    async def _clocks(self) -> ClockRelation:
        """Between this host and where the copies go; a directory is no way off."""
        return ClockRelation(0, error_us=0)

    async def _meanwhile(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is for all targets."""
        return await work

    def _ends(self) -> Iterator[tuple[Entry, str]]:
        """The entries in the journal, and the events that they end with."""
        yield self._begun.entry, "rolled_back"

    # --- while the container runs ---

    @property
    def _options(self) -> Options:
        return self._first.options

    async def _steps(self) -> None:
        self._enter("preflight")
        facts = await self._first.check(self._targets, is_copied=True)
        await self._open(facts)
        rounds = await self._begin_rounds(facts)
        await self._copy_rootfs()
        while rounds.has_rounds and await self._meanwhile(self._round(rounds)):
            pass
        capturing = await self._prepare(facts, rounds)
        capture = await self._stand_still(capturing)
        assert self._freezing is not None
        image_dir = self._freezing.image_dir
        sent = send(capture, capturing.snapshot, rounds.memory, image_dir, self._builder)
        await self._meanwhile(sent)
        await self._send_snapshot(capturing.snapshot)
        await self._finish(rounds, image_dir, capture.confinement)

    def _enter(self, phase: str, detail: str = "") -> None:
        self._phase = phase
        self._observer.tell(progress.Phase(phase, detail))

    async def _begin_rounds(self, facts: ContainerFacts) -> Rounds:
        self._phase = "precopy"
        await asyncio.to_thread(
            make_directory, self._directory, facts, more_bytes=config.SNAPSHOT_BYTES_MAX
        )
        self._throttle = Throttle(
            facts.container.cgroup, self._directory, self._note_brake, self._first.warn
        )
        self._rounds = self._new_rounds(
            facts,
            self._options,
            self._links(),
            self._directory,
            self._host,
            self._observer,
            self._builder,
            self._throttle,
            self._lost,
        )
        self._rounds.clocks = await self._clocks()
        await self._meanwhile(self._rounds.start(self._runtime, self._migration_id))
        return self._rounds

    async def _round(self, rounds: Rounds) -> bool:
        """One round; whether there is to be another one."""
        reaction = await rounds.run_round()
        if reaction.act is Act.ABORT:
            raise NotConverging(
                reaction.reason,
                remedy="more bandwidth, a higher --max-downtime, --on-stall throttle,"
                " or --on-stall freeze",
            )
        return reaction.act is not Act.FREEZE

    async def _prepare(self, facts: ContainerFacts, rounds: Rounds) -> Capturing:
        """All runtimes come as far as their gates; the last passes that the container runs
        through."""
        container = facts.container

        await self._prepare_targets(container.descriptors)
        self._freezing = Freezing(
            container, self._runtime, facts.network, self._directory, self._host
        )
        plan = await self._freezing.prepare(
            self._migration_id, self._paths, parent=rounds.memory.pages.parent
        )
        rounds.pace = pace(self._freezing.started_cpu_ms)
        await self._begun.entry.note(
            guard=msgspec.to_builtins(plan),
            network=msgspec.to_builtins(facts.network_handle),
            bundle=str(container.bundle),
        )
        capturing = Capturing(rounds, self._freezing, self._directory)
        await capturing.look()
        await self._copy_rootfs()
        await self._meanwhile(rounds.last_rounds())
        return capturing

    async def _stand_still(self, capturing: Capturing) -> Capture:
        """Nobody is waited for: not even whether a target fails is heard of."""
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

    # --- ends ---

    async def _give_up(self, error: MigrateError) -> None:
        """The container first, then everything else. Raises RollbackFailed."""
        log.info("the copies are given up", why=str(error))
        if self._rounds is not None:
            self._rounds.abort()
        if self._throttle is not None:
            await self._throttle.lift()
        if self._freezing is not None:
            await self._freezing.undo()
        error.at(container_state=runs_on(self._host))
        await asyncio.gather(*(session.abandon(error.message) for session in self._sessions))

    async def _close(self) -> None:
        if self._rounds is not None:
            await quietly(self._rounds.close())
        if self._throttle is not None:
            await quietly(self._throttle.close())
        for session in self._sessions:
            await session.close()
        # Without one the freeze could not be undone, which is left to a recovery.
        if self.report is not None and self._recorded is not None:
            await asyncio.to_thread(self._wipe)
            await self._end_entries()
        await self._begun.close()

    def _wipe(self) -> None:
        recovery.wipe(self._directory)

    async def _end_entries(self) -> None:
        for entry, event in self._ends():
            if self._recorded is not S.NEW:
                await self._record_quietly(S.ROLLING_BACK, "given_back", entry)
            await self._record_quietly(S.ABORTED, event, entry)

    async def _record(self, state: S, event: str) -> None:
        """Of the freeze."""
        await self._begun.ledger.record(str(state), event)
        self._recorded = state

    async def _record_quietly(self, state: S, event: str, entry: Entry | None = None) -> None:
        """What a recovery would come to as well may be missing."""
        try:
            if entry is None:
                await self._record(state, event)
            else:
                await entry.ledger.record(str(state), event)
        except JournalError as error:
            self._first.warn(f"{state} is not in the journal: {error.message}")

    async def _note_brake(self, plan: BrakePlan) -> None:
        await self._begun.entry.note(brake=msgspec.to_builtins(plan))

    def _built(self, outcome: Outcome, error: MigrateError | None = None) -> CloneReport:
        copies = []
        for one in self._wanted:
            why = self._errors.get(one.name, error)
            addresses = tuple(str(address) for address in one.addresses)
            copies.append(
                CopyReport(one.name, one.host, addresses, error_report(why) if why else None)
            )
        copying = self._builder.build(outcome, error)
        return CloneReport(tuple(copies), self._pause_ms, copying)

    def _translated(self, cause: BaseException, target: str = "") -> MigrateError:
        """What `cause` means, for what goes to all targets or to one."""
        match cause:
            case MigrateError():
                return cause
            case asyncio.CancelledError():
                return Cancelled("the copies were cancelled")
            case TransportError() | CriuGlueError() | TimeoutError():
                return of_below(cause, self._host, target or self._options.target, self._phase)
            case OSError():
                return MigrateError(str(cause), remedy=remedy_of(cause))
            case _:
                log.exception("the copies failed", exc_info=cause)
                return MigrateError(f"{self._phase}: {type(cause).__name__}: {cause}")

    async def _explained(self, error: MigrateError) -> MigrateError:
        """What is to be said of the container, in place of what came of it."""
        container = self._options.container
        if self._rounds is None or self._is_given:
            return error
        if not await asyncio.to_thread(self._has_ended):
            return error
        return MigrateError(
            f"{container} has ended while it was copied: {error.message}",
            host=self._host,
            phase=error.phase,
            container_state="does not run",
            remedy="start it, and copy it then",
        )

    def _has_ended(self) -> bool:
        """Whether the container runs no more, as far as its runtime can tell. Blocking."""
        with contextlib.suppress(MigrateError):
            return self._runtime.state(self._options.container) in (None, "stopped")
        return False
