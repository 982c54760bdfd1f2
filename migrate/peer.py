"""A word to the agent of another host about one migration, outside of any session.

    POST /v1/migrations/ID/ROLE     Ask | Commit | Abort -> State

ROLE is the side that is spoken to. Its agent answers from its session or from its journal, so a
side that has crashed and come back can be asked all the same, and a side that has crashed can ask.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import aiohttp

from migrate import config, once
from migrate.core import messages
from migrate.errors import ProtocolError
from migrate.identity import own_identity
from migrate.target_link import unreachable

if TYPE_CHECKING:
    from migrate.journal import Role
    from migrate.way import Way

# What is answered about a migration that a host knows nothing of: no evidence for anything.
UNKNOWN = "unknown"


async def say(
    host: str,
    port: int,
    paths: config.HostPaths,
    role: Role,
    message: messages.Ask | messages.Commit | messages.Abort,
    way: Way | None = None,
) -> str:
    """The state that the peer answers with, UNKNOWN when it knows of no such migration.

    way: to the peer; if it is not known, it is found, also to a host that is in no fleet
    (`once.py`). Raises Unreachable, ProtocolError, MigrateError.
    """
    if way is not None:
        return await _say(host, port, paths, role, message, way)
    with contextlib.ExitStack() as stack:
        found, own = await asyncio.to_thread(
            once.way_back, paths, message.migration_id, port, stack
        )
        return await _say(host, port, own, role, message, found)


async def _say(
    host: str,
    port: int,
    paths: config.HostPaths,
    role: Role,
    message: messages.Ask | messages.Commit | messages.Abort,
    way: Way,
) -> str:
    url = f"https://{host}:{port}/v1/migrations/{message.migration_id}/{role}"
    connector = aiohttp.TCPConnector(
        ssl=own_identity(paths).client_context(), resolver=way.resolver()
    )
    timeout = aiohttp.ClientTimeout(
        total=config.WORD_DEADLINE_S, sock_connect=config.WORD_CONNECT_DEADLINE_S
    )
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            http.post(url, data=messages.encode(message)) as response,
        ):
            body = await response.content.read(messages.MAX_MESSAGE_BYTES + 1)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise unreachable(host, port, error) from error
    answer = messages.decode_from_target(body)
    if not isinstance(answer, messages.State) or answer.migration_id != message.migration_id:
        raise ProtocolError(f"{host} answered {type(answer).__name__}", host=host)
    return answer.name
