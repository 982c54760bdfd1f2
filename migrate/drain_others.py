"""The other hosts of a drain: what they could take, what they refuse, and how far they are with
giving back. Each is asked with this host's identity, by words of one host to another
(`operating.py`).
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from migrate import config, drain_survey, policy
from migrate.core import messages
from migrate.core.drain_facts import HostState
from migrate.drain_moves import Look
from migrate.errors import EXIT_REFUSED, MigrateError, SessionRefused, Unreachable
from migrate.identity import own_identity
from migrate.moving import new_migration_id
from migrate.operating import say_word
from migrate.target_link import TargetLink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from migrate.config import HostPaths
    from migrate.preflight import SourceCheck

# Hosts that are asked side by side.
ASKED_MAX: Final = 16


class DrainRefusedError(MigrateError):
    """Nothing was moved, since nothing could be."""

    exit_code = EXIT_REFUSED


class Others:
    """In one event loop."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._host = socket.gethostname()
        # Migrations that a host is known to have begun.
        self._given_back: set[str] = set()

    async def targets(self, named: Sequence[str]) -> list[HostState]:
        """Those of them that this host may send to, as they are. Raises DrainRefusedError if none
        takes anything."""
        wanted = list(dict.fromkeys(named))
        if self._host in wanted or not wanted:
            raise DrainRefusedError(
                "a host can't be emptied to itself", remedy="name other hosts: --to HOST,HOST"
            )
        allowed = drain_survey.may_send(policy.load(self._paths.policy), wanted)
        hosts = list(await asyncio.gather(*(self.describe(one) for one in allowed)))
        if all(one.closed for one in hosts):
            why = "; ".join(f"{one.name}: {one.closed}" for one in hosts) or "by its policy"
            raise DrainRefusedError(
                f"no host takes what is here ({why})", remedy="name others, or uncordon one"
            )
        return hosts

    async def describe(self, host: str) -> HostState:
        """As it is; closed, if it does not say."""
        try:
            told = await self._say(messages.Describe(), host)
        except MigrateError as error:
            return HostState(host, 0, 0.0, closed=error.message)
        if not isinstance(told, messages.Description) or told.host != host:
            return HostState(host, 0, 0.0, closed="it answers in another name")
        return drain_survey.host_state(told)

    async def refusals(
        self, pairs: Sequence[tuple[str, str]], checks: Mapping[str, SourceCheck]
    ) -> dict[tuple[str, str], str]:
        """Those pairs of a container and a target that the target refuses, and why: each is asked
        as a dry run asks."""
        limit = asyncio.Semaphore(ASKED_MAX)

        async def ask(container: str, target: str) -> str:
            check = checks[container]
            async with limit:
                link = TargetLink(target, config.CONTROL_PORT, self._paths)
                try:
                    await link.open_session(
                        check.facts.open_session(
                            migration_id=new_migration_id(),
                            attempt=1,
                            host=self._host,
                            streams=1,
                            restore=check.restore,
                            dry_run=True,
                        )
                    )
                except SessionRefused as error:
                    return "; ".join(message for _, message, _ in error.refusals)
                except MigrateError as error:
                    return error.message
                finally:
                    await link.close()
            return ""

        answers = await asyncio.gather(*(ask(*pair) for pair in pairs))
        return {pair: why for pair, why in zip(pairs, answers, strict=True) if why}

    async def give_back(self, word: messages.GiveBack, host: str) -> Look:
        """How far `host` is with giving a container back; it begins when it is asked first."""
        try:
            answer = await self._say(word, host)
        except Unreachable as error:
            # Whether it has begun is for that host's journal; an undrain can be repeated.
            is_begun = word.migration_id in self._given_back
            return Look("held" if is_begun else "undone", error.message)
        except MigrateError as error:
            return Look("undone", error.message)
        self._given_back.add(word.migration_id)
        if not isinstance(answer, messages.GivingBack):
            return Look("undone", f"{host} answered {type(answer).__name__}")
        return Look(answer.state, answer.why, answer.downtime_ms)

    async def _say(self, word: messages.SourceMessage, host: str) -> messages.TargetMessage:
        identity = own_identity(self._paths)
        return await say_word(word, identity, "host", host=host, address=host)
