"""Finishes or undoes, on the source, a migration whose coordinator is dead.

The same table as the coordinator's, `core/source_machine.py`, entered where its journal ends; the
acts work from outside, by the facts that the coordinator has written down beforehand:

    not committed     CRIU is told to abort, the container is thawed and plugged in
    committed         the target is asked: it runs there (let the frozen tree die), it is held there
                      (say COMMIT again), it is gone there (take the container back)
    in doubt still    held, until the target is heard or an operator says whose it is

A recovery has the migration's claim, so nobody else acts. It is run by the agent of the host every
few seconds, by `migrate recover`, and by a migration that begins on this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec
import psutil
import structlog

from criu_glue.errors import CriuGlueError
from criu_glue.hooks import say as say_to_criu
from migrate import config, network, peer, throttle_keeper, unfinished
from migrate.brakes import BrakePlan, put_back
from migrate.claim import Claim, ClaimTakenError
from migrate.core import messages, source_machine
from migrate.core.actions import SourceAction as A
from migrate.core.events import SourceEventKind as E
from migrate.core.events import target_reported
from migrate.core.states import SOURCE_TERMINAL
from migrate.core.states import SourceState as S
from migrate.core.table import Verdict
from migrate.driver import Driver
from migrate.errors import InDoubt, MigrateError, RollbackFailed, held_on
from migrate.grace_periods import put_back_left
from migrate.guard import GuardPlan, busy, end_criu, give_back
from migrate.mounts import unmount
from migrate.processes import users_of, waited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from migrate.journal import Journal, JournalWriter, Migration, Record
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

Owner: TypeAlias = Literal["source", "target"]

# CRIU kills a frozen tree in milliseconds.
RELEASE_DEADLINE_S = 20.0
# As SIGKILL does a process.
KEEPER_DEADLINE_S = 5.0

DEADLINES_S = {
    S.COMMITTED: config.HANDOVER_DEADLINE_S,
    S.IN_DOUBT: config.ASK_AGAIN_S,
    S.LOST: config.ASK_AGAIN_S,
    S.ROLLING_BACK: config.UNDO_DEADLINE_S,
    S.RELEASING: config.UNDO_DEADLINE_S,
}


class SourceFacts(msgspec.Struct, frozen=True):
    """What the coordinator writes down for a recovery, each before the act that makes it true.

    peer_host: the target as its certificate calls it. port: of its agent. brake: what the container
    is slowed by. unfinished: the directory of a checkpoint that is made. The last three are known
    when the runtime is started to freeze it.
    """

    peer_host: str = ""
    port: int = config.CONTROL_PORT
    brake: BrakePlan | None = None
    unfinished: str = ""
    guard: GuardPlan | None = None
    network: network.NetworkHandle | None = None
    bundle: str = ""


def facts_of(migration: Migration) -> SourceFacts:
    """The facts of a migration of this host. Raises MigrateError when they make no sense."""
    try:
        return msgspec.convert(migration.facts, SourceFacts)
    except msgspec.ValidationError as error:
        what = f"the facts of {migration.migration_id} can't be read: {error}"
        raise MigrateError(what) from error


async def ask_target(migration: Migration, paths: config.HostPaths) -> str:
    """What the target says of a migration. Raises Unreachable, ProtocolError."""
    ask = messages.Ask(migration.migration_id, migration.attempt)
    return await peer.say(migration.peer, facts_of(migration).port, paths, "target", ask)


class Recovery:
    """One migration, claimed. `run` takes it to its end or raises InDoubt."""

    def __init__(
        self,
        migration: Migration,
        records: list[Record],
        *,
        runtime: Runtime,
        paths: config.HostPaths,
        journal: JournalWriter,
        patience_s: float,
    ) -> None:
        self._migration = migration
        self._facts = facts_of(migration)
        self._recorded = [S(record.state) for record in records]
        self._runtime = runtime
        self._paths = paths
        self._journal = journal
        self._limit_s = time.monotonic() + patience_s
        self._host = socket.gethostname()
        self._said = ""
        self._driver = Driver(
            source_machine.machine(self._recorded[-1] if self._recorded else S.NEW),
            self,
            must_record=source_machine.must_record,
            overtaking=frozenset({A.ROLLBACK}),
            terminal=SOURCE_TERMINAL,
            act_failed=E.ACT_FAILED,
            deadline_passed=E.DEADLINE_PASSED,
            deadlines_s=DEADLINES_S,
        )
        self._acts: dict[A, Callable[[], Awaitable[E | None]]] = {
            A.ASK_TARGET: self._ask_target,
            A.RECORD_COMMIT: self._record_commit,
            A.SEND_COMMIT: self._send_commit,
            A.ROLLBACK: self._rollback,
            A.RELEASE: self._release,
            A.HOLD: self._hold,
            A.REPORT_DONE: self._report,
            A.REPORT_ABORTED: self._report,
        }

    async def run(self, owner: Owner | None = None) -> S:
        """To DONE or ABORTED. `owner` is an operator's word, in place of the target's."""
        gone = await asyncio.to_thread(self._is_tree_gone)
        state, actions = source_machine.replay(self._recorded, tree_is_gone=gone)
        if owner is not None and state in (S.IN_DOUBT, S.LOST):
            word = E.TARGET_RUNNING if owner == "target" else E.TARGET_ABORTED
            await self._driver.post(word)
            actions = ()
        return await self._driver.go_on(state, actions)

    # --- what the driver asks of a performer ---

    async def perform(self, action: A) -> E | None:
        """Carry out one act."""
        return await self._acts[action]()

    def failed(self, action: A | None, error: MigrateError) -> None:
        """Told of an act's failure by the driver."""
        self._said = str(error)
        log.warning("recovery", migration=self._migration.migration_id, act=action, why=str(error))

    async def record(self, state: S, event: str) -> None:
        """Append the transition to the journal."""
        await self._journal.record(self._migration.migration_id, "source", str(state), event)

    def _is_tree_gone(self) -> bool:
        """Whether this host has been started anew since it froze the container."""
        plan = self._facts.guard
        # The directory is on a tmpfs, and nobody removes it before the end. The runtime's own state
        # is on one too; a container of that name may be another one, but then nothing was lost.
        return (
            plan is not None
            and not Path(plan.hold_directory).exists()
            and not self._runtime.exists(self._migration.container)
        )

    # --- acts ---

    async def _record_commit(self) -> E:
        await self.record(S.COMMITTED, str(E.TARGET_HELD))
        return E.COMMIT_RECORDED

    async def _ask_target(self) -> E | None:
        return await self._tell(messages.Ask)

    async def _send_commit(self) -> E | None:
        return await self._tell(messages.Commit)

    async def _tell(self, kind: type[messages.Ask | messages.Commit]) -> E | None:
        """The event that the target's answer is; None when there is none, while patience lasts."""
        migration = self._migration
        message = kind(migration.migration_id, migration.attempt)
        try:
            state = await peer.say(migration.peer, self._facts.port, self._paths, "target", message)
        except MigrateError as error:
            self._said = error.message
            self._wait_on()
            return None
        self._said = f"{migration.peer} says {state}"
        event, is_commit = target_reported(state), kind is messages.Commit
        was_told = self._driver.state is not S.LOST
        if was_told and (event is E.TARGET_COMMITTED or (event is E.TARGET_HELD and is_commit)):
            # It has heard it, and not recorded it or not resumed yet: asked again in time.
            self._wait_on()
            return None
        return event

    async def _hold(self) -> None:
        """Leave it to whoever comes next: at once where an undoing failed, else in time."""
        if self._driver.state in (S.ROLLING_BACK, S.RELEASING):
            self._halt()
        else:
            self._wait_on()

    def _wait_on(self) -> None:
        """In doubt: wait as long as there is patience. Somebody asks again and again, so an answer,
        or the want of one, may come when another one has decided: it counts for nothing then."""
        is_open = self._driver.state in (S.COMMITTED, S.IN_DOUBT, S.LOST)
        if is_open and time.monotonic() >= self._limit_s:
            self._halt()

    def _halt(self) -> None:
        why = lost if self._driver.state is S.LOST else in_doubt
        self._driver.halt(why(self._migration, self._host, self._said))

    async def _rollback(self) -> E:
        plan = self._facts.guard
        if plan is not None:
            # The guard has done so already, unless it died with the coordinator.
            await asyncio.to_thread(give_back_if_there, plan)
        brake = self._facts.brake
        if brake is not None:
            # Its keeper has done so already, unless it was killed with the coordinator.
            await asyncio.to_thread(let_go_if_there, brake, self._session)
        if self._facts.unfinished:
            path = Path(self._facts.unfinished)
            await asyncio.to_thread(unfinished.discard, path, self._migration.migration_id)
        await asyncio.to_thread(self._wipe)
        if self._recorded:
            # Perhaps it has a session, though its answer was not written down.
            reason = "the migration was undone after its coordinator had ended"
            abort = messages.Abort(self._migration.migration_id, self._migration.attempt, reason)
            # A target that does not hear it asks.
            with contextlib.suppress(MigrateError):
                await peer.say(self._migration.peer, self._facts.port, self._paths, "target", abort)
        return E.ROLLED_BACK

    async def _release(self) -> E:
        await asyncio.to_thread(self._release_blocking)
        return E.RELEASED

    def _release_blocking(self) -> None:
        name, plan = self._migration.container, self._facts.guard
        if plan is not None and Path(plan.hold_directory).exists():
            _let_die(plan)
            if self._runtime.exists(name):
                self._runtime.delete(name, bundle=Path(self._facts.bundle))
        # Without the directory this host has been started anew: of the container there are files,
        # unless somebody has made another one of that name since.
        if not self._runtime.exists(name):
            if self._facts.network is not None:
                network.destroy(self._facts.network)
            forget_bundle(Path(self._facts.bundle), self._paths)
        self._wipe()

    def _wipe(self) -> None:
        wipe(self._session)

    @property
    def _session(self) -> Path:
        return self._paths.session(self._migration.migration_id, "source")

    async def _report(self) -> None:
        log.info(
            "recovered",
            migration=self._migration.migration_id,
            container=self._migration.container,
            state=str(self._driver.state),
        )


async def recover_orphans(
    journal: JournalWriter,
    runtimes: Mapping[str, Runtime],
    paths: config.HostPaths,
    *,
    patience_s: float,
    container: str | None = None,
) -> list[tuple[Migration, MigrateError]]:
    """Recover every migration of this host whose coordinator is dead; those that stay, and why.

    A migration that is claimed is somebody's, and not among them. With `container`, only its
    targets are asked: others may be down, and asking takes time. Raises JournalError.
    """

    def read(opened: Journal) -> list[Migration]:
        return [
            migration
            for migration, _ in opened.unfinished()
            if migration.role == "source"
            and (
                container in (None, migration.container)
                or opened.verdict(migration.migration_id, "source") is not Verdict.HOLD
            )
        ]

    await asyncio.to_thread(put_back_left, paths.run)
    ours = await journal.call(read)
    ended = await asyncio.gather(
        *(_recover(one, journal, runtimes, paths, patience_s) for one in ours)
    )
    return [(one, error) for one, error in zip(ours, ended, strict=True) if error is not None]


async def sweep(journal: JournalWriter, paths: config.HostPaths) -> None:
    """Remove directories and claims of migrations that have ended and that nobody drives: what a
    process leaves that dies between its last record and its end. Raises JournalError."""
    found = await journal.call(lambda opened: opened.unfinished())
    open_ones = {f"{one.migration_id}.{one.role}" for one, _ in found}
    await asyncio.to_thread(_sweep, paths, open_ones)


def _sweep(paths: config.HostPaths, open_ones: set[str]) -> None:
    sessions, claims = paths.run / "sessions", paths.run / "claims"
    names = {path.name for directory in (sessions, claims) for path in _list(directory)}
    for name in names - open_ones:
        if "." not in name:
            continue
        try:
            # Whoever has it is still at work, or has just begun and is not in the journal yet.
            with Claim.take(claims / name, "recovery"):
                wipe(sessions / name)
        except MigrateError:
            continue


def _list(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def wipe(session: Path) -> None:
    """Give back the memory of a session. Idempotent; blocking."""
    unmount(session)
    shutil.rmtree(session, ignore_errors=True)


async def _recover(
    migration: Migration,
    journal: JournalWriter,
    runtimes: Mapping[str, Runtime],
    paths: config.HostPaths,
    patience_s: float,
) -> MigrateError | None:
    try:
        with Claim.take(paths.claim(migration.migration_id, "source"), "recovery"):
            await recover_claimed(migration, journal, runtimes, paths, patience_s=patience_s)
    except ClaimTakenError:
        return None
    except MigrateError as error:
        return error
    return None


async def recover_claimed(
    migration: Migration,
    journal: JournalWriter,
    runtimes: Mapping[str, Runtime],
    paths: config.HostPaths,
    *,
    patience_s: float,
    owner: Owner | None = None,
) -> S:
    """Recover one migration, whose claim this process has. Raises MigrateError."""
    runtime = runtimes.get(migration.runtime)
    if runtime is None:
        raise MigrateError(f"there is no driver for the runtime {migration.runtime}")

    def read(opened: Journal) -> list[Record]:
        return opened.records(migration.migration_id, "source")

    # Only now nobody else can append to it.
    recovery = Recovery(
        migration,
        await journal.call(read),
        runtime=runtime,
        paths=paths,
        journal=journal,
        patience_s=patience_s,
    )
    return await recovery.run(owner)


def in_doubt(migration: Migration, host: str, said: str) -> InDoubt:
    """What everybody says of a container that is committed and whose target is not understood."""
    return InDoubt(
        f"it is not known whether {migration.peer} runs {migration.container}: {said}",
        host=host,
        phase=str(S.IN_DOUBT),
        container_state=held_on(host),
        remedy=f"bring {migration.peer} back and run: migrate recover {migration.migration_id}",
    )


def lost(migration: Migration, host: str, said: str) -> InDoubt:
    """What is said of a container that went down with this host, as long as the target may have a
    copy of it that has not run yet."""
    return InDoubt(
        f"{host} went down while {migration.container} was frozen,"
        f" and it is not known whether {migration.peer} has it: {said}",
        host=host,
        phase=str(S.LOST),
        container_state=f"does not run on {host}; {migration.peer} may hold it",
        remedy=f"bring {migration.peer} back and run: migrate recover {migration.migration_id};"
        " if it is gone for good, with --force-source, and start the container anew",
    )


def give_back_if_there(plan: GuardPlan) -> None:
    """`give_back`, unless this host has been started anew, and the container ended with it. Raises
    RollbackFailed."""
    if Path(plan.hold_directory).exists():
        try:
            give_back(plan)
        except (CriuGlueError, OSError) as error:
            raise RollbackFailed(f"{plan.cgroup} could not be thawed: {error}") from error


def let_go_if_there(plan: BrakePlan, session: Path) -> None:
    """`put_back`, unless this host has been started anew, and the container ended with it; a keeper
    that hangs is ended. Raises RollbackFailed."""
    if not session.exists():
        return
    for process, words in users_of(session):
        if throttle_keeper.__name__ in words:
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(KEEPER_DEADLINE_S)
    try:
        put_back(plan)
    except OSError as error:
        raise RollbackFailed(
            f"{plan.cgroup} could not be given its processor time back: {error}",
            remedy=plan.remedy,
        ) from error


def forget_bundle(bundle: Path, paths: config.HostPaths) -> None:
    """A bundle that an agent made goes with its container; any other is the user's."""
    if bundle.parent == paths.containers:
        shutil.rmtree(bundle, ignore_errors=True)


def _let_die(plan: GuardPlan) -> None:
    """CRIU kills the frozen tree; one that hangs is ended with it. Blocking."""
    directory = Path(plan.hold_directory)

    def is_dead() -> bool:
        return not say_to_criu(directory, "commit") and not busy(directory, plan.runtime_pid)

    if not waited(is_dead, RELEASE_DEADLINE_S):
        end_criu(directory, plan.runtime_pid, Path(plan.cgroup))
