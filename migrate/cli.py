"""The command line: `migrate CONTAINER --to HOST`, `migrate agent`, and what an operator needs
when a migration does not end by itself: `status`, `log`, `cancel`, `recover`.

exit code   0 done, 1 failed and undone, 2 refused or wrong usage, 3 held, 4 some of the copies:
            `errors.py`

What a command works with is imported when it is called: all of it takes half a second of a
processor, most commands need little of it, and the words of `--help` nothing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from criu_glue.no_core import forbid_cores
from migrate import config
from migrate.commands.copied_how import copied_how, host_and_port
from migrate.commands.over_ssh import over_ssh
from migrate.errors import EXIT_FAILED, MigrateError
from migrate.host_checks import raise_descriptor_limit
from migrate.runtimes import known
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from migrate.recovery import Owner
    from transport.ssh.asking import Asking

_ELSEWHERE: Final = {
    **{name: name for name in ("ca", "clone", "fill", "hosts", "identity", "once")},
    **{name: name for name in ("operator", "policy", "service", "verify")},
    **dict.fromkeys(("cordon", "drain-node", "uncordon", "undrain"), "drain"),
    **dict.fromkeys(("cancel", "status"), "status"),
}
"""Commands that a module of `migrate/commands` has."""


class _Commands(click.Group):
    """`migrate NAME …` means `migrate container NAME …`, unless NAME is a command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = import_module(f"migrate.commands.{_ELSEWHERE[cmd_name]}")
        found: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx):
            args = ["container", *args]
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A container that is called like a command: migrate container NAME --to HOST",
)
@click.version_option(package_name="dolly", message="%(version)s")
def cli() -> None:
    """Move running containers between hosts.

    migrate CONTAINER --to HOST   moves a container, now (migrate container --help).
    """


@cli.command("log")
@click.argument("migration_id")
def show_log(migration_id: str) -> None:
    """Show what the journal of this host has on a migration."""
    from migrate import standing

    click.echo("\n".join(standing.log_lines(config.HostPaths(), migration_id)))


@cli.command()
@click.argument("migration_id", required=False)
@click.option("--force-source", "owner", flag_value="source", help="The source keeps it.")
@click.option("--force-target", "owner", flag_value="target", help="The target has it.")
@over_ssh
def recover(migration_id: str | None, owner: Owner | None, asking: Asking) -> None:
    """Finish or undo migrations that nobody drives.

    Shows what each side says and does what is safe. The --force options count only where the other
    host can't be asked, and need an id: of a container that was forced on both hosts there are two.
    """
    from migrate import once, oversight
    from migrate.logs import log_to_stderr

    if owner is not None and migration_id is None:
        raise click.UsageError("--force-source and --force-target need the migration's id")
    log_to_stderr(logging.WARNING)
    paths = config.HostPaths()
    asyncio.run(oversight.recover(paths, known.drivers(), migration_id, owner, click.echo))
    once.sweep(paths, asking, click.echo)


@cli.command()
@click.argument("name")
@click.option(
    "--to",
    "target",
    required=True,
    help="The host to move to, NAME or NAME:PORT; USER@HOST[:PORT] for one that is in no fleet,"
    " by SSH.",
)
@copied_how
@click.option(
    "--silence",
    "silence_s",
    type=click.FloatRange(config.FROZEN_PING_S, config.FROZEN_SILENCE_S_MAX),
    default=config.FROZEN_SILENCE_S,
    show_default=True,
    show_envvar=True,
    envvar="MIGRATE_SILENCE",
    metavar="SECONDS",
    help="Undo the migration when the target says nothing for so long while the container stands"
    " still: more for hosts that are short of processors.",
)
@click.option("--dry-run", "only_check", is_flag=True, help="Check both hosts, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Progress and report as JSON lines.")
@click.option(
    "--report", "report_path", type=click.Path(path_type=Path), help="Write the report here."
)
@click.option("--id", "migration_id", hidden=True, help="Of a move that a drain has begun.")
@click.option(
    "--bandwidth-told", type=click.Path(path_type=Path), hidden=True, help="By a drain, in a file."
)
@over_ssh
def container(
    name: str,
    target: str,
    runtime: str,
    only_check: bool,
    as_json: bool,
    report_path: Path | None,
    migration_id: str | None,
    asking: Asking,
    **asked: Any,
) -> None:
    """Move the container NAME to another host while it runs."""
    if report_path is not None and not report_path.parent.is_dir():
        raise click.BadParameter(f"{report_path.parent} is no directory", param_hint="--report")
    from migrate.moving import Telling, move, move_once

    telling = Telling(only_check=only_check, as_json=as_json, report_path=report_path)
    driver = known.having(name) if runtime == "auto" else known.drivers()[runtime]
    if "@" in target:
        move_once(validate_name(name), target, asked, driver, asking, telling)
    else:
        host, port = host_and_port(target)
        move(validate_name(name), host, port, asked, driver, telling, migration_id)


@cli.command()
@click.option("--address", default="0.0.0.0", show_default=True, help="Where to listen.")  # noqa: S104
@click.option("--port", type=click.IntRange(1, 65535), default=config.CONTROL_PORT)
@click.option("--once", "migration_id", hidden=True, help="For this migration alone.")
def agent(address: str, port: int, migration_id: str | None) -> None:
    """Receive containers on this host."""
    from migrate.agent.serving import serve

    asyncio.run(serve(known.drivers(), address, port, migration_id))


def main() -> None:
    """Run the command line; every error that is foreseen ends in its message and exit code."""
    forbid_cores()
    raise_descriptor_limit()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(EXIT_FAILED)
    except MigrateError as error:
        click.echo(error.render(), err=True)
        sys.exit(error.exit_code)
