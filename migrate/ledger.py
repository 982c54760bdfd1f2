"""What the driver of one migration writes of it into the journal, also what it could not at once.

A driver may go on though a state could not be recorded, where a new process would do the same
without the record. The journal takes a record only behind the one that leads to it, so such a state
is owed: it is written before the next one, as soon as there is room, or the lock is free, again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrate.journal import JournalWriter, Role


class Ledger:
    """See the module. For one task at a time; the time of a record is that of its writing."""

    def __init__(self, journal: JournalWriter, migration_id: str, role: Role) -> None:
        self._journal = journal
        self._migration_id = migration_id
        self._role: Role = role
        self._owed: list[tuple[str, str]] = []

    async def record(self, state: str, event: str) -> None:
        """Append a transition behind whatever is owed; returns when it is on disk. Raises
        JournalError."""
        await self.settle()
        await self._journal.record(self._migration_id, self._role, state, event)

    def owe(self, state: str, event: str) -> None:
        """Go on without the record of a transition: it is made before the next one."""
        self._owed.append((state, event))

    async def settle(self) -> None:
        """Append what is owed. Raises JournalError, with the rest of it owed still."""
        while self._owed:
            await self._journal.record(self._migration_id, self._role, *self._owed[0])
            del self._owed[0]
