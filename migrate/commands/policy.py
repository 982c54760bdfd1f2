"""`migrate policy`: what this host lets come and go, and whether a file would say it well."""

from __future__ import annotations

from pathlib import Path

import click

from migrate import config
from migrate import policy as policies


@click.group("policy")
def policy() -> None:
    """Look at what this host lets come and go (/etc/migrate/policy.toml)."""


@policy.command("show")
def show() -> None:
    """Print the policy that is in force, with every line that the file leaves out."""
    click.echo(policies.render(policies.load(config.HostPaths().policy)))


@policy.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file: Path) -> None:
    """Check a file before it takes the policy's place; exit code 2 and the line if it can't."""
    policies.load(file)
    click.echo(f"{file} is a policy")
