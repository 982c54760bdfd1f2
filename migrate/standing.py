"""What a person can see of the migrations of this host: `migrate status` and `migrate log`.

Everything is read from the journal of this host, which both sides of every migration have. Who
drives one at the moment is read from its claim.
"""

from __future__ import annotations

import contextlib
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from criu_glue import hooks
from migrate.brakes import BrakePlan
from migrate.cgroup import is_frozen
from migrate.claim import Claimant, claimant
from migrate.core.messages import Side
from migrate.core.states import SOURCE_TERMINAL, TARGET_TERMINAL, SourceState, TargetState
from migrate.errors import JournalError, UsageError, held_on, runs_on
from migrate.guard import GuardPlan
from migrate.journal import Journal
from migrate.processes import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate import config
    from migrate.journal import Migration, Record, Role

# Finished migrations that `status` shows besides those under way.
FINISHED_MAX = 10
ROLES: Final[tuple[Role, ...]] = ("source", "target")
# A journal keeps fewer than this.
_ALL = 1 << 20


def status(paths: config.HostPaths, migration_id: str | None) -> list[Side]:
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
    return [_side(migration, records, paths) for migration, records in found]


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


def status_lines(found: list[Side]) -> list[str]:
    """A line for each side of each migration; below one that has not ended what is up with it."""
    rows = [("migration", "container", "way", "state", "since (UTC)", "")]
    for one in found:
        arrow = "→" if one.role == "source" else "←"
        since = _clock(one.since_wall_s)[:-4]
        where = one.meaning if one.ended else one.container_state
        way = f"{arrow} {one.peer}"
        rows.append((one.migration_id, one.container, way, one.state, since, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for number in reversed(range(len(found))):
        one = found[number]
        if not one.ended:
            driver = one.driver and f" ({one.driver})"
            below = [f"{one.meaning}{driver}", one.remedy and f"remedy: {one.remedy}"]
            lines[number + 2 : number + 2] = [f"    {line}" for line in below if line]
    return lines


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


def _side(migration: Migration, records: list[Record], paths: config.HostPaths) -> Side:
    state = records[-1].state if records else ""
    driver = claimant(paths.claim(migration.migration_id, migration.role))
    terminal = SOURCE_TERMINAL if migration.role == "source" else TARGET_TERMINAL
    view = _View(migration, state, driver, paths)
    explain = _explain_source if migration.role == "source" else _explain_target
    where, meaning, remedy = explain(view)
    return Side(
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
        remedy=remedy,
    )


class _View:
    """What is looked at on this host to explain one side of a migration."""

    def __init__(
        self, migration: Migration, state: str, driver: Claimant | None, paths: config.HostPaths
    ) -> None:
        self.migration = migration
        self.state = state
        self.driver = driver
        self.here = socket.gethostname()
        self.there = migration.peer
        self.recover = f"migrate recover {migration.migration_id}"
        self._paths = paths

    @property
    def has_coordinator(self) -> bool:
        return self.driver is not None and self.driver.kind == "coordinator"

    @property
    def has_agent(self) -> bool:
        """Whether this host's agent runs, which goes on with everything by itself."""
        return claimant(self._paths.agent_claim) is not None

    def is_held(self) -> bool:
        """Whether a CRIU waits here for somebody's word. Its FIFO does not tell: whoever made it
        has both ends open."""
        role = self.migration.role
        hold = self._paths.session(self.migration.migration_id, role) / "work" / "hold"
        at = "post-dump" if role == "source" else "post-restore"
        criu = hooks.criu_pid(hold)
        is_there = criu is not None and is_alive(criu)
        return is_there and hooks.has_seen(hold, at) and not hooks.is_let_go(hold)

    def is_frozen(self) -> bool:
        """Whether the container's cgroup is frozen, as far as it was told to the journal."""
        if self.has_coordinator and self.state == SourceState.PRECOPY:
            # What slows a container may freeze it for moments; the freeze itself is recorded.
            return False
        facts = self.migration.facts
        try:
            guard = msgspec.convert(facts.get("guard"), GuardPlan | None)
            brake = msgspec.convert(facts.get("brake"), BrakePlan | None)
        except msgspec.ValidationError:
            return False
        held = guard or brake
        return held is not None and is_frozen(Path(held.cgroup))

    def back(self, host: str) -> str:
        """What to do where only another host knows."""
        then = "it goes on then; at once:" if self.has_agent else "then:"
        return f"bring {host} back, {then} {self.recover}"


_Explained: TypeAlias = tuple[str, str, str]
"""Where the container is, what is up with the migration, and what to do."""


def _explain_source(view: _View) -> _Explained:
    here, there = view.here, view.there
    match view.state:
        case SourceState.DONE:
            return "", f"moved to {there}", ""
        case SourceState.ABORTED if copy := view.migration.facts.get("copied"):
            return "", f"copied to {there} as {copy}, it stayed on {here}", ""
        case SourceState.ABORTED:
            return "", f"undone, it stayed on {here}", ""
        case SourceState.RELEASING:
            why = "what is left of it here is being removed"
            return runs_on(there), why, "" if view.has_coordinator else view.recover
        case SourceState.COMMITTED if view.has_coordinator:
            return held_on(here), f"handed over; waits to hear that it runs on {there}", ""
        case SourceState.COMMITTED:
            why = f"handed over, and {there} has not said that it runs there"
            if not view.is_held():
                return "", f"{why}; what was held here ended with this host", view.back(there)
            return held_on(here), why, view.back(there)
    where = f"stands still on {here}" if view.is_frozen() else runs_on(here)
    if view.has_coordinator:
        undoing = view.state == SourceState.ROLLING_BACK
        return where, "being undone" if undoing else "under way", ""
    if view.has_agent:
        return where, "its coordinator is dead; the agent of this host undoes it", ""
    return where, "its coordinator is dead, and no agent runs here to undo it", view.recover


def _explain_target(view: _View) -> _Explained:
    here, there = view.here, view.there
    if view.state == TargetState.DONE:
        return "", f"arrived from {there}", ""
    if view.state == TargetState.ABORTED:
        return "", f"given up, it stayed on {there}", ""
    where = held_on(here) if view.is_held() else ""
    if not view.has_agent:
        where = runs_on(here) if view.state == TargetState.RUNNING else where
        return where, "no agent runs here", "start `migrate agent` here: it goes on with this"
    if stopped := str(view.migration.facts.get("stopped", "")):
        remedy = f"end it and start it anew; if it may go on: {view.recover} --force-target"
        return f"is frozen on {here}", stopped, remedy
    match view.state:
        case TargetState.RUNNING:
            how = "what it needs" if view.migration.facts.get("on_demand") else "the rest"
            return runs_on(here), f"{how} of its memory is brought in", ""
        case TargetState.COMMITTED if view.driver is None:
            why = f"{here} went down before it was known whether it had run here"
            return "", why, f"{view.recover} --force-target (it had) | --force-source (it had not)"
        case TargetState.COMMITTED:
            return where, "it is let go", f"if that lasts: {view.recover}"
        case TargetState.PREPARED if where:
            return where, f"waits for {there} to say whose it is", view.back(there)
        case TargetState.PREPARED:
            return "", "everything is ready for its restore", ""
        case _:
            return runs_on(there), "memory and files arrive", ""
