"""What a person can see of the migrations of this host: `migrate status` and `migrate log`.

Everything is read from the journal of this host, which both sides of every migration have. Who
drives one at the moment is read from its claim.
"""

from __future__ import annotations

import contextlib
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
from rich.table import Table

from migrate.claim import Claimant, claimant
from migrate.core.states import SOURCE_TERMINAL, TARGET_TERMINAL, SourceState, TargetState
from migrate.errors import JournalError, UsageError, held_on, runs_on
from migrate.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate import config
    from migrate.journal import Migration, Record, Role

# Finished migrations that `status` shows besides those under way.
FINISHED_MAX = 10
ROLES: Final[tuple[Role, ...]] = ("source", "target")
# A journal keeps fewer than this.
_ALL = 1 << 20


class Standing(msgspec.Struct, frozen=True):
    """One side of a migration as `status` shows it. since_wall_s: Unix time of the last record.
    driver: who drives it now, empty for nobody. container_state: in the words of errors.
    meaning: what that is, and what to do."""

    migration_id: str
    role: str
    container: str
    peer: str
    attempt: int
    state: str
    since_wall_s: float
    ended: bool
    driver: str
    container_state: str
    meaning: str


def status(paths: config.HostPaths, migration_id: str | None) -> list[Standing]:
    """The migrations of this host, oldest first. Raises JournalError, and UsageError when there is
    none of that id."""
    with reading(paths) as journal:
        found = [] if journal is None else journal.unfinished()
        if journal is not None:
            shown = {(one.migration_id, one.role) for one, _ in found}
            latest = journal.history(FINISHED_MAX if migration_id is None else _ALL)
            found += [pair for pair in latest if (pair[0].migration_id, pair[0].role) not in shown]
    if migration_id is not None:
        found = [pair for pair in found if pair[0].migration_id == migration_id]
        if not found:
            raise unknown_migration(migration_id)
    found.sort(key=lambda pair: pair[0].created_wall_s)
    return [_standing(migration, records, paths) for migration, records in found]


def log_lines(paths: config.HostPaths, migration_id: str) -> list[str]:
    """What the journal of this host has on one migration, for a person. Raises as `status`."""
    lines = []
    for role in ROLES:
        with reading(paths) as journal:
            records = [] if journal is None else journal.records(migration_id, role)
            if journal is None or not is_known(journal, migration_id, role):
                continue
            migration = journal.migration(migration_id, role)
        arrow = "to" if role == "source" else "from"
        lines.append(
            f"{migration_id} as {role}: {migration.container} ({migration.runtime})"
            f" {arrow} {migration.peer}, attempt {migration.attempt}"
        )
        lines.append(f"  {_clock(migration.created_wall_s)}  begun")
        for record in records:
            detail = f"  {record.detail}" if record.detail else ""
            lines.append(
                f"  {_clock(record.at_wall_s)}  {record.state:<13} by {record.event}{detail}"
            )
    if not lines:
        raise unknown_migration(migration_id)
    return lines


def status_table(found: list[Standing]) -> Table:
    """A line for each side of each migration."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("migration", "container", "way", "state", "since"):
        table.add_column(name, no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        arrow = "→" if one.role == "source" else "←"
        words = (one.container_state and f"{one.container} {one.container_state}", one.meaning)
        driver = one.driver and f"({one.driver})"
        table.add_row(
            one.migration_id,
            one.container,
            f"{arrow} {one.peer}",
            one.state,
            _clock(one.since_wall_s)[:-4],
            " ".join(filter(None, ("; ".join(filter(None, words)), driver))),
        )
    return table


@contextlib.contextmanager
def reading(paths: config.HostPaths) -> Iterator[Journal | None]:
    """The journal; None on a host that never had one."""
    if not paths.journal.exists():
        yield None
        return
    with Journal.open_read_only(paths.journal) as journal:
        yield journal


def last_state(paths: config.HostPaths, migration: Migration) -> str:
    with Journal.open_read_only(paths.journal) as journal:
        return journal.state(migration.migration_id, migration.role) or ""


def is_known(journal: Journal, migration_id: str, role: Role) -> bool:
    try:
        journal.migration(migration_id, role)
    except JournalError:
        return False
    return True


def unknown_migration(migration_id: str) -> UsageError:
    return UsageError(
        f"this host knows no migration {migration_id[:64]!r}", remedy="migrate status lists them"
    )


def _clock(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _standing(migration: Migration, records: list[Record], paths: config.HostPaths) -> Standing:
    state = records[-1].state if records else ""
    driver = claimant(paths.claim(migration.migration_id, migration.role))
    terminal = SOURCE_TERMINAL if migration.role == "source" else TARGET_TERMINAL
    explain = _explain_source if migration.role == "source" else _explain_target
    where, meaning = explain(migration, state, driver)
    return Standing(
        migration_id=migration.migration_id,
        role=migration.role,
        container=migration.container,
        peer=migration.peer,
        attempt=migration.attempt,
        state=state or "begun",
        since_wall_s=records[-1].at_wall_s if records else migration.created_wall_s,
        ended=state in terminal,
        driver=str(driver) if driver else "",
        container_state=where,
        meaning=meaning,
    )


def _explain_source(migration: Migration, state: str, driver: Claimant | None) -> tuple[str, str]:
    here, there, recover_it = (
        socket.gethostname(),
        migration.peer,
        f"migrate recover {migration.migration_id}",
    )
    match state:
        case SourceState.DONE:
            return runs_on(there), "moved"
        case SourceState.ABORTED:
            return runs_on(here), "undone"
        case SourceState.RELEASING:
            return runs_on(there), f"its frozen tree here is removed, or: {recover_it}"
        case SourceState.COMMITTED if driver is None:
            return held_on(here), f"committed, and {there} has not been heard: {recover_it}"
        case SourceState.COMMITTED:
            return held_on(here), f"committed, waits for {there}"
        case _ if driver is None:
            return runs_on(here), f"its coordinator is dead; undone by the agent, or: {recover_it}"
        case SourceState.FROZEN:
            return f"stands still on {here}", "the final delta travels"
        case _:
            return runs_on(here), "under way"


def _explain_target(migration: Migration, state: str, driver: Claimant | None) -> tuple[str, str]:
    here, there = socket.gethostname(), migration.peer
    if driver is None and state not in TARGET_TERMINAL:
        return "", "no agent runs here; start `migrate agent`: it goes on with this"
    match state:
        case TargetState.DONE:
            return runs_on(here), "arrived"
        case TargetState.ABORTED:
            return "", f"nothing of it is here; it is {there}'s"
        case TargetState.RUNNING if migration.facts.get("stopped"):
            why = str(migration.facts["stopped"])
            return f"is frozen on {here}", f"{why}: migrate recover {migration.migration_id}"
        case TargetState.RUNNING:
            return runs_on(here), "its memory is filled in"
        case TargetState.COMMITTED:
            return held_on(here), f"is let go, or: migrate recover {migration.migration_id}"
        case TargetState.PREPARED:
            return "", (
                f"a copy may be held here until {there} says whose it is:"
                f" migrate recover {migration.migration_id}"
            )
        case _:
            return runs_on(there), "memory and files arrive"
