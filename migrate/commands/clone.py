"""`migrate clone`: copies of a running container, memory and all, on other hosts or beside it."""

from __future__ import annotations

import logging
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from migrate import config
from migrate.commands.copied_how import copied_how, host_and_port
from migrate.copies_wanted import NUMBER, Alike, Pool, wanted_copies
from migrate.core.manifest import KEPT_DAYS_MAX
from migrate.errors import CopiesMissing, UsageError, runs_on
from migrate.logs import log_to_stderr
from migrate.moving import Telling, carry_out, new_migration_id
from migrate.options import Options
from migrate.report import clone_table
from migrate.runtimes import known
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from migrate.cloning import Cloning
    from migrate.copies_wanted import Wanted
    from migrate.core.messages import CopySignal
    from migrate.duplicating import Duplicating
    from migrate.progress import Observer
    from migrate.runtimes.base import Runtime


@click.command()
@click.argument("name", required=False)
@click.option(
    "--to",
    "targets",
    metavar="HOST[,HOST…]",
    help="Where the copies are to run, by turns; this host's own name: beside the original.",
)
@click.option(
    "--save",
    "save_to",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep a checkpoint there, which is not there yet, instead of making copies.",
)
@click.option(
    "--for",
    "save_for",
    metavar="HOST|fleet",
    help="With --save: who may start it; this host alone if not given.",
)
@click.option(
    "--days",
    type=click.FloatRange(min=0, min_open=True, max=KEPT_DAYS_MAX),
    default=7,
    show_default=True,
    help="With --save: how long it may be started.",
)
@click.option(
    "--from",
    "start_from",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Make copies of a checkpoint that was kept; on this host, without --to.",
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
    help="The copies' own, in place of the container's of that family, whose prefix they get. Of a"
    " range, what is taken is left out.",
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
    name: str | None,
    targets: str | None,
    save_to: Path | None,
    save_for: str | None,
    days: float,
    start_from: Path | None,
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
    if report_path is not None and not report_path.parent.is_dir():
        raise click.BadParameter(f"{report_path.parent} is no directory", param_hint="--report")
    log_to_stderr(logging.WARNING)
    said = click.get_current_context().get_parameter_source("on_stall")
    if said is not ParameterSource.COMMANDLINE:
        # What is written is kept here while the container stands still: a slow host or disk is no
        # reason to slow it.
        asked["on_stall"] = "freeze"
    pools = tuple(Pool.parse(text) for text in addresses)
    alike = Alike(fill, validate_name(hook) if hook else "", copy_signal, pools)
    if save_to is not None:
        if start_from or targets or not name:
            raise click.UsageError("--save keeps the container NAME, and makes no copies")
        make = saving(name, runtime, Path(save_to).absolute(), save_for, days, asked)
    elif start_from is not None:
        if name:
            raise click.UsageError("--from makes copies of what is kept, and not of a container")
        where = targets or socket.gethostname()
        make = starting(Path(start_from).absolute(), where, count, pattern, alike, asked)
    elif not name or not targets:
        raise click.UsageError("of what, and where? NAME --to HOST; --save DIR and --from DIR")
    else:
        make = cloning(name, runtime, targets, count, pattern, alike, asked)
    report = carry_out(make, Telling(False, as_json, report_path), clone_table)
    missing = [copy.name for copy in report.copies if copy.error]
    if missing:
        raise CopiesMissing(
            f"{len(missing)} of {len(report.copies)} copies were not made: {', '.join(missing)}",
            container_state=runs_on(socket.gethostname()),
            remedy="the warnings say why; the other copies run",
        )


def cloning(
    name: str,
    runtime: str,
    targets: str,
    count: int | None,
    pattern: str | None,
    alike: Alike,
    asked: Mapping[str, Any],
) -> Callable[[Observer], Cloning]:
    """Copies of a container that runs."""
    from migrate.cloning import Cloning

    hosts, wanted = _wanted(name, targets, count, pattern, alike)
    options = Options(validate_name(name), hosts, **asked)
    driver = _driver(name, runtime)
    return partial(
        Cloning, options, wanted, alike, driver, config.HostPaths(), migration_id=new_migration_id()
    )


def saving(
    name: str,
    runtime: str,
    directory: Path,
    target: str | None,
    days: float,
    asked: Mapping[str, Any],
) -> Callable[[Observer], Duplicating]:
    """A checkpoint of one."""
    from migrate.saving import Keep, Saving

    is_for_fleet = target == "fleet"
    whose = socket.gethostname() if is_for_fleet or target is None else target
    keep = Keep(directory, whose, is_for_fleet, days)
    options = Options(validate_name(name), whose, **asked)
    driver = _driver(name, runtime)
    return partial(
        Saving, options, keep, driver, config.HostPaths(), migration_id=new_migration_id()
    )


def starting(
    directory: Path,
    targets: str,
    count: int | None,
    pattern: str | None,
    alike: Alike,
    asked: Mapping[str, Any],
) -> Callable[[Observer], Cloning]:
    """Copies of a checkpoint. Raises CheckpointRefused."""
    from migrate.checkpoint import opened
    from migrate.starting import Starting

    paths = config.HostPaths()
    kept = opened(directory, paths.tls)
    name = kept.manifest.container
    hosts, wanted = _wanted(name, targets, count, pattern, alike)
    options = Options(name, hosts, **asked)
    driver = known.drivers()[kept.about.request.runtime]
    return partial(
        Starting, kept, options, wanted, alike, driver, paths, migration_id=new_migration_id()
    )


def _wanted(
    name: str, targets: str, count: int | None, pattern: str | None, alike: Alike
) -> tuple[str, tuple[Wanted, ...]]:
    """All hosts, for people, and the copies on them."""
    if "@" in targets:
        raise UsageError(f"no copy can be made on {targets}: they have to be hosts of the fleet")
    hosts = [host_and_port(one) for one in targets.split(",")]
    wanted = wanted_copies(hosts, count, pattern or f"{name}-{NUMBER}", alike.pools)
    return ",".join(host for host, _ in hosts), wanted


def _driver(name: str, runtime: str) -> Runtime:
    return known.having(name) if runtime == "auto" else known.drivers()[runtime]
