"""The coordinator on the source: carries out what `core/source_machine.py` asks for.

It decides nothing: what may happen is in the machine's table, when to freeze is for
`core/convergence.py`. The work itself is in `copying.py` (the container runs), `standstill.py` (it
does not) and `freezing.py` (what holds it); here it is put in order, and undone.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from migrate import config, network, peer, progress, recovery, signing
from migrate.conversation import Conversation
from migrate.copying import Copying
from migrate.core import messages, source_machine
from migrate.core.actions import SourceAction as A
from migrate.core.clock_relation import ClockRelation
from migrate.core.downtime import Marks, MarksError, downtime_parts
from migrate.core.events import SourceEventKind as E
from migrate.core.events import target_reported
from migrate.core.manifest import Binding
from migrate.core.prediction import pace
from migrate.core.states import SOURCE_TERMINAL
from migrate.core.states import SourceState as S
from migrate.core.table import Verdict
from migrate.core.throttling import Act
from migrate.driver import Driver, quietly
from migrate.errors import (
    Cancelled,
    InDoubt,
    JournalError,
    MigrateError,
    NotConverging,
    RollbackFailed,
    Unreachable,
    held_on,
    runs_on,
)
from migrate.first_steps import FirstSteps, make_directory
from migrate.freezing import Freezing
from migrate.report import ReportBuilder
from migrate.standstill import Standstill
from migrate.target_link import TargetLink
from migrate.throttle import Throttle
from migrate.undertaking import BELOW, Undertaking, of_below

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from migrate.brakes import BrakePlan
    from migrate.core.manifest import SignedManifest
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.report import Report
    from migrate.runtimes.base import Runtime
    from transport.core.transcript import Carried

log = structlog.get_logger()


def deadlines_s(restore: str) -> dict[S, float]:
    """How long a state may last before its machine is told, in seconds.

    While memory and files travel there is no such limit, because they may be large: a copy ends
    when nothing moves any more (`transport/`, `conversation.py`), and each act has its own.
    """
    restoring_s = (
        config.EAGER_RESTORE_DEADLINE_S if restore == "eager" else config.RESTORE_DEADLINE_S
    )
    return {
        S.PREFLIGHT: config.PREFLIGHT_DEADLINE_S,
        # The target keeps that deadline itself, and says what hung; this is for one that does not.
        S.RESTORING: restoring_s + config.RUNTIME_EXIT_DEADLINE_S,
        S.HELD: config.JOURNAL_PATIENCE_S,
        S.COMMITTED: config.HANDOVER_DEADLINE_S,
        S.IN_DOUBT: config.ASK_AGAIN_S,
        S.ROLLING_BACK: config.UNDO_DEADLINE_S,
        S.RELEASING: config.UNDO_DEADLINE_S,
    }


class Coordinator:
    """One migration. `run` returns its report or raises what ended it, with `report` set."""

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
        self._first = FirstSteps(options, runtime, paths, self._host, self._builder, observer)
        self._begun = Undertaking(migration_id, runtime, paths, self._host)
        self._commit_is_unknown = False
        self._target: Conversation | None = None
        self._facts: ContainerFacts | None = None
        self._throttle: Throttle | None = None
        self._copying: Copying | None = None
        self._freezing: Freezing | None = None
        self._standstill: Standstill | None = None
        self._restore: messages.Restore | None = None
        self._clocks = ClockRelation(0, 0)
        self._prepared_here = asyncio.Event()
        self._doubted_s: float | None = None
        self._asking = asyncio.Lock()
        self._error: MigrateError | None = None
        self._act_error: MigrateError | None = None
        self._deadlines_s = deadlines_s(options.restore)
        self.driver = Driver(
            source_machine.machine(),
            self,
            must_record=source_machine.must_record,
            overtaking=frozenset({A.ROLLBACK}),
            terminal=SOURCE_TERMINAL,
            act_failed=E.ACT_FAILED,
            deadline_passed=E.DEADLINE_PASSED,
            deadlines_s=self._deadlines_s,
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
        try:
            await self._begun.begin(self.options.container, self.options.target)
            state = await self.driver.run(E.STARTED)
        finally:
            await self._close()
        if state is S.ABORTED:
            assert self._error is not None
            raise self._error
        assert self.report is not None
        return self.report

    async def cancel(self) -> None:
        """The user wants the migration to end; undone before the commit, ignored after it."""
        self._note(Cancelled("the migration was cancelled", host=self._host))
        await self.driver.post(E.CANCELLED)

    # --- what the driver asks of a performer ---

    async def perform(self, action: A) -> E | None:
        """Carry out one act; errors of the packages below become MigrateErrors here."""
        try:
            return await self._acts[action]()
        except BELOW as error:
            doing = str(action)
            raise of_below(error, self._host, self.options.target, doing) from error

    def failed(self, action: A | None, error: MigrateError) -> None:
        """Told of an act's failure by the driver."""
        log.info("act failed", action=action, why=str(error))
        self._note(error)
        if self.driver.state in (S.ROLLING_BACK, S.RELEASING):
            self._act_error = self._stuck(error.message, error)

    def _note(self, error: MigrateError) -> None:
        """Keep the first error: what follows is its consequence."""
        if self._error is None:
            self._error = error.at(host=self._host, phase=str(self.driver.state))

    async def record(self, state: S, event: str) -> None:
        """Append the transition to the journal.

        A journal that can't be written ends a migration that goes forward; it does not keep one
        from being undone or finished, because `replay` leads there without the record as well. But
        where nobody knows whether the commit was written, the target may be told that it was: then
        nothing is undone before the journal says that it was not, or that it is undone.
        """
        limit_s = time.monotonic() + config.JOURNAL_PATIENCE_S
        while True:
            try:
                await self._begun.ledger.record(str(state), event)
            except JournalError as error:
                if state in (S.PRECOPY, S.FROZEN, S.COMMITTED):
                    raise
                if not self._commit_is_unknown or await self._is_uncommitted():
                    self._first.warn(f"{state} is not in the journal: {error.message}")
                    self._begun.ledger.owe(str(state), event)
                    return
                if time.monotonic() > limit_s:
                    raise
                await asyncio.sleep(config.RECONNECT_PAUSE_S)
            else:
                self._commit_is_unknown = False
                return

    async def _is_uncommitted(self) -> bool:
        """Whether the journal can be read and has no commit."""
        try:
            verdict = await self._begun.journal.call(
                lambda journal: journal.verdict(self.migration_id, "source")
            )
        except JournalError:
            return False
        return verdict is Verdict.UNDO

    # --- while the container runs ---

    async def _run_preflight(self) -> E:
        self._observer.tell(progress.Phase("preflight"))
        self._facts = await self._first.check((self.options.target,))
        self.options = self._first.options
        self._deadlines_s |= deadlines_s(self.options.restore)
        return E.PREFLIGHT_PASSED

    async def _open_session(self) -> E:
        assert self._facts is not None
        link = TargetLink(self.options.target, self.options.port, self._paths, self.options.way)
        self._target = target = Conversation(
            link,
            self._post_heard,
            self._note,
            patience_s=self.options.link_patience_s,
            silence_s=self.options.silence_s,
        )
        entry = self._begun.entry
        opened = await link.open_session(self._first.request(self._facts, entry))
        await self._first.heard(entry, opened, self.options.port)
        await target.connect()
        self._clocks = await target.relate_clocks()
        await asyncio.to_thread(make_directory, self._session, self._facts)
        self._throttle = Throttle(
            self._facts.container.cgroup, self._session, self._note_brake, self._first.warn
        )
        self._copying = Copying(
            self._facts,
            self.options,
            link,
            self._session,
            self._host,
            self._observer,
            self._builder,
            self._throttle,
        )
        self._copying.clocks = self._clocks
        await self._copying.start(self._runtime, self.migration_id)
        return E.SESSION_OPENED

    async def _note_brake(self, plan: BrakePlan) -> None:
        await self._begun.entry.note(brake=msgspec.to_builtins(plan))

    async def _copy_rootfs(self) -> None:
        assert self._copying is not None
        await self._copying.copy_rootfs()

    async def _run_round(self) -> E:
        assert self._copying is not None
        if not self._copying.has_rounds:
            return E.CONVERGED_NOW
        reaction = await self._copying.run_round()
        if reaction.act is Act.ABORT:
            raise NotConverging(
                reaction.reason,
                host=self._host,
                remedy="more bandwidth, a higher --max-downtime, --on-stall throttle,"
                " or --on-stall freeze",
            )
        return E.CONVERGED_NOW if reaction.act is Act.FREEZE else E.ROUND_DONE

    async def _prepare_target(self) -> None:
        """Both sides start their runtimes up to the gate, at the same time."""
        assert self._target is not None
        assert self._facts is not None
        assert self._copying is not None
        self._observer.tell(progress.Phase("prepare", f"{self.options.target} starts its restore"))
        container = self._facts.container
        await self._target.tell(messages.Prepare(container.descriptors))
        self._freezing = Freezing(
            container, self._runtime, self._facts.network, self._session, self._host
        )
        plan = await self._freezing.prepare(
            self.migration_id, self._paths, parent=self._copying.memory.pages.parent
        )
        self._copying.pace = pace(self._freezing.started_cpu_ms)
        await self._begun.entry.note(
            guard=msgspec.to_builtins(plan),
            network=msgspec.to_builtins(self._facts.network_handle),
            bundle=str(container.bundle),
        )
        await self._copying.make_ready()
        self._standstill = Standstill(self._copying, self._freezing, self._builder, self._seal)
        self._prepared_here.set()

    def _seal(self, carried: Carried) -> SignedManifest:
        """What has been sent, signed by this host for this session and for no other."""
        assert self._facts is not None
        assert self._target is not None
        assert self._target.link.opened is not None
        binding = Binding(
            migration_id=self.migration_id,
            container=self.options.container,
            epoch=self._begun.attempt,
            source=self._host,
            target=self._target.link.opened.host,
            versions=self._facts.versions,
            protocol=messages.PROTOCOL,
        )
        manifest = signing.manifest_of(binding, carried, time.time())
        return signing.sealed(manifest, self._target.link.identity)

    # --- while it stands still ---

    async def _freeze_and_dump(self) -> E:
        deadline_s = config.PREPARE_DEADLINE_S + self.options.link_patience_s
        async with asyncio.timeout(deadline_s):
            await self._prepared_here.wait()
        assert self._standstill is not None
        assert self._throttle is not None
        assert self._target is not None
        await self._target.wait_heard()
        self._observer.tell(progress.Phase("freeze"))
        self._target.watch()
        # CRIU executes code in the tasks, and the freezer has to be still.
        await self._throttle.lift()
        await self._standstill.freeze_and_dump()
        return E.DUMPED

    async def _send_final(self) -> E:
        assert self._standstill is not None
        self._restore = await self._standstill.send_final()
        return E.FINAL_SENT

    async def _request_restore(self) -> None:
        assert self._target is not None
        assert self._restore is not None
        await self._target.tell(self._restore)

    # --- the handover ---

    async def _record_commit(self) -> E:
        # From here on a silent target is a doubt, not a failure.
        assert self._target is not None
        self._target.stop_watching()
        self._commit_is_unknown = True
        await self.record(S.COMMITTED, str(E.TARGET_HELD))
        return E.COMMIT_RECORDED

    async def _send_commit(self) -> None:
        assert self._target is not None
        await self._target.tell(messages.Commit(self.migration_id, self._begun.attempt))
        # Behind it, so that the copy finds them when it runs.
        await self._forward_frames()

    async def _ask_target(self) -> E | None:
        """Ask, over a new control channel, or, if its session is gone, the agent itself. Asked
        again by the state's deadline."""
        assert self._target is not None
        if self._asking.locked():
            # A host that is silent takes longer to find out than the state's deadline.
            return None
        async with self._asking:
            ask = messages.Ask(self.migration_id, self._begun.attempt)
            try:
                await self._target.connect()
                await self._target.tell(ask)
            except Unreachable:
                return await self._ask_agent(ask)
        return None

    async def _ask_agent(self, ask: messages.Ask) -> E | None:
        target, port = self.options.target, self.options.port
        try:
            return target_reported(
                await peer.say(target, port, self._paths, "target", ask, self.options.way)
            )
        except MigrateError as error:
            log.info("the target is not heard", why=str(error))
            await self._hold()
            return None

    async def _forward_frames(self) -> None:
        """What has come for the container here goes after it. Lost, it costs a client some time."""
        if self._freezing is None or self._target is None:
            return
        if frames := self._freezing.frames():
            self._builder.held_frames += len(frames)
            word = messages.Frames(self.migration_id, self._begun.attempt, frames)
            await quietly(self._target.tell(word))

    async def _release(self) -> E:
        assert self._freezing is not None
        assert self._facts is not None
        await self._freezing.release()
        await asyncio.to_thread(network.destroy, self._facts.network_handle)
        bundle = self._facts.container.bundle
        await asyncio.to_thread(recovery.forget_bundle, bundle, self._paths)
        await self._wipe()
        return E.RELEASED

    async def _wipe(self) -> None:
        """Give up the streams and the session's directory."""
        if self._copying is not None:
            await quietly(self._copying.close())
        await asyncio.to_thread(recovery.wipe, self._session)

    # --- ends ---

    async def _rollback(self) -> E:
        """The container first, then everything else."""
        if self._target is not None:
            self._target.stop_watching()
        if self._copying is not None:
            self._copying.abort()
        if self._throttle is not None:
            await self._throttle.lift()
        if self._freezing is not None:
            await self._freezing.undo()
        await self._wipe()
        if self._target is not None and self._target.link.opened is not None:
            # A target that can't be told hears the broken link, and keeps nothing unless it holds a
            # copy already; then it asks.
            reason = self._error.message if self._error else "cancelled"
            abort = messages.Abort(
                self.migration_id, self._begun.attempt, reason[: messages.MAX_TEXT]
            )
            await quietly(self._target.tell_even_if_lost(abort))
        return E.ROLLED_BACK

    async def _tell_state(self) -> None:
        assert self._target is not None
        state = str(self.driver.settled_state)
        await self._target.tell(messages.State(self.migration_id, self._begun.attempt, state))

    async def _hold(self) -> None:
        """What can't be undone or finished is left as it is; a doubt only after some time."""
        if self.driver.state in (S.ROLLING_BACK, S.RELEASING):
            self.driver.halt(self._act_error or self._stuck("it takes too long"))
            return
        if self._doubted_s is None:
            self._doubted_s = time.monotonic()
        if time.monotonic() < self._doubted_s + config.IN_DOUBT_PATIENCE_S:
            return
        target, container = self.options.target, self.options.container
        self.driver.halt(
            InDoubt(
                f"{target} has not said whether it runs {container}",
                host=self._host,
                phase=str(self.driver.state),
                container_state=held_on(self._host),
                remedy=f"bring {target} back and run: migrate recover {self.migration_id}",
            )
        )

    def _stuck(self, why: str, error: MigrateError | None = None) -> RollbackFailed:
        """A rollback or a release that can't be carried out."""
        runs = self.driver.state is S.RELEASING
        return RollbackFailed(
            f"{self.driver.state} failed: {why}",
            host=self._host,
            phase=str(self.driver.state),
            container_state=runs_on(self.options.target)
            if runs
            else (error.container_state if error else "") or f"may be frozen on {self._host}",
            remedy=(error.remedy if error else "") or f"migrate recover {self.migration_id}",
        )

    async def _report_done(self) -> None:
        assert self._standstill is not None
        assert self._target is not None
        try:
            marks = Marks.from_names(self._standstill.marks, self._target.marks)
        except MarksError:
            # It was said by an agent that had not seen all of it, or in a word without marks.
            lost = f"{self.options.target} was lost in between"
            self._first.warn(f"the downtime is not known: {lost}")
        else:
            self._builder.add_downtime(downtime_parts(marks, self._clocks), self._clocks)
        so_far = self._builder.build("done")
        self._observer.tell(progress.Moved(so_far.downtime_ms, so_far.predicted_downtime_ms))
        async with asyncio.timeout(config.FILL_DEADLINE_S):
            fill = await self._target.wait_filled()
        if fill is None:
            target = self.options.target
            self._first.warn(f"the fill on {target} was not heard of: the link was lost")
        else:
            self._builder.add_fill(fill)
            self._observer.tell(progress.Filled(fill.fill_ms, fill.faults))
        self.report = self._builder.build("done")

    async def _report_aborted(self) -> None:
        if self._error is None:
            self._note(MigrateError("the migration was ended"))
        assert self._error is not None
        if self._facts is not None:
            self._error.at(container_state=runs_on(self._host))
        self.report = self._builder.build("aborted", self._error)

    async def _close(self) -> None:
        if self._copying is not None:
            await quietly(self._copying.close())
        if self._throttle is not None:
            await quietly(self._throttle.close())
        if self._target is not None:
            await self._target.close()
        await self._begun.close()

    async def _post_heard(self, kind: E) -> None:
        if kind is E.TARGET_RUNNING:
            # Before anything is written down here: clients wait for what they have sent meanwhile.
            await self._forward_frames()
        await self.driver.post(kind, from_peer=True)
