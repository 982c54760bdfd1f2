"""What an operator can do about the migrations of this host: cancel, and recover.

What only the peer knows is asked. A migration that its coordinator drives is left to it; one that
is received here is in the hands of this host's agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from migrate import config, peer, recovery
from migrate.claim import Claim, Claimant, ClaimTakenError, claimant
from migrate.core import messages
from migrate.core.states import SOURCE_TERMINAL, SourceState
from migrate.core.table import Verdict
from migrate.errors import InDoubt, MigrateError, Unreachable, UsageError, runs_on
from migrate.identity import own_identity
from migrate.journal import Journal, JournalWriter
from migrate.operating import check_standing, tell_agent
from migrate.standing import is_known, last_state, reading, status, unknown_migration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from migrate.core.messages import Side
    from migrate.journal import Migration
    from migrate.recovery import Owner
    from migrate.runtimes.base import Runtime

# The agent's own recoveries take the claim for the time of one question.
CLAIM_PATIENCE_S = 30.0
RECOVER_PATIENCE_S = 10.0
_STEP_S = 0.05


async def cancel(
    paths: config.HostPaths, runtimes: Mapping[str, Runtime], migration_id: str
) -> str:
    """End a migration before its commit; what has become of it. Raises MigrateError."""
    migration, driver = begin_cancel(paths, migration_id)
    if driver is not None:
        await _ended(paths.claim(migration_id, "source"), driver)
    else:
        await _recover_source(migration, paths, runtimes, None, tell=lambda _: None)
    side = source_side(status(paths, migration_id))
    return what_became(side, socket.gethostname())


def begin_cancel(paths: config.HostPaths, migration_id: str) -> tuple[Migration, Claimant | None]:
    """Have the coordinator of a migration undo it. Which that is; None, if nobody drives it.
    Raises UsageError if there is nothing to cancel."""
    with reading(paths) as journal:
        if journal is None or not is_known(journal, migration_id, "source"):
            if journal is not None and is_known(journal, migration_id, "target"):
                source = journal.migration(migration_id, "target").peer
                raise UsageError(
                    f"{migration_id} comes from {source}",
                    remedy=f"run on {source}: migrate cancel {migration_id}",
                )
            raise unknown_migration(migration_id)
        migration = journal.migration(migration_id, "source")
    _refuse_late(paths, migration)
    claim = paths.claim(migration_id, "source")
    driver = claimant(claim)
    if driver is None or driver.kind != "coordinator":
        return migration, None
    _terminate(claim, driver)
    return migration, driver


def source_side(found: Sequence[Side]) -> Side:
    """Of one migration; this host may be both of its sides."""
    return next(one for one in found if one.role == "source")


def what_became(side: Side, host: str) -> str:
    """Of one that was to be cancelled, on `host`. Raises MigrateError if it was not."""
    if side.state == SourceState.ABORTED:
        return f"{side.migration_id} is undone; {side.container} {runs_on(host)}"
    raise MigrateError(
        f"{side.migration_id} was committed before it could be cancelled",
        phase=side.state,
        container_state=runs_on(side.peer) if side.state == SourceState.DONE else "",
        remedy=f"migrate status {side.migration_id}",
    )


async def recover(
    paths: config.HostPaths,
    runtimes: Mapping[str, Runtime],
    migration_id: str | None,
    owner: Owner | None,
    tell: Callable[[str], None],
) -> None:
    """Finish or undo what nobody drives, and `tell` what each side says and what became of it.

    Raises MigrateError for the last one that stays as it is, after all others were tried. `owner`:
    the operator's word where nobody can know.
    """
    with reading(paths) as journal:
        found = [] if journal is None else [one for one, _ in journal.unfinished()]
    if migration_id is not None:
        found = [one for one in found if one.migration_id == migration_id]
        if not found:
            for standing in status(paths, migration_id):
                tell(f"{migration_id} has ended: {standing.container} {standing.meaning}")
            return
    if not found:
        tell("nothing is under way")
    errors: list[MigrateError] = []
    for migration in found:
        try:
            if migration.role == "source":
                await _recover_source(migration, paths, runtimes, owner, tell)
            else:
                await _recover_target(migration, paths, owner, tell)
        except MigrateError as error:
            errors.append(error)
    if errors:
        *others, last = errors
        for other in others:
            tell(other.render())
        raise last


# --- the source's side ---


async def _recover_source(
    migration: Migration,
    paths: config.HostPaths,
    runtimes: Mapping[str, Runtime],
    owner: Owner | None,
    tell: Callable[[str], None],
) -> None:
    host, name = socket.gethostname(), migration.container
    claim = await _claimed(paths, migration)
    journal = await asyncio.to_thread(JournalWriter, paths.journal)
    try:
        before = last_state(paths, migration) or "begun"
        said = await _target_says(migration, paths)
        tell(f"{migration.migration_id} {name}: {host} says {before}; {said.text}")
        state = await _finish(migration, journal, paths, runtimes, owner, said)
        where = runs_on(host)
        if state is SourceState.DONE:
            where = runs_on(migration.peer)
        elif not runtimes[migration.runtime].exists(name):
            where = f"has ended on {host}"
        tell(f"{migration.migration_id} {state}: {name} {where}")
    finally:
        claim.release()
        await asyncio.to_thread(journal.close)


async def _finish(
    migration: Migration,
    journal: JournalWriter,
    paths: config.HostPaths,
    runtimes: Mapping[str, Runtime],
    owner: Owner | None,
    said: _Said,
) -> SourceState:
    """The target's word first; the operator's only where there is none."""
    patience_s = RECOVER_PATIENCE_S if owner is None else 0.0
    try:
        return await recovery.recover_claimed(
            migration, journal, runtimes, paths, patience_s=patience_s
        )
    except InDoubt as error:
        if owner is not None:
            said = await _target_says(migration, paths)
        if said.decides:
            # It may let its copy run at any moment.
            error.remedy = (
                f"{said.text}, and it is for {migration.peer} to go on: see migrate status there"
            )
            raise
        if owner is None:
            if error.phase == SourceState.LOST:
                raise
            error.remedy = (
                f"bring {migration.peer} back; if it is gone for good: migrate recover"
                f" {migration.migration_id} --force-source (it goes on here) or --force-target"
                " (what is held here ends). Never both, on either host"
            )
            raise
    return await recovery.recover_claimed(
        migration, journal, runtimes, paths, patience_s=RECOVER_PATIENCE_S, owner=owner
    )


class _Said(NamedTuple):
    """The target's word. decides: it was heard, and knows of the migration."""

    text: str
    decides: bool


async def _target_says(migration: Migration, paths: config.HostPaths) -> _Said:
    try:
        state = await recovery.ask_target(migration, paths)
    except MigrateError as error:
        return _Said(error.message, decides=False)
    return _Said(f"{migration.peer} says {state}", decides=state != peer.UNKNOWN)


async def _claimed(paths: config.HostPaths, migration: Migration) -> Claim:
    """The migration's claim; waits while the agent of this host looks after it."""
    limit_s = time.monotonic() + CLAIM_PATIENCE_S
    path = paths.claim(migration.migration_id, "source")
    while True:
        try:
            return Claim.take(path, "recovery")
        except ClaimTakenError:
            driver = claimant(path)
            if driver is not None and driver.kind == "coordinator":
                raise UsageError(
                    f"{migration.container} is being migrated by {driver}",
                    remedy=f"wait for it, or run: migrate cancel {migration.migration_id}",
                ) from None
            if time.monotonic() > limit_s:
                raise
        await asyncio.sleep(_STEP_S)


def _refuse_late(paths: config.HostPaths, migration: Migration) -> None:
    state = last_state(paths, migration)
    if state in SOURCE_TERMINAL:
        side = source_side(status(paths, migration.migration_id))
        raise UsageError(
            f"{migration.migration_id} has ended: {migration.container} {side.meaning}",
            phase=state,
        )
    with Journal.open_read_only(paths.journal) as journal:
        if journal.verdict(migration.migration_id, "source") is not Verdict.UNDO:
            raise UsageError(
                f"{migration.migration_id} is committed: {migration.container} belongs to"
                f" {migration.peer}",
                phase=state,
                remedy=f"migrate recover {migration.migration_id}",
            )


def _terminate(path: Path, driver: Claimant) -> None:
    """SIGTERM for a coordinator, which undoes everything then."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(driver.pid)
        try:
            # Still its claim after the descriptor was opened: it is this process.
            if claimant(path) == driver:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)


async def _ended(path: Path, driver: Claimant) -> None:
    limit_s = time.monotonic() + config.UNDO_DEADLINE_S
    while claimant(path) == driver:
        if time.monotonic() > limit_s:
            raise MigrateError(
                f"{driver} was told to cancel and has not ended",
                remedy=f"end it: kill -KILL {driver.pid}; then: migrate recover",
            )
        await asyncio.sleep(_STEP_S)


# --- the target's side: in the hands of this host's agent ---


async def _recover_target(
    migration: Migration,
    paths: config.HostPaths,
    owner: Owner | None,
    tell: Callable[[str], None],
) -> None:
    host, name = socket.gethostname(), migration.container
    word = messages.Recover(migration.migration_id, owner or "")
    own, port = own_identity(paths), config.CONTROL_PORT
    try:
        standing = await tell_agent(word, own, host=host, address="127.0.0.1", port=port)
    except Unreachable as error:
        error.remedy = "start `migrate agent` here: it goes on with what is under way"
        raise
    tell(f"{migration.migration_id} {name}: {standing.peer}; {host} says {standing.state}")
    check_standing(standing, host=host, name=name, source=migration.peer)
