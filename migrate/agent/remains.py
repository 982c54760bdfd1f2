"""What a dead agent has left of a session that nobody can go on with, and its removal.

An agent goes on with the sessions of the one before it (`agent/session.py`). Of some there is too
little left for that: their tmpfs is gone, because the host was started anew, or was not made yet.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from migrate import network, recovery
from migrate.agent.ending import end_restore
from migrate.core.states import TargetState

if TYPE_CHECKING:
    from migrate.config import HostPaths
    from migrate.journal import Migration
    from migrate.runtimes.base import Runtime


def settle(
    migration: Migration, state: str, runtime: Runtime, paths: HostPaths
) -> TargetState | None:
    """Remove what is left, as far as that is right; the state in which the session ends, None when
    nobody but an operator can know whether the copy has run. Blocking. Raises MigrateError."""
    if state == TargetState.RUNNING:
        # It ran here, as the source knows, and ended with the host.
        recovery.wipe(paths.session(migration.migration_id, "target"))
        return TargetState.DONE
    if state == TargetState.COMMITTED:
        return None
    discard(migration, runtime, paths)
    return TargetState.ABORTED


def discard(migration: Migration, runtime: Runtime, paths: HostPaths) -> None:
    """Remove all of a session. Blocking. Raises MigrateError."""
    session = paths.session(migration.migration_id, "target")
    was_prepared = (session / "work" / "hold").exists()
    end_restore(session)
    if was_prepared:
        runtime.delete(migration.container, bundle=paths.containers / migration.container)
    if "network" in migration.facts:
        network.destroy(msgspec.convert(migration.facts["network"], network.NetworkHandle))
    recovery.wipe(session)
    if migration.facts.get("made_bundle"):
        shutil.rmtree(paths.containers / migration.container, ignore_errors=True)
