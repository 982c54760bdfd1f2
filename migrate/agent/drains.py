"""What the agent does for drains: begins them, tells of them, and gives back what came from others.

The drain itself is a process of its own (`drain.py`), which an agent that ends or begins anew does
not touch.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from typing import TYPE_CHECKING, Final

import msgspec

from migrate import cordon, drain_state, drain_survey
from migrate.config import BANDWIDTH_MIB_S_MIN, DRAIN_START_DEADLINE_S, SESSIONS_MAX
from migrate.core import messages
from migrate.core.states import TargetState
from migrate.drain_moves import Moves
from migrate.errors import JournalError, MigrateError, ProtocolError, UsageError
from migrate.processes import Outliving, module_command, tail
from transport import sealed_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migrate.config import HostPaths
    from migrate.journal import Journal, JournalWriter
    from migrate.policy import PolicyFile
    from migrate.runtimes.base import Runtime

_POLL_S: Final = 0.05
_LOG: Final = "drain.log"
# A container came here with one of the latest of these, or it is too long ago to be given back.
_HISTORY_MAX: Final = 1000


class Drains:
    """Errors: MigrateError for a word that is refused."""

    def __init__(
        self,
        paths: HostPaths,
        runtimes: Mapping[str, Runtime],
        journal: JournalWriter,
        policy: PolicyFile,
    ) -> None:
        self._paths = paths
        self._runtimes = runtimes
        self._journal = journal
        self._policy = policy
        self._moves = Moves(paths)
        self._given_back: dict[str, str] = {}
        self._process: Outliving | None = None
        self._beginning = asyncio.Lock()

    async def asked(self, word: messages.Drain) -> messages.Drained:
        """By an operator, or this host."""
        match word.act:
            case "stop":
                drain_state.stop(self._paths)
            case "cordon":
                await asyncio.to_thread(cordon.put, self._paths, cordon.Cordon())
            case "uncordon":
                await asyncio.to_thread(cordon.lift, self._paths)
            case "start" | "resume" | "home":
                async with self._beginning:
                    await self._begin(word)
        return await asyncio.to_thread(drain_state.read, self._paths, dry_run=word.dry_run)

    async def told(
        self, word: messages.SourceMessage, caller: str
    ) -> messages.Description | messages.GivingBack:
        """By another host."""
        match word:
            case messages.Describe():
                rules = self._policy.current()
                return await asyncio.to_thread(
                    drain_survey.describe, self._paths, self._runtimes, rules
                )
            case messages.GiveBack():
                return await self._give_back(word, caller)
        raise ProtocolError(f"{type(word).__name__} is no word of one host to another")

    # ---- drains of this host ----

    async def _begin(self, word: messages.Drain) -> None:
        former = await asyncio.to_thread(drain_state.read, self._paths)
        if former.is_driven:
            raise UsageError(
                f"{former.drain_id or 'a drain'} is under way on {former.host}",
                remedy="wait for it, or: migrate cancel drain",
            )
        if word.act == "resume":
            if former.phase == "none":
                raise UsageError(f"there is no drain of {former.host} to go on with")
            word = former.asked
        share_mib_s = (word.bandwidth_mib_s or float("inf")) / word.parallel
        if share_mib_s < BANDWIDTH_MIB_S_MIN:
            raise UsageError(
                f"{word.parallel} moves can't share {word.bandwidth_mib_s:g} MiB/s",
                remedy=f"each needs {BANDWIDTH_MIB_S_MIN} of them",
            )
        drain_id = f"drain-{secrets.token_hex(4)}"
        sealed_files.make_directory(self._paths.drain)
        log_path = self._paths.drain / _LOG
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(log_path, flags, 0o600)
        try:
            order = json.dumps(msgspec.to_builtins(word))
            command = module_command("migrate.drain", drain_id, order)
            self._process = Outliving(command, stderr=log)
        finally:
            os.close(log)
        limit_s = time.monotonic() + DRAIN_START_DEADLINE_S
        while drain_state.read(self._paths, dry_run=word.dry_run).drain_id != drain_id:
            if self._process.returncode is not None or time.monotonic() > limit_s:
                raise MigrateError(f"the drain does not start: {tail(log_path, 300)}")
            await asyncio.sleep(_POLL_S)

    # ---- drains of others ----

    async def _give_back(self, word: messages.GiveBack, caller: str) -> messages.GivingBack:
        """A container goes back to the host that it came from, and to no other: only that may ask,
        and only for what it has sent."""
        begun = self._given_back.get(word.migration_id)
        if begun is None:
            begun = await self._begun_before(word.migration_id)
        if begun is None:
            await self._check_came_from(caller, word.container)
            looks = [await asyncio.to_thread(self._moves.look, one) for one in self._given_back]
            if sum(one.state == "moving" for one in looks) >= SESSIONS_MAX:
                raise MigrateError(f"{SESSIONS_MAX} containers are being given back already")
            about = (word.migration_id, word.container, caller, word.bandwidth_mib_s)
            await asyncio.to_thread(self._moves.begin, *about)
            begun = caller
        if begun != caller:
            raise ProtocolError(f"{word.migration_id} is no migration to {caller}")
        self._given_back[word.migration_id] = caller
        look = await asyncio.to_thread(self._moves.look, word.migration_id, word.bandwidth_mib_s)
        return messages.GivingBack(word.migration_id, look.state, look.why, look.downtime_ms)

    async def _begun_before(self, migration_id: str) -> str | None:
        """To which host it goes, if an agent before this one has begun it."""

        def read(journal: Journal) -> str | None:
            try:
                return journal.migration(migration_id, "source").peer
            except JournalError:
                return None

        return await self._journal.call(read)

    async def _check_came_from(self, caller: str, container: str) -> None:
        def read(journal: Journal) -> bool:
            came = [
                (one.peer, records[-1].state if records else "")
                for one, records in journal.history(_HISTORY_MAX)
                if one.role == "target" and one.container == container
            ]
            return bool(came) and came[-1] in (
                (caller, TargetState.DONE),
                (caller, TargetState.RUNNING),
            )

        if not await self._journal.call(read):
            raise MigrateError(f"{container} did not come here from {caller}")
