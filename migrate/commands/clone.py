"""`migrate clone`: a copy of a running container, memory and all, on another host or beside it."""

from __future__ import annotations

import ipaddress
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate import config
from migrate.commands.copied_how import copied_how, host_and_port
from migrate.errors import UsageError
from migrate.logs import log_to_stderr
from migrate.options import Options
from migrate.report import clone_table
from migrate.runtimes import known
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from migrate.core.messages import CopySignal
    from migrate.network_identity import IP


@click.command()
@click.argument("name")
@click.option("--to", "target", required=True, metavar="HOST", help="Where the copy is to run.")
@click.option(
    "--name",
    "copy_name",
    metavar="NAME",
    help="Of the copy, also its host name; NAME-1 if not given.",
)
@click.option(
    "--ip",
    "addresses",
    multiple=True,
    metavar="ADDRESS",
    help="The copy's own, in place of the container's of that family, whose prefix it gets.",
)
@click.option(
    "--hook",
    metavar="NAME",
    default="",
    help="What the copy meets before its first instruction: a program, or a directory of some, in"
    " /etc/migrate/clone.d of the target.",
)
@click.option(
    "--signal",
    "copy_signal",
    type=click.Choice(["HUP", "USR1", "USR2"]),
    help="Sent to the copy's first task as soon as it runs.",
)
@copied_how
@click.option("--json", "as_json", is_flag=True, help="Progress and report as JSON lines.")
@click.option(
    "--report", "report_path", type=click.Path(path_type=Path), help="Write the report here."
)
def clone(
    name: str,
    target: str,
    copy_name: str | None,
    addresses: tuple[str, ...],
    hook: str,
    copy_signal: CopySignal | None,
    runtime: str,
    as_json: bool,
    report_path: Path | None,
    **asked: Any,
) -> None:
    """Make a copy of the container NAME, which runs on, on another host or beside it.

    The container stands still for a moment and keeps its connections. The copy goes on from that
    moment under a name and addresses of its own; its connections are closed, its listening sockets
    listen. What no copy can have of its own are secrets that the original has in its memory.
    """
    from migrate.cloning import Cloning, Wanted
    from migrate.moving import Telling, carry_out, new_migration_id

    if report_path is not None and not report_path.parent.is_dir():
        raise click.BadParameter(f"{report_path.parent} is no directory", param_hint="--report")
    if "," in target or "@" in target:
        raise UsageError(
            f"no copy can be made on {target}: it has to be one host of the fleet",
            remedy="make one copy after the other",
        )
    log_to_stderr(logging.WARNING)
    driver = known.having(name) if runtime == "auto" else known.drivers()[runtime]
    host, port = host_and_port(target)
    options = Options(validate_name(name), host, port, **asked)
    wanted = Wanted(
        validate_name(copy_name or f"{name}-1"),
        tuple(map(_address, addresses)),
        validate_name(hook) if hook else "",
        copy_signal,
    )
    make = partial(
        Cloning, options, wanted, driver, config.HostPaths(), migration_id=new_migration_id()
    )
    carry_out(make, Telling(False, as_json, report_path), clone_table)


def _address(text: str) -> IP:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--ip") from error
