"""The options of every command that reaches a host by SSH."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrate.commands.terminal import terminal
from transport.ssh.asking import Asking

if TYPE_CHECKING:
    from collections.abc import Callable

_Command = TypeVar("_Command", bound="Callable[..., None]")


def over_ssh(command: _Command) -> _Command:
    """Give `command` the options of a connection by SSH; it gets `asking`."""

    @click.option("--accept-new", is_flag=True, help="Trust hosts that no known_hosts has.")
    @click.option(
        "--ssh-config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Instead of ~/.ssh/config.",
    )
    @functools.wraps(command)
    def wrapped(*, accept_new: bool, ssh_config: Path | None, **others: Any) -> None:
        command(asking=Asking(terminal(), accept_new, ssh_config), **others)

    return wrapped  # type: ignore[return-value]
