"""`migrate fill`: a copy that gets its memory as it needs it gets all of it."""

from __future__ import annotations

import click
from rich.console import Console

from migrate import arriving, config
from migrate.progress import mib
from migrate.runtimes.base import validate_name


@click.command()
@click.argument("name")
def fill(name: str) -> None:
    """Bring in all memory of the copy NAME, on its host, and wait for it.

    A copy that shares a page store with others gets a page when it needs it. Only when it has all
    of them can it be moved or copied.
    """
    console = Console(stderr=True)
    with console.status("") as status:
        arriving.fill(
            config.HostPaths(),
            validate_name(name),
            lambda missing_bytes: status.update(f"{mib(missing_bytes)} are missing"),
        )
    click.echo(f"{name} has all of its memory")
