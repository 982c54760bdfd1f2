"""The options of every command that copies a container while it runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrate import config
from migrate.runtimes import known

if TYPE_CHECKING:
    from collections.abc import Callable

_Command = TypeVar("_Command", bound="Callable[..., None]")


def copied_how(command: _Command) -> _Command:
    """Give `command` the options of the container's runtime and of `Options`, by their names."""

    @click.option(
        "--runtime",
        type=click.Choice(["auto", *known.NAMES]),
        default="auto",
        show_default=True,
        help="Whose container it is; auto: the one that has a container of that name.",
    )
    @click.option(
        "--tracker",
        type=click.Choice(["auto", "write-protect", "soft-dirty", "predump", "none"]),
        default="auto",
        show_default=True,
        help="How written pages are found; none stops the container for the whole copy.",
    )
    @click.option(
        "--restore",
        type=click.Choice(["lazy", "eager"]),
        default="lazy",
        show_default=True,
        help="lazy: memory is filled in after the container runs again.",
    )
    @click.option(
        "--max-downtime",
        "max_downtime_ms",
        type=click.FloatRange(min=1),
        default=config.DOWNTIME_MS_MAX_DEFAULT,
        show_default=True,
        help="Freeze when the predicted downtime is below this many milliseconds.",
    )
    @click.option(
        "--max-rounds",
        "rounds_max",
        type=click.IntRange(1, 1000),
        default=config.ROUNDS_MAX_DEFAULT,
        show_default=True,
        help="Freeze after this many rounds at the latest.",
    )
    @click.option(
        "--on-stall",
        type=click.Choice(["throttle", "freeze", "abort"]),
        default="throttle",
        show_default=True,
        help="What to do when memory is written faster than it travels: slow the container step by"
        " step, stop it for longer than --max-downtime, or leave it where it is.",
    )
    @click.option(
        "--link-patience",
        "link_patience_s",
        type=click.FloatRange(0, 3600),
        default=config.LINK_PATIENCE_S,
        show_default=True,
        show_envvar=True,
        envvar="MIGRATE_LINK_PATIENCE",
        metavar="SECONDS",
        help="Reconnect a broken link for so long before the migration is undone: more for hosts"
        " that are short of processors.",
    )
    @click.option(
        "--streams",
        type=click.IntRange(1, 16),
        help="Connections that carry memory; by default as many as there are cores, 2 to 4.",
    )
    @click.option(
        "--bandwidth",
        "bandwidth_mib_s",
        type=click.FloatRange(config.BANDWIDTH_MIB_S_MIN),
        default=float("inf"),
        show_default="no limit",
        metavar="MIB",
        help="Send, or keep, at most so many MiB a second, while the container stands still, too.",
    )
    @click.option(
        "--shared",
        multiple=True,
        metavar="PATH",
        help="A bind mount's path that is the same storage on both hosts.",
    )
    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**given)

    return wrapped  # type: ignore[return-value]


def host_and_port(target: str) -> tuple[str, int]:
    """What --to says: NAME or NAME:PORT."""
    host, _, port = target.partition(":")
    if port and not port.isdecimal():
        raise click.BadParameter(f"{port!r} is not a port", param_hint="--to")
    return host, int(port) if port else config.CONTROL_PORT
