"""`migrate agent`: an agent of this host from its start to its end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from migrate import config, heap
from migrate.agent import once
from migrate.agent.app import Agent
from migrate.logs import log_to_stderr

if TYPE_CHECKING:
    from migrate.core.messages import MigrationId
    from migrate.runtimes.base import Runtime


async def serve(
    runtimes: dict[str, Runtime], address: str, port: int, migration_id: MigrationId | None
) -> None:
    """Receive containers; with an id those of that migration alone, on ports that are free, until
    it has ended. Raises MigrateError, TransportError."""
    log_to_stderr(logging.INFO)
    heap.keep_small()
    paths = config.HostPaths()
    if migration_id is None:
        await Agent(paths, runtimes, address, port).serve()
    else:
        await _serve_once(paths.once(migration_id), runtimes, address)


async def _serve_once(paths: config.HostPaths, runtimes: dict[str, Runtime], address: str) -> None:
    serving = Agent(paths, runtimes, address, 0, 0)
    await serving.serve(lambda: once.until_ended(paths, serving))
    if once.is_dismissed(paths):
        await asyncio.to_thread(once.clear, paths)
