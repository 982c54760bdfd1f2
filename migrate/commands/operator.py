"""`migrate operator`: what a person with an identity of their own can say to agents."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from migrate import config, operating
from migrate.commands.ca import at_fleet, operator_paths
from migrate.core import messages
from migrate.identity import identity_errors
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.recovery import Owner


@click.group("operator")
def operator() -> None:
    """Speak to the agents of hosts with an operator's identity (migrate ca operator)."""


@operator.command("recover")
@click.argument("host")
@click.argument("migration_id")
@click.option("--as", "name", required=True, help="The operator's name.")
@click.option("--port", type=click.IntRange(1, 65535), default=config.CONTROL_PORT)
@click.option("--force-source", "owner", flag_value="source", help="The source keeps it.")
@click.option("--force-target", "owner", flag_value="target", help="The target has it.")
@at_fleet
def recover(
    host: str, migration_id: str, name: str, port: int, owner: Owner | None, fleet: Path
) -> None:
    """Have the agent of HOST, the target, finish or undo a migration that is in doubt.

    As migrate recover does on that host: the --force options count only where the source can't be
    asked.
    """
    with identity_errors():
        identity = HostIdentity.load(operator_paths(fleet, name))
    word = messages.Recover(migration_id, owner or "")
    asyncio.run(operating.recover_at(identity, host, port, word, click.echo))
