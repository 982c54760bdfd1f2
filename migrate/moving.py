"""`migrate NAME --to HOST`: one migration, from what the command line says to its report."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import click
import msgspec
from rich.console import Console

from migrate import config, progress
from migrate.coordinator import Coordinator
from migrate.dry_run import dry_run
from migrate.logs import log_to_stderr
from migrate.once import OneShot
from migrate.options import Options
from migrate.report import CloneReport, Report, summary_table, write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from rich.table import Table

    from migrate.core.messages import MigrationId
    from migrate.runtimes.base import Runtime
    from transport.ssh.asking import Asking


_ReportT = TypeVar("_ReportT", Report, CloneReport)


class Telling(NamedTuple):
    """What is to be told, and how. only_check: what would come of the migration. report_path: where
    the report goes as well."""

    only_check: bool
    as_json: bool
    report_path: Path | None


def move(
    name: str,
    host: str,
    port: int,
    asked: Mapping[str, Any],
    runtime: Runtime,
    telling: Telling,
    migration_id: MigrationId | None = None,
) -> None:
    """Move a container to a host of the fleet. asked: of `Options`, by its names. migration_id: if
    whoever asks has chosen one. Raises MigrateError."""
    log_to_stderr(logging.WARNING)
    options = Options(name, host, port, **asked)
    migration_id = migration_id or new_migration_id()
    _move(options, runtime, config.HostPaths(), migration_id, telling)


def move_once(
    name: str,
    target: str,
    asked: Mapping[str, Any],
    runtime: Runtime,
    asking: Asking,
    telling: Telling,
) -> None:
    """Move a container to USER@HOST[:PORT], which is in no fleet, by SSH. Raises MigrateError."""
    log_to_stderr(logging.WARNING)
    # Before somebody types a password for nothing.
    runtime.inspect(name)
    migration_id, tell = new_migration_id(), partial(click.echo, err=True)
    with OneShot(target, migration_id, config.HostPaths(), asking, tell) as shot:
        there = shot.listening
        options = Options(name, there.host, there.port, way=shot.way, **asked)
        _move(options, runtime, shot.paths, migration_id, telling)


def new_migration_id() -> MigrationId:
    """A name for a migration that no other has, short enough to type."""
    return secrets.token_hex(6)


def _move(
    options: Options,
    runtime: Runtime,
    paths: config.HostPaths,
    migration_id: MigrationId,
    telling: Telling,
) -> None:
    if telling.only_check:
        forecast = asyncio.run(dry_run(options, runtime, paths, migration_id))
        encoded = msgspec.json.encode(forecast).decode()
        click.echo(encoded if telling.as_json else "\n".join(forecast.lines()))
        return
    make = partial(Coordinator, options, runtime, paths, migration_id=migration_id)
    carry_out(make, telling, summary_table)


class _Work(Protocol[_ReportT]):
    """A coordinator."""

    report: _ReportT | None

    async def run(self) -> _ReportT: ...

    async def cancel(self) -> None: ...


def carry_out(
    make: Callable[[progress.Observer], _Work[_ReportT]],
    telling: Telling,
    table: Callable[[_ReportT], Table],
) -> _ReportT:
    """Let a coordinator do its work, shown and reported as it is wanted. Raises MigrateError."""
    console = Console(stderr=telling.as_json)
    observer: progress.JsonLines | progress.Terminal
    display: AbstractContextManager[object]
    if telling.as_json:
        observer, display = progress.JsonLines(sys.stdout), nullcontext()
    else:
        observer = progress.Terminal(console)
        display = observer
    work = make(observer)
    try:
        with display:
            report = asyncio.run(_run(work))
    finally:
        if telling.report_path is not None and work.report is not None:
            write_report(work.report, telling.report_path)
    if telling.as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        console.print(table(report))
    return report


async def _run(work: _Work[_ReportT]) -> _ReportT:
    """Do it; SIGINT and SIGTERM cancel, which the coordinator undoes first."""
    loop = asyncio.get_running_loop()
    cancelling: set[asyncio.Task[None]] = set()

    def cancel() -> None:
        cancelling.add(loop.create_task(work.cancel()))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel)
    return await work.run()
