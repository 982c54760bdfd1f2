"""Looks after what dead processes of this host have left: see `recovery.py`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from migrate import config
from migrate.agent import criu_roots
from migrate.errors import JournalError
from migrate.recovery import recover_orphans, sweep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migrate.journal import JournalWriter
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()


class Custodian:
    """Recovers in rounds. `look` makes the next round begin now."""

    def __init__(
        self, journal: JournalWriter, runtimes: Mapping[str, Runtime], paths: config.HostPaths
    ) -> None:
        self._journal = journal
        self._runtimes = runtimes
        self._paths = paths
        self._wanted = asyncio.Event()
        self._told: dict[str, str] = {}

    def look(self) -> None:
        """Somebody asks for a migration that nobody drives."""
        self._wanted.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._round()
            except JournalError as error:
                self._tell("journal", str(error))
            self._wanted.clear()
            try:
                async with asyncio.timeout(config.RECOVERY_PERIOD_S):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    async def _round(self) -> None:
        """One look at all of them. None is waited for: who claims it next shall find it free."""
        left = await recover_orphans(self._journal, self._runtimes, self._paths, patience_s=0)
        await sweep(self._journal, self._paths)
        await asyncio.to_thread(criu_roots.sweep)
        for migration, error in left:
            self._tell(migration.migration_id, str(error))
        for migration_id in self._told.keys() - {one.migration_id for one, _ in left}:
            del self._told[migration_id]

    def _tell(self, migration_id: str, why: str) -> None:
        """Say what stays, once for each reason."""
        if self._told.get(migration_id) != why:
            self._told[migration_id] = why
            log.warning("held", migration=migration_id, role="source", why=why)
