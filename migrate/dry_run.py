"""`migrate --dry-run`: both hosts are asked whether it would work, and nothing else happens."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import msgspec

from migrate import preflight, tracking
from migrate.core.prediction import predict
from migrate.core.rounds_seen import History
from migrate.progress import mib
from migrate.target_link import TargetLink
from transport.sender import default_streams

if TYPE_CHECKING:
    from migrate.config import HostPaths
    from migrate.options import Options
    from migrate.runtimes.base import Runtime

# The first attempt of a host is 1; a question that opens nothing needs no number of the journal's.
_ATTEMPT = 1


class Forecast(msgspec.Struct, frozen=True, tag="forecast", tag_field="event"):
    """What a migration would move, and how long it would stand still if little is written.

    predicted_downtime_ms is made of earlier measurements alone: nothing of this way was tried.
    """

    container: str
    source: str
    target: str
    tracker: str
    tracker_reason: str
    restore: str
    tasks: int
    memory_bytes: int
    shared_bytes: int
    rootfs_bytes: int
    target_free_memory_bytes: int
    predicted_downtime_ms: float
    warnings: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """For people."""
        warnings = tuple(f"  warning    {text}" for text in self.warnings)
        return (
            f"{self.container}  {self.source} → {self.target}: nothing stands in the way",
            f"  memory     {mib(self.memory_bytes)} in {self.tasks} tasks,"
            f" {mib(self.shared_bytes)} of it shared;"
            f" {mib(self.target_free_memory_bytes)} are free there",
            f"  rootfs     {mib(self.rootfs_bytes)}",
            f"  way        tracker {self.tracker} ({self.tracker_reason}), {self.restore} restore",
            f"  downtime   about {self.predicted_downtime_ms:.0f} ms, by earlier measurements",
            *warnings,
        )


async def dry_run(
    options: Options, runtime: Runtime, paths: HostPaths, migration_id: str
) -> Forecast:
    """Ask both hosts. Raises PreflightRefused, SessionRefused, Unreachable, MigrateError."""
    host = socket.gethostname()
    checked = await asyncio.to_thread(
        preflight.check_source,
        runtime,
        options.container,
        options.shared,
        restore=options.restore,
        streams=options.streams or default_streams(),
        host=host,
        paths=paths,
        targets=(options.target,),
    )
    facts = checked.facts
    tracker = await asyncio.to_thread(tracking.choose, options, facts, host)
    link = TargetLink(options.target, options.port, paths, options.way)
    try:
        opened = await link.open_session(
            facts.open_session(
                migration_id=migration_id,
                attempt=_ATTEMPT,
                host=host,
                streams=options.streams or default_streams(),
                restore=checked.restore,
                dry_run=True,
            )
        )
    finally:
        await link.close()
    workload = facts.workload(lazy=checked.restore == "lazy")
    remaining_bytes = 0 if tracker.name != tracking.NONE else facts.memory_bytes
    predicted = predict(History(), workload, remaining_bytes)
    told = [f"{one.message}; {one.remedy}" for one in checked.cautions]
    told += [f"{one.message}; {one.remedy}" for one in opened.cautions]
    return Forecast(
        container=options.container,
        source=host,
        target=options.target,
        tracker=tracker.name,
        tracker_reason=tracker.reason,
        restore=checked.restore,
        tasks=len(facts.tasks),
        memory_bytes=facts.memory_bytes,
        shared_bytes=facts.shared_bytes,
        rootfs_bytes=facts.rootfs_bytes,
        target_free_memory_bytes=opened.free_memory_bytes,
        predicted_downtime_ms=predicted.downtime_ms,
        warnings=tuple([*told, tracker.warning] if tracker.warning else told),
    )
