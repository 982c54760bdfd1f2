"""`migrate clone`: copies of a running container, memory and all, on other hosts or beside it."""

from __future__ import annotations

import logging
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate import config
from migrate.commands.copied_how import copied_how, host_and_port
from migrate.errors import CopiesMissing, UsageError, runs_on
from migrate.logs import log_to_stderr
from migrate.options import Options
from migrate.report import clone_table
from migrate.runtimes import known
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from migrate.core.messages import CopySignal


@click.command()
@click.argument("name")
@click.option(
    "--to",
    "targets",
    required=True,
    metavar="HOST[,HOST…]",
    help="Where the copies are to run, by turns; this host's own name: beside the original.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    help="How many copies, of all hosts together; one on each if not given.",
)
@click.option(
    "--name",
    "pattern",
    metavar="NAME",
    help="Of the copy, also its host name. {n} stands for its number; NAME-{n} if not given.",
)
@click.option(
    "--ip",
    "addresses",
    multiple=True,
    metavar="ADDRESS|FIRST-LAST",
    help="The copies' own, in place of the container's of that family, whose prefix they get.",
)
@click.option(
    "--fill/--no-fill",
    default=None,
    help="Whether all memory is brought in, or what a copy needs when it needs it; by default that"
    " of a copy that is alone on its host.",
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
    targets: str,
    count: int | None,
    pattern: str | None,
    addresses: tuple[str, ...],
    fill: bool | None,
    hook: str,
    copy_signal: CopySignal | None,
    runtime: str,
    as_json: bool,
    report_path: Path | None,
    **asked: Any,
) -> None:
    """Make copies of the container NAME, which runs on, on other hosts or beside it.

    The container stands still for a moment and keeps its connections. A copy goes on from that
    moment under a name and addresses of its own; its connections are closed, its listening sockets
    listen. What no copy can have of its own are secrets that the original has in its memory.

    Exit code 4: some of the copies run, and the others are not there.
    """
    from migrate.cloning import Cloning
    from migrate.copies_wanted import NUMBER, Alike, wanted_copies
    from migrate.moving import Telling, carry_out, new_migration_id

    if report_path is not None and not report_path.parent.is_dir():
        raise click.BadParameter(f"{report_path.parent} is no directory", param_hint="--report")
    if "@" in targets:
        raise UsageError(f"no copy can be made on {targets}: they have to be hosts of the fleet")
    hosts = [host_and_port(one) for one in targets.split(",")]
    wanted = wanted_copies(hosts, count, pattern or f"{name}-{NUMBER}", addresses)
    log_to_stderr(logging.WARNING)
    driver = known.having(name) if runtime == "auto" else known.drivers()[runtime]
    alike = Alike(fill, validate_name(hook) if hook else "", copy_signal)
    options = Options(validate_name(name), ",".join(host for host, _ in hosts), **asked)
    make = partial(
        Cloning, options, wanted, alike, driver, config.HostPaths(), migration_id=new_migration_id()
    )
    report = carry_out(make, Telling(False, as_json, report_path), clone_table)
    missing = [copy.name for copy in report.copies if copy.error]
    if missing:
        raise CopiesMissing(
            f"{len(missing)} of {len(report.copies)} copies were not made: {', '.join(missing)}",
            container_state=runs_on(socket.gethostname()),
            remedy="the warnings say why; the other copies run",
        )
