"""A session on the target: carries out what `core/target_machine.py` asks for, and decides nothing.

One session receives one container. Its control channel (`channel.py`) outlives its connections;
when the source does not come back, the machine says what becomes of the session. Everything that
blocks runs in threads.

A session outlives its agent: the next one makes it again (`adopt`) from the journal and from the
request in the session's directory, and goes on where `replay` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from migrate import cgroup, config, holder, network, peer, preflight
from migrate.agent import copy_hook, criu_roots
from migrate.agent.adopted import AdoptedRestoring
from migrate.agent.arrived import Arrived
from migrate.agent.channel import ControlChannel
from migrate.agent.copy_hook import first_task
from migrate.agent.ending import end_unheard
from migrate.agent.pager_process import PagerLost
from migrate.agent.restoring import CopyRefused, Renaming, RestorePlan, Restoring
from migrate.agent.shared_workspace import SharedWorkspace
from migrate.agent.ticket import Ticket
from migrate.agent.workspace import Workspace
from migrate.announce import Announcer
from migrate.core import messages, target_machine
from migrate.core.actions import TargetAction as A
from migrate.core.events import TargetEventKind as E
from migrate.core.events import event_of_source_message, source_reported
from migrate.core.states import TARGET_TERMINAL
from migrate.core.states import TargetState as S
from migrate.driver import Driver, quietly
from migrate.errors import (
    JournalError,
    MigrateError,
    ProtocolError,
    RestoreFailed,
)
from migrate.held_frames import deliver
from migrate.ledger import Ledger
from migrate.network_identity import FRAMES_MAX, parse_ip
from migrate.rootfs import Passes
from migrate.runtimes.oci import has_user_namespace, host_root, mounts_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from migrate.agent.front_keeper import Front
    from migrate.journal import JournalWriter, Migration
    from migrate.network_identity import HeldFrame
    from migrate.recovery import Owner
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

# While memory and files arrive there is no such limit: the source's silence ends that.
DEADLINES_S = {
    S.OPEN: config.PREPARE_DEADLINE_S,
    S.HELD: config.HANDOVER_DEADLINE_S,
    S.IN_DOUBT: config.ASK_AGAIN_S,
    S.COMMITTED: config.HANDOVER_DEADLINE_S + config.RUNTIME_EXIT_DEADLINE_S,
    S.ABORTING: config.UNDO_DEADLINE_S,
}


# The source's container stands still in these, or is about to.
URGENT = frozenset({S.PREPARED, S.RESTORING, S.HELD, S.COMMITTED})


class Session:
    """See the module. `run` lasts until the session is done or nothing of it is left."""

    def __init__(
        self,
        request: messages.OpenSession,
        *,
        peer: str,
        host: str,
        paths: config.HostPaths,
        runtime: Runtime,
        journal: JournalWriter,
        data: Front,
        ticket: Ticket,
        first: Session | None = None,
    ) -> None:
        """`first`: whose transfer brings this copy too."""
        self.request = request
        self.peer = peer
        self.ticket = ticket
        self._paths = paths
        self._host = host
        self._runtime = runtime
        self._journal = journal
        self._ledger = Ledger(journal, request.migration_id, "target")
        self._data = data
        self.workspace: Workspace = (
            SharedWorkspace(request, paths, first.workspace) if first else Workspace(request, paths)
        )
        self.passes = Passes(self.workspace.rootfs, self.workspace.work_dir)
        self._network: network.NetworkHandle | None = None
        self._announcer: Announcer | None = None
        self._restoring: Restoring | AdoptedRestoring | None = None
        self._watching: asyncio.Task[None] | None = None
        self._expecting: asyncio.Task[None] | None = None
        self._held_in: S | None = None
        # Why the container is frozen here though it is this host's; empty for one that runs.
        self.stopped = ""
        self.channel = ControlChannel(
            self.hear,
            lost=lambda: self.driver.post(E.LINK_LOST, from_peer=True),
            back=lambda: self.driver.post(E.LINK_BACK, from_peer=True),
            patience_s=self._patience_s,
        )
        self.ended = asyncio.Event()
        self._entered_one = asyncio.Event()
        self._descriptors: tuple[str, str, str] | None = None
        self._restore: messages.Restore | None = None
        self.is_receiving = first is None
        self._marks: dict[str, int] = {}
        self._fill: messages.FillDone | None = None
        self._error: messages.WireError | None = None
        self._announcing: asyncio.Task[int] | None = None
        # What has come for the container before it lets anything in.
        self._early_frames: tuple[HeldFrame, ...] = ()
        self._lets_in = False
        self._hurry = contextlib.ExitStack()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.driver = Driver(
            target_machine.machine(),
            self,
            must_record=target_machine.must_record,
            overtaking=frozenset({A.DISCARD}),
            terminal=TARGET_TERMINAL,
            act_failed=E.ACT_FAILED,
            deadline_passed=E.DEADLINE_PASSED,
            deadlines_s=DEADLINES_S,
            on_state=self._entered,
        )
        self._acts: dict[A, Callable[[], Awaitable[E | None]]] = {
            A.RECEIVE: self._receive,
            A.TELL_OPENED: self._tell_opened,
            A.PREPARE: self._prepare,
            A.TELL_PREPARED: lambda: self.channel.tell(messages.Prepared()),
            A.RESTORE: self._do_restore,
            A.TELL_HELD: lambda: self.channel.tell(messages.Held(self._marks)),
            A.RECORD_COMMIT: self._record_commit,
            A.RESUME: self._resume,
            A.TELL_RUNNING: lambda: self.channel.tell(messages.Running(self._marks)),
            A.FILL: self._do_fill,
            A.TELL_FILLED: self._tell_filled,
            A.CLEAN_UP: self._clean_up,
            A.DISCARD: self._discard,
            A.TELL_ABORTED: self._tell_state,
            A.TELL_FAILED: self._tell_failed,
            A.TELL_STATE: self._tell_state,
            A.CHECK_COPY: self._check_copy,
            A.ASK_SOURCE: self._ask_source,
            A.HOLD: self._hold,
        }

    @classmethod
    def adopt(
        cls,
        migration: Migration,
        request: messages.OpenSession,
        *,
        host: str,
        paths: config.HostPaths,
        runtime: Runtime,
        journal: JournalWriter,
        data: Front,
    ) -> Session:
        """The session of an agent before this one, for `go_on`. Raises MigrateError."""
        self = cls(
            request,
            peer=migration.peer,
            host=host,
            paths=paths,
            runtime=runtime,
            journal=journal,
            data=data,
            ticket=Ticket(migration.peer, streams=0),
        )
        self.is_receiving = False
        self.ready.set_result(None)
        self.workspace = Workspace.adopt(request, paths)
        self._network = msgspec.convert(migration.facts["network"], network.NetworkHandle)
        self.stopped = str(migration.facts.get("stopped", ""))
        self._restoring = AdoptedRestoring(self._restore_plan(), runtime, host)
        return self

    async def go_on(self, recorded: Sequence[S]) -> S:
        """Drive an adopted session to its end; `recorded` are its states, oldest first."""
        self.driver.machine.enter(recorded[-1])
        state = await self.driver.go_on(*target_machine.replay(recorded))
        log.info("session ended", migration=self.request.migration_id, state=str(state))
        return state

    async def wait_beyond(self, states: frozenset[S], deadline_s: float) -> None:
        """Returns when the session is in none of `states`, or after the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self.driver.settled_state in states:
                    await self._entered_one.wait()

    async def decide(self, owner: Owner) -> None:
        """An operator says whose the container is, where nobody else can know."""
        if self.driver.state in (S.HELD, S.IN_DOUBT):
            word = E.SOURCE_SAYS_COMMITTED if owner == "target" else E.SOURCE_SAYS_ABORTED
            await self.driver.post(word)
        elif self.driver.state is S.COMMITTED and owner == "source":
            await self.driver.post(E.COPY_LOST)
        elif self.stopped and owner == "target":
            await self._go_on_without()

    async def _go_on_without(self) -> None:
        """The operator lets a container run whose memory is lost in part."""
        group = self._runtime.restored_cgroup(self.workspace.bundle, self.request.container)
        if group is not None:
            await asyncio.to_thread(cgroup.thaw, group)
        self.stopped = ""
        await self._journal.note(self.request.migration_id, "target", stopped="")
        self._fill = messages.FillDone(fill_ms=0.0, faults=0, filled_bytes=0)
        await self.driver.post(E.FILL_DONE)

    async def run(self) -> S:
        """Drive the session to its end."""
        request = self.request
        await self._journal.begin(
            request.migration_id,
            "target",
            attempt=request.attempt,
            container=request.container,
            runtime=request.runtime,
            peer=self.peer,
            facts={"session": str(self.workspace.session), "bundle": str(self.workspace.bundle)},
        )
        state = await self.driver.run(E.SESSION_ACCEPTED)
        log.info("session ended", migration=self.request.migration_id, state=str(state))
        return state

    # --- what the driver asks of a performer ---

    async def perform(self, action: A) -> E | None:
        """Carry out one act."""
        return await self._acts[action]()

    def failed(self, action: A | None, error: MigrateError) -> None:
        """Keep the error for TELL_FAILED and for the log."""
        error.at(host=self._host)
        log.error("act failed", migration=self.request.migration_id, action=action, why=str(error))
        self._error = messages.WireError(
            message=error.message[: messages.MAX_TEXT],
            phase=(error.phase or str(self.driver.state))[:128],
            remedy=error.remedy[: messages.MAX_TEXT],
        )
        if not self.ready.done():
            self.ready.set_exception(error)

    async def record(self, state: S, event: str) -> None:
        """Append the transition to the journal.

        One that can't be written ends a session that holds nothing. What runs goes on: its COMMIT
        is recorded, which `replay` leads to the same. ABORTED is tried until it is written, because
        it is what the source takes its container back upon.
        """
        while True:
            try:
                await self._ledger.record(str(state), event)
            except JournalError as error:
                if state in (S.RECEIVING, S.PREPARED):
                    raise
                log.warning("not recorded", migration=self.request.migration_id, why=str(error))
                if state is not S.ABORTED:
                    self._ledger.owe(str(state), event)
                    return
                await asyncio.sleep(config.JOURNAL_PAUSE_S)
            else:
                return

    # --- acts ---

    async def _receive(self) -> None:
        identity, name = self.request.network, self.request.container
        planned = await asyncio.to_thread(network.plan, identity, name)
        await self._journal.note(
            self.request.migration_id,
            "target",
            network=msgspec.to_builtins(planned),
            made_bundle=True,
            on_demand=not self._fills,
        )
        await asyncio.to_thread(network.recreate, identity, planned)
        self._network = planned
        netns = Path(planned.netns)
        if not self._owns_network:
            self._announcer = await asyncio.to_thread(Announcer, netns, identity)
        await asyncio.to_thread(self.workspace.make, netns)

    async def _tell_opened(self) -> None:
        self.ready.set_result(None)
        self._expecting = asyncio.create_task(self._expect_source())

    async def _expect_source(self) -> None:
        """A source that opens a session and dies before it comes has no link that could break."""
        await asyncio.sleep(config.FIRST_CONNECT_DEADLINE_S)
        if not self.channel.was_open:
            await self.driver.post(E.LINK_LOST)

    async def _prepare(self) -> E:
        assert self._descriptors is not None
        self.workspace.check_in_time()
        plan = self._restore_plan()
        orphaned = holder.command(
            self._paths, self.request.migration_id, "target", plan.work_dir / "hold"
        )
        make_network = self._hand_over_network if self._owns_network else None
        self._restoring = Restoring(plan, self._runtime, self._host, make_network)
        await self._restoring.prepare(self._descriptors, orphaned)
        return E.PREPARED

    @property
    def _owns_network(self) -> bool:
        """Whether the network's namespace is CRIU's to make: a user namespace has to own it."""
        return has_user_namespace(self._spec)

    @property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.request.config_json)
        return spec

    def _hand_over_network(self, task: int) -> None:
        """The container's network goes to its restored first task. Blocking."""
        assert self._network is not None
        network.hand_over(self.request.network, self._network, task)
        self._hint_neighbours()

    async def _hint_beforehand(self) -> None:
        if not self._owns_network:
            await asyncio.to_thread(self._hint_neighbours)

    def _hint_neighbours(self) -> None:
        assert self._network is not None
        network.hint_neighbours(Path(self._network.netns), self.request.network)

    @property
    def _shares_files(self) -> bool:
        """Whether what the container writes may be the source's as well."""
        mounts = mounts_of(self._spec)
        return any(mount.is_bind and "ro" not in mount.options for mount in mounts)

    def _restore_plan(self) -> RestorePlan:
        assert self._network is not None
        return RestorePlan(
            container=self.request.container,
            bundle=self.workspace.bundle,
            run=self._paths.run,
            session=self.workspace.session,
            lazy=self.request.restore == "lazy",
            ports=self._network.ports,
            root_group=host_root(self._spec, "gidMappings"),
            renaming=self._renaming(),
            fill=self._fills,
        )

    @property
    def _cgroup(self) -> Path:
        group = self._runtime.restored_cgroup(self.workspace.bundle, self.request.container)
        assert group is not None
        return group

    @property
    def _fills(self) -> bool:
        return not self.request.copy_of or self.request.copy_of.fill

    @property
    def is_on_demand(self) -> bool:
        """Whether all that is left to do is to bring memory that may never be needed."""
        return self.driver.state is S.RUNNING and not self._fills

    def _renaming(self) -> Renaming | None:
        if not (copy_of := self.request.copy_of):
            return None
        addresses = {parse_ip(old): parse_ip(own) for old, own in copy_of.renamed}
        return Renaming(self.request.network.hostname, addresses)

    async def _do_restore(self) -> E:
        assert isinstance(self._restoring, Restoring)
        assert self._restore is not None
        assert self._network is not None
        await self._revoke()
        await asyncio.to_thread(self._accept, self._restore)
        await asyncio.to_thread(self._ask_network)
        # Beside CRIU: nothing asks for a neighbour before the tasks run.
        hinting = asyncio.ensure_future(self._hint_beforehand())
        try:
            self._marks = await self._restoring.restore(
                self.workspace.store, self._restore.confinement
            )
        finally:
            await asyncio.wait([hinting])
        hinting.result()
        await copy_hook.run(
            self.request, self._restore.confinement, self._cgroup, self._paths.copy_hooks
        )
        self._watching = asyncio.create_task(self._watch_copy(self._restoring))
        return E.CRIU_HELD

    def _accept(self, restore: messages.Restore) -> None:
        """CRIU sees nothing but what has passed here. Blocking."""
        arrived = Arrived(self.request, self.workspace, self.peer, self._host, self._paths)
        arrived.check_signed(restore, arrived.take_over(self._data))
        arrived.check_confinement(restore.confinement)

    def _ask_network(self) -> None:
        """Once more, just before a copy comes to it: since the session was opened somebody else may
        have taken an address. Blocking."""
        if not self.request.copy_of:
            return
        if refusals := preflight.ask_network(self.request.network):
            raise RestoreFailed(
                "; ".join(one.message for one in refusals),
                phase="restore",
                remedy=refusals[0].remedy,
            )

    async def _watch_copy(self, restoring: Restoring) -> None:
        """A copy whose CRIU or runtime dies while it is held is lost, and was never run."""
        if await restoring.is_lost():
            await self.driver.post(E.COPY_LOST)

    async def _check_copy(self) -> E | None:
        """After a restart: what an agent before this one had restored may have died with it."""
        assert isinstance(self._restoring, AdoptedRestoring)
        return None if await self._restoring.is_there() else E.COPY_LOST

    async def _record_commit(self) -> E:
        await self._ledger.record(str(S.COMMITTED), str(E.COMMIT_RECEIVED))
        self._marks = {"commit": time.monotonic_ns() // 1000}
        return E.COMMIT_RECORDED

    async def _resume(self) -> E:
        assert self._restoring is not None
        assert self._network is not None
        if isinstance(self._restoring, AdoptedRestoring) and not await self._restoring.is_there():
            return E.COPY_LOST
        if self._announcer is None:
            netns = Path(self._network.netns)
            self._announcer = await asyncio.to_thread(Announcer, netns, self.request.network)
        try:
            self._marks |= await self._restoring.commit(self._let_in)
        except CopyRefused as error:
            self.failed(A.RESUME, error)
            return E.COPY_LOST
        except RestoreFailed as error:
            # A CRIU that has lost its runtime meanwhile has undone its restore when told to go on.
            restoring = self._restoring
            if isinstance(restoring, AdoptedRestoring) and not await restoring.is_there():
                return E.COPY_LOST
            plan, runtime = restoring.plan, self._runtime
            if self._shares_files or not await asyncio.to_thread(end_unheard, plan, runtime):
                raise
            self.failed(A.RESUME, error)
            return E.COPY_LOST
        await asyncio.to_thread(self._signal_copy)
        self._announcer.send()
        self._announcing = asyncio.create_task(self._announcer.announce())
        return E.RESUMED

    async def _let_in(self) -> None:
        """What has come for the container on its source, and what will come."""
        self._lets_in = True
        frames, self._early_frames = self._early_frames, ()
        await self._deliver(frames)

    async def _deliver(self, frames: Sequence[HeldFrame]) -> None:
        assert self._network is not None
        if frames:
            ports = self._network.ports
            await asyncio.to_thread(deliver, frames, self.request.network, ports)

    def _signal_copy(self) -> None:
        """Tell a copy that it is one, as was asked for. Blocking."""
        copy_of = self.request.copy_of
        if copy_of and copy_of.signal and (first := first_task(self._cgroup)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.Signals[f"SIG{copy_of.signal}"])

    async def _do_fill(self) -> E:
        assert self._restoring is not None
        if self.stopped:
            # Known since before a restart of the agent: only the operator can say what now.
            raise RestoreFailed(self.stopped, phase="fill")
        try:
            result = await self._restoring.finish()
        except PagerLost as error:
            self.stopped = error.message
            await self._journal.note(self.request.migration_id, "target", stopped=self.stopped)
            raise
        self._fill = messages.FillDone(
            fill_ms=result.fill_ms if result else 0.0,
            faults=result.faults if result else 0,
            filled_bytes=result.filled_bytes if result else 0,
            fault_p50_us=result.fault_p50_us if result else 0,
            fault_p99_us=result.fault_p99_us if result else 0,
        )
        return E.FILL_DONE

    async def _tell_filled(self) -> None:
        assert self._fill is not None
        await self.channel.tell(self._fill)

    async def _clean_up(self) -> None:
        await self._revoke()
        if self._watching is not None:
            self._watching.cancel()
        if self._announcing is not None:
            await quietly(self._announcing)
        self._close_announcer()
        if self._owns_network and self._network is not None:
            await asyncio.to_thread(network.forget, self._network)
        await self._settle_ledger()
        await asyncio.to_thread(self.workspace.wipe_session)

    async def _settle_ledger(self) -> None:
        """Returns when the journal has all of it: without that, the session's directory is what
        tells the next agent that the container has run."""
        while True:
            try:
                await self._ledger.settle()
            except JournalError:
                await asyncio.sleep(config.JOURNAL_PAUSE_S)
            else:
                return

    async def _discard(self) -> E:
        """Nothing of it remains. Whatever fails is tried again: there is nobody else to do it, and
        every step may be taken twice."""
        migration = self.request.migration_id
        while True:
            try:
                await self._discard_once()
            except (OSError, MigrateError) as error:
                log.warning("the undoing is tried again", migration=migration, why=str(error))
            except Exception:
                log.exception("the undoing is tried again", migration=migration)
            else:
                return E.DISCARDED
            await asyncio.sleep(config.ASK_AGAIN_S)

    async def _discard_once(self) -> None:
        await self._revoke()
        if self._watching is not None:
            self._watching.cancel()
        if self._restoring is not None:
            await self._restoring.abort()
            await asyncio.to_thread(criu_roots.sweep)
        self._close_announcer()
        if self._network is not None:
            await asyncio.to_thread(network.destroy, self._network)
        await asyncio.to_thread(self.workspace.discard)

    async def _revoke(self) -> None:
        """No stream and no rsync writes here any more, and none is let in."""
        self.is_receiving = False
        await self.passes.end()
        await asyncio.to_thread(self._data.revoke, self.ticket.secret)

    def _close_announcer(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
            self._announcer = None

    async def _tell_failed(self) -> None:
        error = self._error or messages.WireError(
            f"the session ended in state {self.driver.state}", phase=str(self.driver.state)
        )
        await self.channel.tell(messages.Failed(error))

    async def _tell_state(self) -> None:
        request = self.request
        await self.channel.tell(
            messages.State(request.migration_id, request.attempt, str(self.driver.settled_state))
        )

    async def _ask_source(self) -> E | None:
        """Ask the coordinator, or, where it does not hear, the agent of its host."""
        ask = messages.Ask(self.request.migration_id, self.request.attempt)
        if self.channel.is_open:
            await self.channel.tell(ask)
            return None
        try:
            said = await peer.say(self.peer, config.CONTROL_PORT, self._paths, "source", ask)
        except MigrateError as error:
            await self._hold(error.message)
            return None
        return source_reported(said)

    async def _hold(self, why: str = "") -> None:
        """Leave everything as it is; said once a state."""
        if self._held_in is self.driver.state:
            return
        self._held_in = self.driver.state
        log.warning(
            "the container is held and waits for its source",
            migration=self.request.migration_id,
            container=self.request.container,
            state=str(self.driver.state),
            why=why or (self._error.message if self._error else ""),
        )

    # --- the channel ---

    def _entered(self, state: S) -> None:
        # First the next one's: between two of them nothing is to wait.
        hurry = contextlib.ExitStack()
        if state in URGENT:
            hurry.enter_context(self._data.urgency)
        self._hurry.close()
        self._hurry = hurry
        if state is S.PREPARED:
            self.passes.hurry()
        self._entered_one.set()
        self._entered_one = asyncio.Event()
        log.info("session", migration=self.request.migration_id, state=str(state))

    def _patience_s(self) -> float:
        """How long the source tries to come back when the link breaks now."""
        state = self.driver.state
        if state not in target_machine.UNHELD:
            return 0.0
        return config.FROZEN_SILENCE_S if state is S.RESTORING else self.request.patience_s

    async def hear(self, message: messages.SourceMessage) -> None:
        """Take a message of the source. One of another attempt is refused: ProtocolError."""
        match message:
            case (
                messages.Commit()
                | messages.Frames()
                | messages.Abort()
                | messages.Ask()
                | messages.State()
            ):
                told = (message.migration_id, message.attempt)
                if told != (self.request.migration_id, self.request.attempt):
                    raise ProtocolError(
                        f"attempt {told[1]} of {told[0][:64]} is not the one of this session"
                    )
            case _:
                pass
        match message:
            case messages.Ping(t_us=t_us):
                await self.channel.tell(messages.Pong(t_us, time.monotonic_ns() // 1000))
            case messages.Prepare(descriptors=descriptors):
                if self._descriptors is not None:
                    raise ProtocolError("this session was told to prepare before")
                self._descriptors = descriptors
            case messages.Restore() if self._restore is None:
                # What is judged counts, whatever the source says meanwhile.
                self._restore = message
            case messages.Frames(frames=frames):
                if self._lets_in:
                    await self._deliver(frames)
                else:
                    self._early_frames = (*self._early_frames, *frames)[:FRAMES_MAX]
            case _:
                pass
        event = event_of_source_message(message)
        if event is not None:
            await self.driver.post(event.kind, from_peer=True)
