"""What a coordinator or an agent that died has left on this host, and its removal.

Called before a migration begins (for the source) and when an agent starts (for both roles). Only
what the journal calls unfinished is looked at, and only what nobody can need any more is removed:

    source  the coordinator is dead and had not committed      give back, wipe, ABORTED
    target  nothing was restored (the gate was never opened)   wipe, ABORTED
    target  the container runs and its pager is done           wipe the session, DONE

Anything else is held, perhaps by both hosts, and stays exactly as it is: only the two journals
together can decide it. It is returned, to be told to the operator.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
import structlog

from criu_glue.hooks import abort_from_outside
from migrate import network
from migrate.core.source_machine import Verdict
from migrate.core.states import SourceState, TargetState
from migrate.errors import MigrateError
from migrate.guard import GuardPlan, give_back
from migrate.mounts import unmount
from migrate.processes import is_alive
from migrate.runtimes.runc import bundle_cgroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migrate.config import HostPaths
    from migrate.journal import Journal, Migration, Role
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

# CRIU kills a held copy in milliseconds.
HOLD_END_DEADLINE_S = 30.0
_STEP_S = 0.02


def clean(
    journal: Journal,
    role: Role,
    runtimes: Mapping[str, Runtime],
    paths: HostPaths,
    *,
    at_wall_s: float,
) -> list[Migration]:
    """Remove what dead processes left of one role; the migrations that stay held. Blocking.

    For the role of the target only the agent that has just started may call it: sessions belong to
    the one agent of a host. `journal` is open for writing. Raises JournalError; what can't be
    removed is logged and kept.
    """
    held = []
    for migration, records in journal.unfinished():
        if migration.role != role:
            continue
        state = records[-1].state if records else ""
        try:
            if migration.role == "source":
                end = _clean_source(migration, state, journal, paths)
            else:
                end = _clean_target(migration, state, runtimes, paths)
        except (MigrateError, OSError) as error:
            log.warning("remains stay", migration=migration.migration_id, why=str(error))
            continue
        if end is None:
            held.append(migration)
            continue
        log.info("remains removed", migration=migration.migration_id, role=migration.role)
        for entered in end:
            journal.append(
                migration.migration_id, migration.role, entered, "recovered", at_wall_s=at_wall_s
            )
    return held


def process_is(pid: int, created_wall_s: float) -> bool:
    """Whether this pid is still the process that was created then."""
    try:
        process = psutil.Process(pid)
        return is_alive(pid) and abs(process.create_time() - created_wall_s) < 1.0
    except psutil.NoSuchProcess:
        return False


def _clean_source(
    migration: Migration, state: str, journal: Journal, paths: HostPaths
) -> tuple[str, ...] | None:
    facts = migration.facts
    if process_is(int(facts.get("pid", 0)), float(facts.get("created_wall_s", 0.0))):
        return None
    if journal.verdict(migration.migration_id) is not Verdict.THAW:
        return None
    if "guard" in facts:
        # The guard has done so already, unless it died with the coordinator.
        give_back(msgspec.convert(facts["guard"], GuardPlan))
    _wipe(paths.session(migration.migration_id, "source"))
    if state in ("", SourceState.ROLLING_BACK):
        return (SourceState.ABORTED,)
    return (SourceState.ROLLING_BACK, SourceState.ABORTED)


def _clean_target(
    migration: Migration, state: str, runtimes: Mapping[str, Runtime], paths: HostPaths
) -> tuple[str, ...] | None:
    session = paths.session(migration.migration_id, "target")
    if state == TargetState.RUNNING:
        if _uses(session):
            return None
        _wipe(session)
        return (TargetState.DONE,)
    runtime = runtimes.get(migration.runtime)
    if state not in ("", TargetState.RECEIVING, TargetState.PREPARED) or runtime is None:
        return None
    if runtime.state(migration.container) is not None:
        # Restored, and held or even running: not ours to judge.
        return None
    _discard(migration, runtime, paths)
    return (TargetState.ABORTED,)


def end_held(migration: Migration, runtime: Runtime, paths: HostPaths) -> None:
    """End a copy that an agent before this one held, on its source's word that it kept its own.

    Blocking. Raises MigrateError when the hold does not end in time; then it is still held.
    """
    hold = paths.session(migration.migration_id, "target") / "work" / "hold"
    limit_s = time.monotonic() + HOLD_END_DEADLINE_S
    while runtime.state(migration.container) is not None:
        if time.monotonic() > limit_s:
            raise MigrateError(f"the held copy of {migration.container} does not end")
        abort_from_outside(hold)
        time.sleep(_STEP_S)
    _discard(migration, runtime, paths)


def _discard(migration: Migration, runtime: Runtime, paths: HostPaths) -> None:
    session = paths.session(migration.migration_id, "target")
    was_prepared = (session / "work" / "hold").exists()
    _end_restore(session)
    if was_prepared:
        cgroup = bundle_cgroup(paths.containers / migration.container, migration.container)
        runtime.delete(migration.container, cgroup=cgroup)
    if "network" in migration.facts:
        network.destroy(msgspec.convert(migration.facts["network"], network.NetworkHandle))
    _wipe(session)
    if migration.facts.get("made_bundle"):
        shutil.rmtree(paths.containers / migration.container, ignore_errors=True)


def _end_restore(session: Path) -> None:
    """Let a restore undo itself: a CRIU that is killed leaves its mounts behind."""
    limit_s = time.monotonic() + HOLD_END_DEADLINE_S
    while any("restore" in process.info["cmdline"] for process in _uses(session)):
        if time.monotonic() > limit_s:
            break
        abort_from_outside(session / "work" / "hold")
        time.sleep(_STEP_S)
    for process in _uses(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _uses(session: Path) -> list[psutil.Process]:
    """Processes that were started for a session: its directory is in their command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(session) in word for word in process.info["cmdline"] or ())
    ]


def _wipe(session: Path) -> None:
    unmount(session)
    shutil.rmtree(session, ignore_errors=True)
