"""Whose agent a command asks: that of this host, or with an operator's identity that of any."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrate import config
from migrate.commands.ca import at_fleet, operator_paths
from migrate.errors import ProtocolError, UsageError
from migrate.identity import identity_errors, own_identity
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from migrate.core import messages
    from transport.identity import TlsIdentity

_Command = TypeVar("_Command", bound="Callable[..., None]")
_Answer = TypeVar("_Answer", bound="messages.TargetMessage")


class Asked:
    """A host whose agent is asked."""

    def __init__(self, host: str, identity: TlsIdentity, address: str) -> None:
        self.host = host
        self._identity = identity
        self._address = address

    def say(
        self,
        word: messages.SourceMessage,
        expected: type[_Answer],
        *,
        deadline_s: float = 2 * config.WORD_DEADLINE_S,
    ) -> _Answer:
        """What it answers. Raises MigrateError."""
        # What speaks to agents takes half a second of a processor to import, and `migrate status`
        # of this host needs none of it.
        from migrate.operating import say_word

        answer = asyncio.run(
            say_word(
                word,
                self._identity,
                "operator",
                host=self.host,
                address=self._address,
                deadline_s=deadline_s,
            )
        )
        if not isinstance(answer, expected):
            raise ProtocolError(f"the agent answered {type(answer).__name__}", host=self.host)
        return answer


_as_operator = click.option("--as", "name", help="An operator's name (migrate ca operator).")


def of_host(command: _Command) -> _Command:
    """Give `command` the host that it asks, its argument or this one, as `asked`."""

    @click.argument("host", required=False)
    @_as_operator
    @at_fleet
    @functools.wraps(command)
    def wrapped(*, host: str | None, name: str | None, fleet: Path, **others: Any) -> None:
        command(asked=_asked(host, name, fleet), **others)

    return wrapped  # type: ignore[return-value]


def at_host(command: _Command) -> _Command:
    """Give `command` the host of its `--host` as `asked`; None if there is none, for what needs no
    agent here."""

    @click.option("--host", help="Ask the agent of another host.")
    @_as_operator
    @at_fleet
    @functools.wraps(command)
    def wrapped(*, host: str | None, name: str | None, fleet: Path, **others: Any) -> None:
        command(asked=None if host is None else _asked(host, name, fleet), **others)

    return wrapped  # type: ignore[return-value]


def _asked(host: str | None, name: str | None, fleet: Path) -> Asked:
    here = socket.gethostname()
    if name is not None:
        with identity_errors():
            identity = HostIdentity.load(operator_paths(fleet, name))
        return Asked(host or here, identity, host or here)
    if host in (None, here):
        return Asked(here, own_identity(config.HostPaths()), "127.0.0.1")
    raise UsageError(
        f"{host} is another host", remedy="run it there, or say who you are: --as NAME"
    )
