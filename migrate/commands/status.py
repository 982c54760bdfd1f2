"""`migrate status` and `cancel`: the migrations and the drain of this host, or of another one."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

import click
import msgspec

from migrate import config, drain_report, drain_state, standing
from migrate.commands.asked import at_host
from migrate.core import messages
from migrate.errors import MigrateError, UsageError
from migrate.logs import log_to_stderr
from migrate.runtimes import known

if TYPE_CHECKING:
    from migrate.commands.asked import Asked

_POLL_S: Final = 0.5


@click.command("status")
@click.argument("migration_id", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON array of objects.")
@at_host
def status(migration_id: str | None, as_json: bool, asked: Asked | None) -> None:
    """Show the migrations of this host, those under way and the latest that ended; its drain."""
    found, drained = _here(migration_id) if asked is None else _there(asked, migration_id)
    has_drain = migration_id is None and drained.phase != "none"
    if has_drain and not as_json:
        click.echo("\n".join(drain_report.lines(drained)))
    if as_json:
        click.echo(msgspec.json.encode([*found, drained] if has_drain else found).decode())
    elif found:
        click.echo("\n".join(standing.status_lines(found)))
    else:
        click.echo(f"no migration is known {'here' if asked is None else f'on {asked.host}'}")


@click.command("cancel")
@click.argument("migration_id")
@at_host
def cancel(migration_id: str, asked: Asked | None) -> None:
    """End a migration that is not committed; its container stays where it is. By the id of the
    host's drain, or "drain": it begins no more moves, and those under way end."""
    from migrate import oversight

    log_to_stderr(logging.WARNING)
    drained = _drained(asked)
    if migration_id in ("drain", drained.drain_id):
        if not drained.is_driven:
            raise UsageError(f"no drain of {drained.host} is under way", remedy="migrate status")
        if asked is None:
            drain_state.stop(config.HostPaths())
        else:
            asked.say(messages.Drain("stop"), messages.Drained)
        click.echo("no more moves begin; those under way end: migrate status")
    elif asked is None:
        work = oversight.cancel(config.HostPaths(), known.drivers(), migration_id)
        click.echo(asyncio.run(work))
    else:
        click.echo(_cancel_there(asked, migration_id))


def _here(migration_id: str | None) -> tuple[list[messages.Side], messages.Drained]:
    return standing.status(config.HostPaths(), migration_id), _drained(None)


def _there(asked: Asked, migration_id: str | None) -> tuple[list[messages.Side], messages.Drained]:
    overview = asked.say(messages.Status(migration_id), messages.Overview)
    return list(overview.migrations), _drained(asked)


def _drained(asked: Asked | None) -> messages.Drained:
    if asked is None:
        return drain_state.read(config.HostPaths())
    return asked.say(messages.Drain("show"), messages.Drained)


def _cancel_there(asked: Asked, migration_id: str) -> str:
    """What has become of it. Raises MigrateError."""
    from migrate import oversight

    limit_s = time.monotonic() + config.UNDO_DEADLINE_S
    overview = asked.say(messages.Cancel(migration_id), messages.Overview)
    while True:
        side = oversight.source_side(overview.migrations)
        if side.ended:
            return oversight.what_became(side, asked.host)
        if time.monotonic() > limit_s:
            raise MigrateError(
                f"{migration_id} was told to cancel and has not ended",
                host=asked.host,
                remedy=f"migrate recover, on {asked.host}",
            )
        time.sleep(_POLL_S)
        overview = asked.say(messages.Status(migration_id), messages.Overview)
