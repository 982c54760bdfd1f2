"""`migrate once`: what a migration to a host that is in no fleet asks of that host, over SSH."""

from __future__ import annotations

import click
import msgspec

from migrate import config
from migrate.agent import once as agents
from migrate.core.messages import MigrationId
from migrate.errors import UsageError


@click.group("once", hidden=True)
def once() -> None:
    """An agent for one migration alone (used by `migrate CONTAINER --to USER@HOST`)."""


@once.command("start")
@click.argument("migration_id")
def start(migration_id: str) -> None:
    """Start the agent, if it does not run, and say where it listens."""
    _answer(agents.start(_paths(migration_id), migration_id))


@once.command("stop")
@click.argument("migration_id")
def stop(migration_id: str) -> None:
    """End it, and remove all that it had, unless it holds a container."""
    _answer(agents.stop(_paths(migration_id)))


def _paths(migration_id: str) -> config.HostPaths:
    try:
        return config.HostPaths().once(msgspec.convert(migration_id, MigrationId))
    except msgspec.ValidationError as error:
        raise UsageError(f"{migration_id[:64]!r} is no migration's id") from error


def _answer(what: object) -> None:
    click.echo(msgspec.json.encode(what).decode())
