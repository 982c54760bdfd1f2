"""The coordinator on the source: carries out what `core/source_machine.py` asks for.

It decides nothing: what may happen is in the machine's table, when to freeze in `core/convergence.py`.
Everything that blocks runs in threads; every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog

from criu_glue import images
from criu_glue.errors import CriuGlueError
from criu_glue.mappings import cgroup_pids
from criu_glue.trackers import stop_and_copy, write_protect
from migrate import config, network, progress
from migrate.agent.workspace import mount_tmpfs, unmount
from migrate.core import convergence, messages, source_machine
from migrate.core.actions import SourceAction as A
from migrate.core.clock_relation import ClockRelation
from migrate.core.downtime import Marks, downtime_parts
from migrate.core.events import SourceEventKind as E
from migrate.core.events import event_of_target_message
from migrate.core.states import SOURCE_TERMINAL
from migrate.core.states import SourceState as S
from migrate.driver import Driver, quietly
from migrate.errors import (
    InDoubt,
    MigrateError,
    NotConverging,
    TransferFailed,
    Unreachable,
    held_on,
    runs_on,
)
from migrate.facts import ContainerFacts, container_facts
from migrate.freezing import Freezing
from migrate.journal import JournalWriter
from migrate.precopy import MemorySource
from migrate.report import Report, ReportBuilder
from migrate.rootfs import RootfsPassRun, RootfsSource, shared_file_mappings
from migrate.runtimes.runc import DESCRIPTORS_NAME
from migrate.target_link import TargetLink
from transport import tls
from transport.errors import TransportError
from transport.sender import PageSender

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from criu_glue.trackers.base import DirtyTracker
    from migrate.core.messages import TargetMessage
    from migrate.precopy import FinalDelta
    from migrate.progress import Observer
    from migrate.runtimes.base import Container, Runtime
    from transport.sender import RoundStats
    from transport.worker import ReadPages

log = structlog.get_logger()

PROGRESS_PERIOD_S = 0.2


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks of one migration."""

    container: str
    target: str
    port: int = config.CONTROL_PORT
    tracker: str = "auto"
    restore: Literal["lazy", "eager"] = "lazy"
    max_downtime_ms: float = config.DOWNTIME_MS_MAX_DEFAULT
    rounds_max: int = config.ROUNDS_MAX_DEFAULT
    on_stall: str = "freeze"
    streams: int = config.STREAMS
    shared: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(slots=True)
class _Frozen:
    """What is under way while the container stands still."""

    delta: FinalDelta
    sending: asyncio.Task[RoundStats]
    rootfs: list[RootfsPassRun] = field(default_factory=list)


class Coordinator:
    """One migration. `run` returns its report, or raises what ended it, with the report in `report`."""

    def __init__(
        self,
        options: Options,
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        self.options = options
        self.migration_id = migration_id
        self._runtime = runtime
        self._paths = paths
        self._observer = observer
        self._host = socket.gethostname()
        self._session = paths.session(migration_id, "source")
        self.report: Report | None = None
        self._builder = ReportBuilder(migration_id, options.container, self._host, options.target)
        self._journal: JournalWriter | None = None
        self._link: TargetLink | None = None
        self._listening: asyncio.Task[None] | None = None
        self._container: Container | None = None
        self._facts: ContainerFacts | None = None
        self._memory: MemorySource | None = None
        self._rootfs: RootfsSource | None = None
        self._freezing: Freezing | None = None
        self._final_rootfs: RootfsPassRun | None = None
        self._frozen: _Frozen | None = None
        self._limits = convergence.Limits(options.max_downtime_ms, options.rounds_max)
        self._prepared_here: asyncio.Future[None] | None = None
        self._attempt = 0
        self._history = convergence.History()
        self._clocks = ClockRelation(0, 0)
        self._marks: dict[str, int] = {}
        self._target_marks: dict[str, int] = {}
        self._fill: asyncio.Future[messages.FillDone] | None = None
        self._error: MigrateError | None = None
        self.driver = Driver(
            source_machine.machine(),
            self,
            must_record=source_machine.must_record,
            overtaking=frozenset({A.ROLLBACK}),
            terminal=SOURCE_TERMINAL,
            act_failed=E.ACT_FAILED,
            on_state=self._entered,
        )
        self._acts: dict[A, Callable[[], Awaitable[E | None]]] = {
            A.RUN_PREFLIGHT: self._run_preflight,
            A.OPEN_SESSION: self._open_session,
            A.COPY_ROOTFS: self._copy_rootfs,
            A.RUN_ROUND: self._run_round,
            A.PREPARE_TARGET: self._prepare_target,
            A.FREEZE_AND_DUMP: self._freeze_and_dump,
            A.SEND_FINAL: self._send_final,
            A.REQUEST_RESTORE: self._request_restore,
            A.RECORD_COMMIT: self._record_commit,
            A.SEND_COMMIT: self._send_commit,
            A.ASK_TARGET: self._ask_target,
            A.RELEASE: self._release,
            A.ROLLBACK: self._rollback,
            A.TELL_STATE: self._tell_state,
            A.HOLD: self._hold,
            A.REPORT_DONE: self._report_done,
            A.REPORT_ABORTED: self._report_aborted,
        }

    async def run(self) -> Report:
        """Migrate. Raises MigrateError, which says where the container is now."""
        loop = asyncio.get_running_loop()
        self._prepared_here = loop.create_future()
        self._fill = loop.create_future()
        self._journal = await asyncio.to_thread(JournalWriter, self._paths.journal)
        self._attempt = await self._journal.claim_attempt()
        await self._journal.begin(
            self.migration_id,
            "source",
            attempt=self._attempt,
            container=self.options.container,
            runtime=self._runtime.name,
            peer=self.options.target,
            facts={"session": str(self._session)},
        )
        try:
            state = await self.driver.run(E.STARTED)
        finally:
            await self._close()
        if state is S.ABORTED:
            error = self._error or MigrateError("the migration was cancelled", host=self._host)
            raise error.at(phase=str(state), container_state=runs_on(self._host))
        assert self.report is not None
        return self.report

    async def cancel(self) -> None:
        """The user wants the migration to end; undone before the commit, ignored after it."""
        await self.driver.post(E.CANCELLED)

    # --- what the driver asks of a performer ---

    async def perform(self, action: A) -> E | None:
        """Carry out one act; errors of the packages below become MigrateErrors here."""
        try:
            return await self._acts[action]()
        except TransportError as error:
            raise TransferFailed(str(error), host=self.options.target) from error
        except CriuGlueError as error:
            raise MigrateError(str(error), host=self._host) from error
        except TimeoutError as error:
            raise MigrateError(f"{action} took too long", host=self._host) from error

    def failed(self, action: A, error: MigrateError) -> None:
        """Keep the first error: what follows is its consequence."""
        log.info("act failed", action=str(action), why=str(error))
        if self._error is None:
            self._error = error.at(host=self._host)

    async def record(self, state: S, kind: E) -> None:
        """Append the transition to the journal."""
        assert self._journal is not None
        await self._journal.record(self.migration_id, "source", str(state), str(kind))

    def _entered(self, state: S) -> None:
        log.debug("state", migration=self.migration_id, state=str(state))

    # --- before anything is touched ---

    async def _run_preflight(self) -> E:
        self._observer.tell(progress.Phase("preflight"))
        self._facts = facts = await asyncio.to_thread(self._look)
        self._container = facts.container
        self._builder.runtime = self._runtime.name
        self._builder.memory_bytes = facts.memory_bytes
        self._builder.add_versions(self._host, facts.versions)
        return E.PREFLIGHT_PASSED

    def _look(self) -> ContainerFacts:
        """Blocking."""
        container = self._runtime.inspect(self.options.container)
        assert container.netns is not None
        captured = network.capture(
            container.netns,
            hostname=container.spec.get("hostname", ""),
            sysctls=container.spec.get("linux", {}).get("sysctl", {}),
        )
        return container_facts(container, captured.identity, self._runtime)

    async def _open_session(self) -> E:
        assert self._facts is not None
        assert self._container is not None
        tracker = await asyncio.to_thread(self._choose_tracker)
        self._link = TargetLink(self.options.target, self.options.port, self._paths)
        request = self._facts.open_session(
            migration_id=self.migration_id,
            attempt=self._attempt,
            host=self._host,
            streams=self.options.streams,
            restore=self.options.restore,
            dry_run=self.options.dry_run,
        )
        opened = await self._link.open_session(request)
        for caution in opened.cautions:
            self._warn(f"{self.options.target}: {caution.message}; {caution.remedy}")
        await self._link.connect()
        self._listening = asyncio.create_task(self._listen())
        self._clocks = ClockRelation.from_samples(await self._link.ping())
        await asyncio.to_thread(self._make_session_directory)
        self._memory = MemorySource(tracker, partial(self._make_sender, opened))
        self._rootfs = RootfsSource(
            self._container.rootfs, self._session, self._link.rootfs_channel, self._host
        )
        await asyncio.to_thread(self._memory.sender.connect)
        self._builder.tracker, self._builder.restore = tracker.name, self.options.restore
        self._builder.add_versions(self.options.target, opened.versions)
        self._observer.tell(
            progress.Started(
                self.migration_id,
                self.options.container,
                self._host,
                self.options.target,
                tracker.name,
                self.options.restore,
                self._facts.memory_bytes,
            )
        )
        return E.SESSION_OPENED

    def _choose_tracker(self) -> DirtyTracker:
        """The tracker that the user named, or the best that this kernel offers. Blocking."""
        assert self._container is not None
        pids = partial(cgroup_pids, self._container.cgroup)
        wanted = self.options.tracker
        why_not = write_protect.supported() if wanted in ("auto", "write-protect") else None
        if wanted == "write-protect" and why_not is not None:
            raise MigrateError(
                f"the tracker write-protect does not work here: {why_not}", host=self._host
            )
        if wanted != "none" and why_not is None:
            return write_protect.WriteProtectTracker(pids)
        if wanted == "auto":
            self._warn(
                f"no dirty tracker works here ({why_not}): the container stands still while all of "
                "its memory is copied"
            )
        return stop_and_copy.StopAndCopyTracker(pids)

    def _make_session_directory(self) -> None:
        assert self._facts is not None
        self._session.mkdir(mode=0o700, parents=True)
        size_bytes = self._facts.memory_bytes + config.SESSION_RESERVE_BYTES
        mount_tmpfs(self._session, f"mode=0700,size={size_bytes}")

    def _make_sender(self, opened: messages.SessionOpened, read: ReadPages) -> PageSender:
        assert self._link is not None
        context, target = self._link.context, self.options.target

        return PageSender(
            lambda _: tls.connect(target, opened.data_port, context, server_name=opened.host),
            ticket=bytes.fromhex(opened.ticket),
            read=read,
            streams=self.options.streams,
        )

    # --- while the container runs ---

    async def _copy_rootfs(self) -> None:
        assert self._rootfs is not None
        done = await self._rootfs.copy(config.ROOTFS_DEADLINE_S)
        self._observer.tell(
            progress.Phase(
                "rootfs",
                f"{progress.mib(done.bytes_sent)} sent in {done.duration_ms / 1000:.2f} s",
            )
        )

    async def _run_round(self) -> E:
        assert self._memory is not None
        if self._memory.tracker.name == stop_and_copy.StopAndCopyTracker.name:
            return E.CONVERGED_NOW
        stats = await self._watched_round()
        self._history.add(stats)
        self._builder.add_round(stats)
        decision = convergence.decide(self._history, self._workload(), self._limits)
        self._builder.add_decision(decision)
        self._tell_round(stats, decision)
        if decision.verdict is convergence.Verdict.CONTINUE:
            return E.ROUND_DONE
        if decision.verdict is convergence.Verdict.STALLED and self.options.on_stall == "abort":
            raise NotConverging(
                decision.reason,
                host=self._host,
                remedy="more bandwidth, a higher --max-downtime, or --on-stall freeze",
            )
        return E.CONVERGED_NOW

    def _workload(self) -> convergence.Workload:
        assert self._facts is not None
        return convergence.Workload(
            memory_bytes=self._facts.memory_bytes,
            shared_bytes=self._facts.shared_bytes,
            lazy=self.options.restore == "lazy",
            round_trip_ms=2 * self._clocks.error_us / 1000,
        )

    def _tell_round(self, stats: RoundStats, decision: convergence.Decision) -> None:
        self._observer.tell(
            progress.RoundEnded(
                number=stats.number,
                pages=stats.pages,
                bytes_raw=stats.bytes_raw,
                bytes_sent=stats.bytes_sent,
                duration_ms=stats.duration_ms,
                rate_bytes_s=stats.bytes_raw / max(stats.duration_ms, 0.1) * 1000,
                dirty_rate_bytes_s=decision.dirty_rate_bytes_s,
                remaining_bytes=decision.remaining_bytes,
                predicted_downtime_ms=decision.predicted_downtime_ms,
                decision=str(decision.verdict),
            )
        )

    async def _watched_round(self) -> RoundStats:
        """A round in a thread, with its progress told while it runs."""
        assert self._memory is not None
        memory = self._memory
        before, started_s = memory.sender.progress.bytes_raw, time.monotonic()
        running = asyncio.create_task(asyncio.to_thread(memory.round))
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=PROGRESS_PERIOD_S)
                done_bytes = memory.sender.progress.bytes_raw - before
                elapsed_s = time.monotonic() - started_s
                self._observer.tell(
                    progress.RoundProgress(
                        memory.rounds, done_bytes, memory.round_bytes_total, done_bytes / elapsed_s
                    )
                )
        except asyncio.CancelledError:
            memory.sender.abort()
            await asyncio.wait({running})
            raise
        return running.result()

    async def _prepare_target(self) -> None:
        """Both sides start their runtimes up to the gate; a last round keeps the rest small."""
        assert self._link is not None
        assert self._container is not None
        assert self._facts is not None
        assert self._memory is not None
        assert self._rootfs is not None
        assert self._prepared_here is not None
        self._observer.tell(progress.Phase("prepare", f"{self.options.target} starts its restore"))
        await self._link.tell(messages.Prepare(self._container.descriptors))
        self._freezing = Freezing(
            self._container, self._runtime, self._facts.network.ports, self._session, self._host
        )
        await self._freezing.prepare(self.migration_id, self._paths.journal)
        self._final_rootfs = self._rootfs.start(gated=True)
        async with asyncio.timeout(config.PREPARE_DEADLINE_S):
            await self._final_rootfs.wait_ready()
        if self._memory.tracker.name != stop_and_copy.StopAndCopyTracker.name:
            stats = await asyncio.to_thread(self._memory.round)
            self._builder.add_round(stats)
        await asyncio.to_thread(self._memory.sender.connect)
        self._prepared_here.set_result(None)

    # --- while it stands still ---

    async def _freeze_and_dump(self) -> E:
        assert self._prepared_here is not None
        async with asyncio.timeout(config.PREPARE_DEADLINE_S):
            await asyncio.shield(self._prepared_here)
        assert self._freezing is not None
        assert self._memory is not None
        assert self._final_rootfs is not None
        self._observer.tell(progress.Phase("freeze"))
        self._marks |= await self._freezing.freeze()
        self._final_rootfs.release()
        delta = await asyncio.to_thread(self._memory.final_delta)
        if delta.code:
            await asyncio.to_thread(self._memory.send, delta.code)
        self._freezing.start_dump()
        sending = asyncio.create_task(asyncio.to_thread(self._memory.send, delta.rest))
        self._frozen = _Frozen(delta, sending, [self._final_rootfs])
        self._recheck_mapped_files()
        self._marks["dumped"] = await self._freezing.dumped()
        return E.DUMPED

    def _recheck_mapped_files(self) -> None:
        """Files written through a mapping may look unchanged: compare their content."""
        assert self._container is not None
        assert self._rootfs is not None
        assert self._frozen is not None
        mapped: set[str] = set()
        for pid in cgroup_pids(self._container.cgroup):
            with contextlib.suppress(FileNotFoundError):
                mapped |= shared_file_mappings(Path(f"/proc/{pid}/maps").read_bytes())
        files = sorted(
            name.lstrip("/") for name in mapped if (self._container.rootfs / name[1:]).is_file()
        )
        if files:
            self._frozen.rootfs.append(self._rootfs.start(gated=False, files=files))

    async def _send_final(self) -> E:
        assert self._freezing is not None
        assert self._memory is not None
        assert self._frozen is not None
        memory, image_dir = self._memory, self._freezing.image_dir
        stats = await self._frozen.sending
        self._builder.add_round(stats)
        lazy = await asyncio.to_thread(images.lazy_ranges, image_dir)
        missing = memory.undelivered(lazy)
        if missing:
            # Every page that CRIU knows and the tracker never reported. Rare (a page that became
            # present without a write), and without this it would be zeros on the target.
            extra = await asyncio.to_thread(memory.send, missing)
            self._builder.add_round(extra)
        self._marks["final_acked"] = time.monotonic_ns() // 1000
        # The target's runtime has been given the descriptors before it was started.
        files = [
            one
            for one in await asyncio.to_thread(images.image_files, image_dir)
            if one.name != DESCRIPTORS_NAME
        ]
        self._builder.add_images(
            await asyncio.to_thread(
                memory.sender.send_files, [(one.name, one.path) for one in files]
            )
        )
        async with asyncio.timeout(config.ROOTFS_FROZEN_DEADLINE_S):
            passes = [await run.wait() for run in self._frozen.rootfs]
        self._marks["rootfs_done"] = max(one.ended_us for one in passes)
        self._restore = messages.Restore(
            files=tuple(messages.ImageFile(one.name, one.bytes) for one in files),
            lazy_pages=sum(int(runs[:, 1].sum()) for runs in lazy.values()),
        )
        return E.FINAL_SENT

    async def _request_restore(self) -> None:
        assert self._link is not None
        await self._link.tell(self._restore)

    # --- the handover ---

    async def _record_commit(self) -> E:
        assert self._journal is not None
        await self._journal.record(
            self.migration_id, "source", str(S.COMMITTED), str(E.COMMIT_RECORDED)
        )
        return E.COMMIT_RECORDED

    async def _send_commit(self) -> None:
        assert self._link is not None
        await self._link.tell(messages.Commit(self.migration_id, self._attempt))

    async def _ask_target(self) -> None:
        """Connect again and ask, until the target is heard or patience ends."""
        assert self._link is not None
        limit_s = time.monotonic() + config.IN_DOUBT_PATIENCE_S
        while True:
            try:
                await self._reconnect()
                await self._link.tell(messages.Ask(self.migration_id, self._attempt))
            except Unreachable:
                if time.monotonic() > limit_s:
                    await self._hold()
                await asyncio.sleep(config.RECONNECT_PAUSE_S)
            else:
                return

    async def _release(self) -> E:
        assert self._freezing is not None
        assert self._facts is not None
        await self._freezing.release()
        await asyncio.to_thread(network.destroy, self._facts.network_handle)
        await asyncio.to_thread(self._forget_bundle)
        return E.RELEASED

    def _forget_bundle(self) -> None:
        """A bundle that an agent made goes with its container; any other is the user's."""
        assert self._container is not None
        bundle = self._container.bundle
        if bundle.parent == self._paths.containers:
            shutil.rmtree(bundle, ignore_errors=True)

    # --- ends ---

    async def _rollback(self) -> E:
        """The container first, then everything else."""
        if self._memory is not None:
            self._memory.sender.abort()
        if self._freezing is not None:
            await self._freezing.undo()
        if self._final_rootfs is not None:
            self._final_rootfs.cancel()
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)
            self._memory = None
        if self._link is not None and self._link.opened is not None:
            await quietly(self._tell_abort())
        return E.ROLLED_BACK

    async def _tell_abort(self) -> None:
        assert self._link is not None
        reason = self._error.message if self._error else "cancelled"
        message = messages.Abort(self.migration_id, self._attempt, reason[:1000])
        try:
            await self._link.tell(message)
        except Unreachable:
            await self._reconnect()
            await self._link.tell(message)

    async def _tell_state(self) -> None:
        assert self._link is not None
        state = messages.State(self.migration_id, self._attempt, str(self.driver.settled_state))
        await self._link.tell(state)

    async def _hold(self) -> None:
        self.driver.halt(
            InDoubt(
                f"{self.options.target} has not said whether it runs {self.options.container}",
                host=self._host,
                phase=str(self.driver.state),
                container_state=held_on(self._host),
                remedy=f"migrate recover {self.migration_id}",
            )
        )

    async def _report_done(self) -> None:
        assert self._fill is not None
        parts = downtime_parts(
            Marks.from_names(self._marks, self._target_marks), self._clocks
        )
        self._builder.add_downtime(parts, self._clocks)
        predicted = self._builder.build("done").predicted_downtime_ms
        self._observer.tell(progress.Moved(parts.downtime_us / 1000, predicted))
        try:
            async with asyncio.timeout(config.FILL_DEADLINE_S):
                fill = await self._fill
        except (TimeoutError, Unreachable) as error:
            self._warn(f"the fill of {self.options.target} was not heard of: {error}")
        else:
            self._builder.add_fill(fill)
            self._observer.tell(progress.Filled(fill.fill_ms, fill.faults))
        self.report = self._builder.build("done")

    async def _report_aborted(self) -> None:
        self.report = self._builder.build("aborted", self._error)

    async def _close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)
        if self._link is not None:
            await self._link.close()
        if self.driver.state in SOURCE_TERMINAL:
            await asyncio.to_thread(unmount, self._session)
            shutil.rmtree(self._session, ignore_errors=True)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)

    # --- the channel ---

    async def _reconnect(self) -> None:
        assert self._link is not None
        await self._link.connect()
        if self._listening is not None:
            self._listening.cancel()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self._link is not None
        try:
            async for message in self._link.listen():
                await self._hear(message)
        except MigrateError as error:
            self.failed(A.ASK_TARGET, error)
        await self.driver.post(E.LINK_LOST, from_peer=True)
        if self._fill is not None and not self._fill.done():
            self._fill.set_exception(Unreachable("the link was lost", host=self.options.target))

    async def _hear(self, message: TargetMessage) -> None:
        assert self._fill is not None
        match message:
            case messages.Held(marks=marks) | messages.Running(marks=marks):
                self._target_marks |= marks
            case messages.FillDone():
                if not self._fill.done():
                    self._fill.set_result(message)
            case messages.Failed(error=error):
                self.failed(
                    A.REQUEST_RESTORE,
                    MigrateError(
                        error.message,
                        host=self.options.target,
                        phase=error.phase,
                        remedy=error.remedy,
                    ),
                )
            case _:
                pass
        event = event_of_target_message(message)
        if event is not None:
            await self.driver.post(event.kind, from_peer=True)

    def _warn(self, message: str) -> None:
        self._builder.warn(message)
        self._observer.tell(progress.Warned(message))
