"""The coordinator of copies: the container runs on, and what it was at one moment runs elsewhere.

    preflight ─ sessions ─ rounds ─ prepare ─ freeze, keep, thaw ─ send ─ restore ─ run ─ fill
                                             └── `capturing.py` ──┘
                  the container stands still:  ^^^^^^^^^^^^^^^^^^^

One pre-copy serves all hosts, and the copies on one have what came there once (`host_copies.py`).
A host that fails is left out, and so is a copy; the others go on.

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
import secrets
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import structlog

from criu_glue import images
from criu_glue.errors import CriuGlueError
from migrate import config, copy_identity, preflight, progress, recovery
from migrate.capturing import Capturing, send
from migrate.copies_wanted import in_ranges, others, readdressed
from migrate.copy_session import CopySession
from migrate.copying import Rounds
from migrate.core.clock_relation import ClockRelation
from migrate.core.states import SourceState as S
from migrate.core.throttling import Act
from migrate.driver import quietly
from migrate.errors import (
    Cancelled,
    JournalError,
    MigrateError,
    NotConverging,
    PreflightRefused,
    SessionRefused,
    UsageError,
    remedy_of,
    runs_on,
)
from migrate.first_steps import FirstSteps, make_directory
from migrate.freezing import Freezing
from migrate.host_copies import HostCopies
from migrate.report import CloneReport, CopyReport, ReportBuilder, error_report
from migrate.standstill import restore_request
from migrate.target_link import TargetLink
from migrate.throttle import Throttle
from migrate.undertaking import Undertaking, of_below
from transport.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from migrate.brakes import BrakePlan
    from migrate.capturing import Capture
    from migrate.copies_wanted import Alike, Wanted
    from migrate.copy_identity import CopyIdentity
    from migrate.core.confinement import Confinements
    from migrate.core.messages import SessionOpened
    from migrate.facts import ContainerFacts
    from migrate.network_identity import IP
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.report import Outcome
    from migrate.rootfs_snapshot import RootfsSnapshot
    from migrate.runtimes.base import Runtime
    from migrate.undertaking import Entry

log = structlog.get_logger()

# Copies that others make at the same time from the same range get some of its addresses.
READDRESSED_MAX: Final = 8

_T = TypeVar("_T")


class Cloning:
    """Copies of one container. `run` returns the report or raises what ended it; `report` is set.

    `options.target` names all hosts, for people.
    """

    def __init__(
        self,
        options: Options,
        wanted: Sequence[Wanted],
        alike: Alike,
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        self._wanted = tuple(wanted)
        self._alike = alike
        self._runtime = runtime
        self._paths = paths
        self._observer = observer
        self._migration_id = migration_id
        self._host = socket.gethostname()
        self._directory = paths.session(migration_id, "source")
        self._builder = ReportBuilder(migration_id, options.container, self._host, options.target)
        self._first = FirstSteps(options, runtime, paths, self._host, self._builder, observer)
        self._begun = Undertaking(migration_id, runtime, paths, self._host)
        # Addresses of ranges.
        self._taken: set[IP] = set()
        self._entries: list[Entry] = []
        self._sessions: list[CopySession] = []
        self._hosts: list[HostCopies] = []
        self._throttle: Throttle | None = None
        self._rounds: Rounds | None = None
        self._freezing: Freezing | None = None
        self._working: asyncio.Task[None] | None = None
        self._phase = "preflight"
        self._pause_ms: float | None = None
        self._is_told_to_run = False
        self._made: list[CopySession] = []
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
        if self._working is not None and not self._is_told_to_run:
            self._working.cancel()

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

    @property
    def _targets(self) -> tuple[str, ...]:
        """The hosts that have to be let have it."""
        return tuple(dict.fromkeys(one.host for one in self._wanted))

    # --- all hosts at once ---

    async def _on_each(self, step: Callable[[HostCopies], Coroutine[Any, Any, None]]) -> None:
        """One step on all hosts; one that fails in it is left out. Raises what the last one ended
        with."""

        async def on(host: HostCopies) -> None:
            try:
                await host.or_failure(step(host))
            except (MigrateError, TransportError, OSError, TimeoutError) as error:
                await self._leave_out(host, self._translated(error, host.host))

        await asyncio.gather(*(on(host) for host in self._hosts))

    async def _meanwhile(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is for all hosts; those that fail meanwhile are left out."""
        running = asyncio.create_task(work)
        try:
            while not running.done():
                ways: set[asyncio.Future[Any]] = {running, *(host.failed for host in self._hosts)}
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for host in [one for one in self._hosts if one.failed.done()]:
                    error = host.failed.exception()
                    assert error is not None
                    await self._leave_out(host, self._translated(error, host.host))
            return await running
        finally:
            running.cancel()

    async def _leave_out(self, host: HostCopies, error: MigrateError) -> None:
        """Go on without this host. Raises `error` when it is the last."""
        error.at(host=host.host, phase=self._phase)
        if self._hosts == [host]:
            raise error
        if host in self._hosts:
            self._hosts.remove(host)
            if self._rounds is not None:
                self._rounds.leave_out(host.first.link)
            await host.give_up(error)

    def _left_out(self, copy: CopySession, error: MigrateError) -> None:
        name = copy.identity.name
        self._errors[name] = error.at(host=copy.host, phase=self._phase)
        self._first.warn(f"there will be no copy {name} on {copy.host}: {error.message}")

    # --- while the container runs ---

    def _enter(self, phase: str, detail: str = "") -> None:
        self._phase = phase
        self._observer.tell(progress.Phase(phase, detail))

    async def _open(self, facts: ContainerFacts) -> None:
        """A session for each copy."""
        await self._choose_addresses(facts)
        await self._enter_all()
        identities = {one.name: one for one in self._identities(facts)}
        own = [address for one in identities.values() for address in one.addresses]
        taken = preflight.judge_addresses(own, preflight.own_addresses())
        if taken:
            raise PreflightRefused(taken, host=self._host)
        for address in copy_identity.left_out(facts.network, list(identities.values())):
            self._first.warn(f"no copy has one for the address {address}; give one more --ip")
        await self._record_all(S.PRECOPY, "preflight_passed")
        of_host: dict[str, list[CopySession]] = {}
        for one, entry in zip(self._wanted, self._entries, strict=True):
            link = TargetLink(one.host, one.port, self._paths, self._options.way)
            patience_s = self._options.link_patience_s
            copy = CopySession(link, identities[one.name], entry, patience_s=patience_s)
            self._sessions.append(copy)
            of_host.setdefault(one.host, []).append(copy)
        self._hosts = [
            HostCopies(copies, facts, self._options, self._observer, self._left_out)
            for copies in of_host.values()
        ]
        await self._on_each(lambda host: self._open_on(host, facts))

    async def _choose_addresses(self, facts: ContainerFacts) -> None:
        """Of ranges, those that nobody has. Raises UsageError when they are too few."""
        pools = self._alike.pools
        if not (candidates := in_ranges(pools)):
            return
        # Without such a bridge here nothing is known; the targets look for themselves.
        with contextlib.suppress(FileNotFoundError):
            self._taken = await asyncio.to_thread(
                preflight.taken_addresses, facts.network, candidates
            )
            self._wanted = readdressed(self._wanted, pools, self._taken)

    async def _enter_all(self) -> None:
        """Each copy has an entry in the journal, the first one that of the freeze."""
        container = self._options.container
        self._entries = [self._begun.entry]
        for one in self._wanted[1:]:
            entry = await self._begun.enter(secrets.token_hex(6), container, one.host)
            self._entries.append(entry)

    def _identities(self, facts: ContainerFacts) -> Iterator[CopyIdentity]:
        """The first copy of each host receives; those that come after it have what it has."""
        alike = self._alike
        entries: dict[str, Entry] = {}
        hosts = [one.host for one in self._wanted]
        is_eager = self._options.restore == "eager"
        for place, (one, entry) in enumerate(zip(self._wanted, self._entries, strict=True)):
            first = entries.setdefault(one.host, entry)
            is_alone = hosts.count(one.host) == 1
            yield replace(
                copy_identity.identity_of(facts.network, one.name, one.addresses),
                hook=alike.hook,
                signal=alike.signal,
                beside="" if first is entry else first.migration_id,
                number=hosts[:place].count(one.host),
                fill=is_eager or (is_alone if alike.fill is None else alike.fill),
            )

    async def _open_on(self, host: HostCopies, facts: ContainerFacts) -> None:
        async def open_one(copy: CopySession) -> None:
            opened = await self._ask(copy, facts)
            await self._first.heard(copy.entry, opened, copy.link.port)

        await host.each(open_one)

    async def _ask(self, copy: CopySession, facts: ContainerFacts) -> SessionOpened:
        """With another address of its range when the target has found its own taken. Raises what
        the target refused at last."""
        for _ in range(READDRESSED_MAX):
            try:
                return await copy.open(self._first.request(facts, copy.entry, copy.identity))
            except SessionRefused as refused:
                if any(code != "address-taken" for code, _, _ in refused.refusals):
                    raise
                if not self._readdress(copy, facts):
                    raise
        return await copy.open(self._first.request(facts, copy.entry, copy.identity))

    def _readdress(self, copy: CopySession, facts: ContainerFacts) -> bool:
        """Give the copy other addresses; whether there are any."""
        name = copy.identity.name
        wanted = {one.name: one for one in self._wanted}
        self._taken.update(address for one in self._wanted for address in one.addresses)
        own = wanted[name].addresses
        try:
            addresses = others(self._alike.pools, own, self._taken)
        except UsageError:
            return False
        if addresses == own:
            return False
        wanted[name] = replace(wanted[name], addresses=addresses)
        self._wanted = tuple(wanted.values())
        fresh = copy_identity.identity_of(facts.network, name, addresses)
        copy.identity = replace(copy.identity, network=fresh.network, renamed=fresh.renamed)
        return True

    async def _begin_rounds(self, facts: ContainerFacts) -> Rounds:
        self._phase = "precopy"
        await asyncio.to_thread(
            make_directory, self._directory, facts, more_bytes=config.SNAPSHOT_BYTES_MAX
        )
        self._throttle = Throttle(
            facts.container.cgroup, self._directory, self._note_brake, self._first.warn
        )
        for number, host in enumerate(self._hosts):
            host.begin(self._directory / f"host-{number}", self._host)
        by_link = {host.first.link: host for host in self._hosts}

        def lost(link: TargetLink, error: TransportError) -> None:
            by_link[link].fail(of_below(error, self._host, link.host, self._phase))

        self._rounds = self._new_rounds(
            facts,
            self._options,
            list(by_link),
            self._directory,
            self._host,
            self._observer,
            self._builder,
            self._throttle,
            lost,
        )
        self._rounds.clocks = await self._slowest()
        await self._meanwhile(self._rounds.start(self._runtime, self._migration_id))
        return self._rounds

    async def _slowest(self) -> ClockRelation:
        """Of the hosts, which decides when all of it is there everywhere; a directory is no way
        off."""
        clocks = [ClockRelation(0, error_us=0)]

        async def relate(host: HostCopies) -> None:
            clocks.append(await host.first.talk.relate_clocks())

        await self._on_each(relate)
        return max(clocks, key=lambda one: one.error_us)

    def _new_rounds(self, *given: Any) -> Rounds:
        return Rounds(*given)

    async def _copy_rootfs(self) -> None:
        """A pass over the root file system while the container runs."""
        await self._on_each(HostCopies.copy_rootfs)

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
        await self._begun.entry.note(
            guard=msgspec.to_builtins(plan),
            network=msgspec.to_builtins(facts.network_handle),
            bundle=str(container.bundle),
        )
        capturing = Capturing(rounds, self._freezing, self._directory)
        await capturing.look()
        await self._copy_rootfs()
        await self._meanwhile(rounds.last_round())
        return capturing

    async def _prepare_targets(self, descriptors: tuple[str, str, str]) -> None:
        names = " and ".join(host.host for host in self._hosts)
        self._enter("prepare", f"restores are started on {names}")

        async def prepare(copy: CopySession) -> None:
            await copy.prepare(descriptors)
            await copy.prepared()

        await self._on_each(lambda host: host.each(prepare))

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

    # --- while it runs on ---

    async def _send_snapshot(self, snapshot: RootfsSnapshot) -> None:
        """Make of the files there what they were in the freeze."""
        await self._on_each(lambda host: host.send_snapshot(snapshot))

    async def _finish(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        """All is there: make what was wanted of it."""
        await self._restore(rounds, image_dir, confinement)
        await self._let_run()

    async def _restore(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        """The copies of a host one after the other, so that each gets its processors."""
        self._enter("restore", "on " + " and ".join(host.host for host in self._hosts))
        stored = await asyncio.to_thread(images.store_ranges, image_dir)
        carried = await rounds.carried()
        is_lazy = self._options.restore == "lazy"

        async def restore(copy: CopySession) -> None:
            signed = copy.sealed(self._host, carried)
            request = restore_request(signed, stored, confinement)
            await copy.restore(request, lazy=is_lazy)

        await self._on_each(lambda host: host.each(restore))

    async def _let_run(self) -> None:
        self._is_told_to_run = True
        await asyncio.gather(*(self._run(copy) for host in self._hosts for copy in host.copies))
        if not self._made:
            raise next(iter(self._errors.values()))
        filled = [copy for copy in self._made if copy.is_filled]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.FILL_DEADLINE_S):
                await asyncio.gather(*(self._filled(copy) for copy in filled))

    async def _run(self, copy: CopySession) -> None:
        try:
            await copy.run()
        except MigrateError as error:
            self._left_out(copy, _unknown(copy, error))
            return
        self._made.append(copy)
        await quietly(copy.entry.note(copied=copy.identity.name))
        where = ", ".join(copy.identity.addresses)
        self._enter("copied", f"{copy.identity.name} runs on {copy.host} {where}".rstrip())

    async def _filled(self, copy: CopySession) -> None:
        fill = await copy.talk.wait_filled()
        if fill is None:
            self._first.warn(f"the fill on {copy.host} was not heard of")
        else:
            self._builder.add_fill(fill)
            self._observer.tell(progress.Filled(fill.fill_ms, fill.faults))

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
        await asyncio.gather(*(copy.abandon(error.message) for copy in self._sessions))

    async def _close(self) -> None:
        if self._rounds is not None:
            await quietly(self._rounds.close())
        if self._throttle is not None:
            await quietly(self._throttle.close())
        for copy in self._sessions:
            await copy.close()
        # Without one the freeze could not be undone, which is left to a recovery.
        if self.report is not None and self._recorded is not None:
            await asyncio.to_thread(self._wipe)
            await self._end_entries()
        await self._begun.close()

    def _wipe(self) -> None:
        recovery.wipe(self._directory)

    async def _end_entries(self) -> None:
        made = {copy.entry.migration_id for copy in self._made}
        for entry in self._entries or [self._begun.entry]:
            if self._recorded is not S.NEW:
                await self._record_quietly(S.ROLLING_BACK, "given_back", entry)
            event = "cloned" if entry.migration_id in made else "rolled_back"
            await self._record_quietly(S.ABORTED, event, entry)

    async def _record(self, state: S, event: str) -> None:
        """Of the freeze."""
        await self._begun.ledger.record(str(state), event)
        self._recorded = state

    async def _record_all(self, state: S, event: str) -> None:
        for entry in self._entries[1:]:
            await entry.ledger.record(str(state), event)
        await self._record(state, event)

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
        if self._rounds is None or self._is_told_to_run:
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


def _unknown(copy: CopySession, error: MigrateError) -> MigrateError:
    """A target that did not say that the copy runs lets it run, or wipes it."""
    return MigrateError(
        f"it is not known whether {copy.identity.name} runs on {copy.host}: {error.message}",
        host=error.host,
        phase=error.phase,
        remedy=f"see on {copy.host}: migrate status {copy.entry.migration_id}",
    )
