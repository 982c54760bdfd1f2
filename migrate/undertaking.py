"""What a coordinator has from its first act to its last: the journal, its claims, its attempts.

Before it begins, what dead coordinators of this host have left is recovered. Errors of the packages
below become MigrateErrors here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from criu_glue.errors import CriuGlueError
from migrate import config, recovery
from migrate.claim import Claim, claimant
from migrate.errors import (
    DeadlineExceeded,
    JournalError,
    JournalUnusable,
    MigrateError,
    TransferFailed,
    UsageError,
)
from migrate.journal import JournalWriter
from migrate.ledger import Ledger
from transport.errors import TargetFullError, TransportError

if TYPE_CHECKING:
    from migrate.runtimes.base import Runtime


BELOW: Final = (TransportError, CriuGlueError, TimeoutError)
"""Errors that `of_below` translates."""


def of_below(
    error: TransportError | CriuGlueError | TimeoutError, host: str, target: str, doing: str
) -> MigrateError:
    """What an error of another package means for what `host` sends to `target`."""
    match error:
        case TargetFullError():
            remedy = f"free memory on {target}, or try again when the container has less"
            return TransferFailed(str(error), host=target, remedy=remedy)
        case TransportError():
            return TransferFailed(str(error), host=target)
        case CriuGlueError():
            return MigrateError(str(error), host=host)
        case _:
            return DeadlineExceeded(f"{doing} took too long", host=host)


class Entry:
    """One migration in the journal of this host, which this process drives: its attempt, and a
    ledger of its states."""

    def __init__(
        self, journal: JournalWriter, migration_id: str, attempt: int, host: str, claim: Claim
    ) -> None:
        self.migration_id = migration_id
        self.attempt = attempt
        self.host = host
        self.ledger = Ledger(journal, migration_id, "source")
        self._journal = journal
        self._claim = claim

    async def note(self, **facts: Any) -> None:
        """Add to what is kept for a recovery. Raises JournalError."""
        await self._journal.note(self.migration_id, "source", **facts)

    def release(self) -> None:
        """It is in nobody's hands any more."""
        self._claim.release()


class Undertaking:
    """See the module: `begin`, and `close` in any case. Until `begin` there is nothing."""

    journal: JournalWriter
    entry: Entry

    def __init__(
        self, migration_id: str, runtime: Runtime, paths: config.HostPaths, host: str
    ) -> None:
        self.migration_id = migration_id
        self._runtime = runtime
        self._paths = paths
        self._host = host
        self._opened: JournalWriter | None = None
        self._entries: list[Entry] = []

    @property
    def ledger(self) -> Ledger:
        """Of the migration that it was begun for."""
        return self.entry.ledger

    @property
    def attempt(self) -> int:
        """Of the same."""
        return self.entry.attempt

    async def begin(self, container: str, target: str) -> None:
        """Raises JournalUnusable, UsageError where the container is in other hands, and what kept
        a former migration from being settled. Nothing is touched then."""
        try:
            await self._begin(container, target)
        except JournalError as error:
            raise JournalUnusable(
                error.message, host=self._host, phase="preflight", remedy=error.remedy
            ) from error

    async def close(self) -> None:
        """Idempotent."""
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)
            self._opened = None
        while self._entries:
            self._entries.pop().release()

    async def enter(self, migration_id: str, container: str, target: str) -> Entry:
        """One more migration of the same undertaking. Raises JournalError, and MigrateError where
        it can't be claimed."""
        claim = Claim.take(self._paths.claim(migration_id, "source"), "coordinator")
        attempt = await self.journal.claim_attempt()
        entry = Entry(self.journal, migration_id, attempt, target, claim)
        self._entries.append(entry)
        await self.journal.begin(
            migration_id,
            "source",
            attempt=attempt,
            container=container,
            runtime=self._runtime.name,
            peer=target,
        )
        return entry

    async def _begin(self, container: str, target: str) -> None:
        self._opened = self.journal = await asyncio.to_thread(JournalWriter, self._paths.journal)
        await self._settle_former(container)
        self.entry = await self.enter(self.migration_id, container, target)

    async def _settle_former(self, container: str) -> None:
        """Recover what dead coordinators of this host have left; refuse a second migration of the
        same container, and one of a container whose owner is not known."""
        runtimes = {self._runtime.name: self._runtime}
        left = await recovery.recover_orphans(
            self.journal,
            runtimes,
            self._paths,
            patience_s=config.FORMER_PATIENCE_S,
            container=container,
        )
        await recovery.sweep(self.journal, self._paths)
        for migration, error in left:
            if migration.container == container:
                raise error
        for migration, _ in await self.journal.call(lambda journal: journal.unfinished()):
            is_ours = migration.role == "source" and migration.container == container
            driver = claimant(self._paths.claim(migration.migration_id, "source"))
            if is_ours and driver is not None and driver.kind != "coordinator":
                raise UsageError(
                    f"{migration.container} is in the hands of {driver}",
                    host=self._host,
                    remedy=f"try again, or see: migrate status {migration.migration_id}",
                )
            if is_ours and driver is not None:
                raise UsageError(
                    f"{migration.container} is being migrated to {migration.peer} already,"
                    f" by {driver}",
                    host=self._host,
                    remedy=f"wait for it, or run: migrate cancel {migration.migration_id}",
                )
