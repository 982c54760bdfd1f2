"""What an agent is asked and told about a migration outside of its session's channel: by the peer's
agent, coordinator or recovery (`peer.py`), and by the operator of this host (`oversight.py`)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from migrate import config, oversight, peer, recovery, standing
from migrate.claim import claimant
from migrate.core import messages
from migrate.core.events import TargetEventKind as E
from migrate.core.events import source_reported
from migrate.core.states import SourceState
from migrate.core.states import TargetState as S
from migrate.errors import JournalError, MigrateError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from migrate.agent.custodian import Custodian
    from migrate.agent.session import Session
    from migrate.agent.sessions import Sessions
    from migrate.journal import Journal, JournalWriter, Migration

UNDECIDED = frozenset({S.HELD, S.IN_DOUBT})
COMMITTED = frozenset({SourceState.COMMITTED, SourceState.IN_DOUBT})


class Words:
    """Answers. Errors: MigrateError for a word that is refused."""

    def __init__(
        self,
        sessions: Sessions,
        journal: JournalWriter,
        custodian: Custodian,
        paths: config.HostPaths,
    ) -> None:
        self._sessions = sessions
        self._journal = journal
        self._custodian = custodian
        self._paths = paths

    async def as_source(self, word: messages.SourceMessage, caller: str) -> messages.State:
        """Asked about a migration that leaves, or left, this host: its last record.

        While somebody drives it here, a commit is no evidence: a coordinator whose link breaks as
        it records the commit, and that has told nobody, undoes it (`core/source_machine.py`). Only
        when nobody has the claim it stays, since a recovery goes on from it.
        """
        if not isinstance(word, messages.Ask):
            raise ProtocolError("a source is only asked")

        def read(journal: Journal) -> str | None:
            migration = journal.migration(word.migration_id, "source")
            known = (recovery.facts_of(migration).peer_host, migration.attempt)
            if known != (caller, word.attempt):
                return None
            return journal.state(word.migration_id, "source") or "new"

        # In this order: one that dies in between does no harm, one that begins in between would.
        state = await self._read(read)
        if claimant(self._paths.claim(word.migration_id, "source")) is None:
            self._custodian.look()
        elif state in COMMITTED:
            state = str(SourceState.HELD)
        return messages.State(word.migration_id, word.attempt, state)

    async def as_target(self, word: messages.SourceMessage, caller: str) -> messages.State:
        """Asked or told about a container that comes, or came, here."""
        if not isinstance(word, messages.Ask | messages.Commit | messages.Abort):
            raise ProtocolError(f"{type(word).__name__} is no word about a migration")
        session = self._sessions.find(word.migration_id, caller)
        if session is not None:
            await session.hear(word)
            if not isinstance(word, messages.Ask):
                await session.wait_beyond(UNDECIDED | {S.COMMITTED}, config.HANDOVER_DEADLINE_S)
            state = str(session.driver.settled_state)
            return messages.State(word.migration_id, word.attempt, state)

        def read(journal: Journal) -> str | None:
            migration = journal.migration(word.migration_id, "target")
            if (migration.peer, migration.attempt) != (caller, word.attempt):
                return None
            return journal.state(word.migration_id, "target")

        return messages.State(word.migration_id, word.attempt, await self._read(read))

    async def operate(self, word: messages.Recover) -> messages.Standing | None:
        """This host's operator wants a session that is in doubt to end; None: there is none."""
        session = self._sessions.find(word.migration_id)
        if session is not None:
            return await self._recover_session(session, word)
        migration = self._sessions.unknown.get(word.migration_id)
        return None if migration is None else await self._recover_unknown(migration, word)

    async def overview(self, word: messages.Status | messages.Cancel) -> messages.Overview:
        """This host's operator looks, or has a migration undone that leaves this host: by its
        coordinator, or where that is dead by this agent."""
        if isinstance(word, messages.Cancel):
            await asyncio.to_thread(oversight.begin_cancel, self._paths, word.migration_id)
            self._custodian.look()
        found = await asyncio.to_thread(standing.status, self._paths, word.migration_id)
        return messages.Overview(tuple(found))

    async def _read(self, read: Callable[[Journal], str | None]) -> str:
        try:
            return await self._journal.call(read) or peer.UNKNOWN
        except JournalError:
            return peer.UNKNOWN

    async def _recover_session(self, session: Session, word: messages.Recover) -> messages.Standing:
        """The source's word first; the operator's where it can't be asked, or knows nothing."""
        said, state_there = await self._source_says(word, session.request.attempt, session.peer)
        kind = source_reported(state_there)
        is_undecided = session.driver.state in UNDECIDED
        if is_undecided and kind is not E.SOURCE_UNDECIDED:
            await session.driver.post(kind)
        elif word.owner and (state_there == peer.UNKNOWN or not is_undecided):
            await session.decide(word.owner)
        elif is_undecided:
            return messages.Standing(word.migration_id, str(session.driver.settled_state), said)
        await session.wait_beyond(UNDECIDED | {S.COMMITTED, S.ABORTING}, config.WORD_DEADLINE_S / 2)
        state = str(session.driver.settled_state)
        return messages.Standing(word.migration_id, state, said, session.stopped)

    async def _recover_unknown(
        self, migration: Migration, word: messages.Recover
    ) -> messages.Standing:
        said, _ = await self._source_says(word, migration.attempt, migration.peer)
        state = S.COMMITTED
        if word.owner == "target":
            await self._sessions.keep_unknown(migration)
            state = S.DONE
        elif word.owner == "source":
            await self._sessions.discard_unknown(migration)
            state = S.ABORTED
        return messages.Standing(word.migration_id, str(state), said)

    async def _source_says(
        self, word: messages.Recover, attempt: int, source: str
    ) -> tuple[str, str]:
        """In words for the operator, and the state that it names."""
        ask = messages.Ask(word.migration_id, attempt)
        try:
            said = await peer.say(source, config.CONTROL_PORT, self._paths, "source", ask)
        except MigrateError as error:
            return error.message[: messages.MAX_TEXT], peer.UNKNOWN
        return f"{source} says {said}", said
