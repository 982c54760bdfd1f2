"""Words to an agent that are about no session.

    POST /v1/operator     Recover -> Standing, Drain -> Drained, Status | Cancel -> Overview
    POST /v1/host         Describe -> Description, GiveBack -> GivingBack

The first are an operator's: spoken on the agent's own host with the host's identity, or from
anywhere with an operator's. The second are one host's to another.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

import aiohttp

from migrate import config
from migrate.core import messages
from migrate.core.states import TargetState
from migrate.errors import InDoubt, MigrateError, ProtocolError, UsageError, held_on
from migrate.target_link import unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from transport.identity import TlsIdentity

UNDECIDED = (TargetState.HELD, TargetState.IN_DOUBT, TargetState.COMMITTED)


async def tell_agent(
    message: messages.Recover, identity: TlsIdentity, *, host: str, address: str, port: int
) -> messages.Standing:
    """What has become of it, by the agent of `host`, which listens at `address`.

    Raises Unreachable, ProtocolError, MigrateError where the agent knows of no such migration.
    """
    answer = await say_word(message, identity, "operator", host=host, address=address, port=port)
    if not isinstance(answer, messages.Standing):
        raise ProtocolError(f"the agent answered {type(answer).__name__}", host=host)
    return answer


async def say_word(
    message: messages.SourceMessage,
    identity: TlsIdentity,
    route: Literal["operator", "host"],
    *,
    host: str,
    address: str,
    port: int = config.CONTROL_PORT,
    deadline_s: float = 2 * config.WORD_DEADLINE_S,
) -> messages.TargetMessage:
    """What the agent of `host`, which listens at `address`, answers. Raises Unreachable,
    ProtocolError, UsageError for a word that asks for what can't be, MigrateError where it is
    refused otherwise."""
    connector = aiohttp.TCPConnector(ssl=identity.client_context())
    timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=config.WORD_CONNECT_DEADLINE_S)
    url = f"https://{address}:{port}/v1/{route}"
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            http.post(url, data=messages.encode(message), server_hostname=host) as response,
        ):
            body = await response.content.read(messages.MAX_MESSAGE_BYTES + 1)
            if response.status != 200:
                refused = UsageError if response.status == HTTPStatus.BAD_REQUEST else MigrateError
                raise refused(body.decode(errors="replace")[:200], host=host)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise unreachable(host, port, error) from error
    return messages.decode_from_target(body)


async def recover_at(
    identity: TlsIdentity,
    host: str,
    port: int,
    word: messages.Recover,
    tell: Callable[[str], None],
) -> None:
    """From anywhere: have the agent of `host` finish or undo what it received, and `tell` of it.

    Raises MigrateError: InDoubt when it is held there still.
    """
    standing = await tell_agent(word, identity, host=host, address=host, port=port)
    tell(f"{word.migration_id}: {standing.peer}; {host} says {standing.state}")
    check_standing(standing, host=host, name="the container", source="the source")


def check_standing(standing: messages.Standing, *, host: str, name: str, source: str) -> None:
    """Raises InDoubt when the container (`name`) is still held or frozen on `host`."""
    if standing.stopped:
        raise InDoubt(
            standing.stopped,
            host=host,
            phase=standing.state,
            container_state=f"is frozen on {host}",
            remedy=(
                f"end it and start it anew; or, if it may go on with what it has: migrate recover"
                f" {standing.migration_id} --force-target"
            ),
        )
    if standing.state in UNDECIDED:
        raise InDoubt(
            f"{source} has not said whose {name} is: {standing.peer}",
            host=host,
            phase=standing.state,
            container_state=held_on(host),
            remedy=(
                f"bring {source} back; if it is gone for good: migrate recover"
                f" {standing.migration_id} --force-target (it goes on here) or --force-source"
                " (what is held here ends). Never both, on either host"
            ),
        )
