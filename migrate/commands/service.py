"""`migrate service`: what an operator's `migrate hosts` asks of this host, over SSH, in JSON."""

from __future__ import annotations

import click
import msgspec

from migrate import config
from migrate import service as services


@click.group("service", hidden=True)
def service() -> None:
    """The agent of this host as a service (used by `migrate hosts`)."""


@service.command("state")
def state() -> None:
    """Say what is up with it."""
    _answer(services.state(config.HostPaths(), config.CONTROL_PORT))


@service.command("start")
def start() -> None:
    """Start it, or restart an older one that serves nobody."""
    _answer(services.start(config.HostPaths(), config.CONTROL_PORT))


@service.command("remove")
def remove() -> None:
    """Stop it for good, and give up this host's identity."""
    services.remove(config.HostPaths())
    _answer(services.state(config.HostPaths(), config.CONTROL_PORT))


def _answer(what: object) -> None:
    click.echo(msgspec.json.encode(what).decode())
