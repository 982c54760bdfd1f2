"""`migrate drain-node`, `undrain`, `cordon`, `uncordon`: a host is emptied, and filled again.

Asked on the host itself by root, or from anywhere by an operator (`--as`). The host's agent does
it; what is here asks, watches, and tells.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from migrate import config, drain_unit, systemd
from migrate import cordon as cordons
from migrate.commands.asked import of_host
from migrate.core import messages
from migrate.drain_report import lines, progress
from migrate.errors import EXIT_REFUSED, MigrateError, Unreachable

if TYPE_CHECKING:
    from migrate.commands.asked import Asked

_POLL_S: Final = 0.5
# An agent that begins anew meanwhile is waited for: the drain goes on without it.
_AGENT_PATIENCE_S: Final = 60.0


_as_json = click.option("--json", "as_json", is_flag=True, help="Its state as JSON lines.")
_parallel = click.option(
    "--max-parallel",
    "parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Moves at once, from a host and to a host.",
)
_bandwidth = click.option(
    "--bandwidth",
    "bandwidth_mib_s",
    type=click.FloatRange(config.BANDWIDTH_MIB_S_MIN),
    metavar="MIB",
    help="All moves together send at most so many MiB a second.",
)
_detach = click.option("--detach", is_flag=True, help="Don't wait for its end.")


@click.command("drain-node")
@click.option("--to", "to", metavar="HOST,HOST", help="Where the containers may go.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and move nothing.")
@_parallel
@_bandwidth
@click.option("--deadline", "deadline_s", type=click.FloatRange(1), metavar="SECONDS")
@click.option("--shared", multiple=True, metavar="PATH", help="As for a migration.")
@click.option("--move-back", is_flag=True, help="Bring back what fails its check.")
@click.option("--cancel", is_flag=True, help="Let the drain that is under way begin no more moves.")
@click.option("--resume", is_flag=True, help="Go on with the last drain, as it was asked for.")
@click.option("--install-unit", is_flag=True, help="Do this at each shutdown, by systemd.")
@click.option("--at-shutdown", is_flag=True, help="Only if systemd is shutting this host down.")
@_detach
@_as_json
@of_host
def drain_node(
    asked: Asked,
    to: str | None,
    cancel: bool,
    resume: bool,
    install_unit: bool,
    at_shutdown: bool,
    **options: Any,
) -> None:
    """Empty HOST, or this host: cordon it, and move away all that may move.

    Ending this command does not end the drain: --cancel does, and on the host migrate cancel drain.
    """
    if cancel:
        asked.say(messages.Drain("stop"), messages.Drained)
        click.echo(f"no more moves of {asked.host} begin; those under way end")
        return
    if not to and not resume:
        raise click.UsageError("say where the containers may go: --to HOST,HOST")
    detach, as_json = options.pop("detach"), options.pop("as_json")
    word = messages.Drain(
        "resume" if resume else "start",
        tuple(filter(None, (to or "").split(","))),
        **options,
    )
    if (install_unit or at_shutdown) and asked.host != socket.gethostname():
        raise click.UsageError("a unit of systemd's is for the host that it is installed on")
    if install_unit:
        click.echo(drain_unit.install(word))
        return
    if at_shutdown:
        if not systemd.is_shutting_down():
            click.echo("this host does not shut down: nothing is moved")
            return
        word = _after_former(asked, word)
    _watch(asked, word, detach=detach, as_json=as_json)


@click.command("undrain")
@_parallel
@_bandwidth
@_detach
@_as_json
@of_host
def undrain(asked: Asked, detach: bool, as_json: bool, **options: Any) -> None:
    """Uncordon HOST, or this host, and bring home what its drains have moved away."""
    _watch(asked, messages.Drain("home", **options), detach=detach, as_json=as_json)


@click.command("cordon")
@of_host
def cordon(asked: Asked) -> None:
    """HOST, or this host, takes no containers from now on, over a reboot too."""
    _set_cordon(asked, is_on=True)


@click.command("uncordon")
@of_host
def uncordon(asked: Asked) -> None:
    """HOST, or this host, takes containers again."""
    _set_cordon(asked, is_on=False)


def _set_cordon(asked: Asked, *, is_on: bool) -> None:
    try:
        asked.say(messages.Drain("cordon" if is_on else "uncordon"), messages.Drained)
    except Unreachable:
        # Root on the host itself needs no agent for that.
        if asked.host != socket.gethostname():
            raise
        paths = config.HostPaths()
        cordons.put(paths, cordons.Cordon()) if is_on else cordons.lift(paths)
    click.echo(f"{asked.host} {'is cordoned' if is_on else 'takes containers'}")


def _after_former(asked: Asked, word: messages.Drain) -> messages.Drain:
    """A shutdown waits for nobody: what is under way, an undrain perhaps, begins no more moves, and
    `word` has of its deadline what is left when that has ended. An agent that has just begun may
    not listen yet. Raises MigrateError."""
    began_s = time.monotonic()
    while _is_under_way(asked, began_s + _AGENT_PATIENCE_S):
        time.sleep(_POLL_S)
    left_s = (word.deadline_s or 0) - (time.monotonic() - began_s)
    return msgspec.structs.replace(word, deadline_s=max(left_s, 1.0))


def _is_under_way(asked: Asked, limit_s: float) -> bool:
    """Whether a drain is, which is stopped, or may be."""
    try:
        return asked.say(messages.Drain("stop"), messages.Drained).is_driven
    except Unreachable:
        if time.monotonic() > limit_s:
            raise
        return True


def _watch(asked: Asked, word: messages.Drain, *, detach: bool, as_json: bool) -> None:
    """Ask, tell what happens, and exit as the drain ends."""
    try:
        deadline_s = config.DRAIN_START_DEADLINE_S + config.WORD_DEADLINE_S
        state = asked.say(word, messages.Drained, deadline_s=deadline_s)
    except Unreachable as error:
        error.remedy = f"start `migrate agent` on {asked.host}"
        raise
    drain_id, show = state.drain_id, messages.Drain("show", dry_run=word.dry_run)
    told: dict[str, str] = {}
    limit_s = time.monotonic() + _AGENT_PATIENCE_S
    pause_s = _POLL_S
    while True:
        for line in progress(state, told):
            click.echo(msgspec.json.encode(line).decode() if as_json else line.text)
        if state.drain_id != drain_id:
            raise MigrateError(f"another drain of {asked.host} has begun: {state.drain_id}")
        if state.phase == "ended" or detach:
            break
        if not state.is_driven:
            raise MigrateError(
                f"{drain_id} was interrupted; its moves go on by themselves",
                host=asked.host,
                remedy="migrate drain-node --resume",
            )
        time.sleep(pause_s)
        asked_s = time.monotonic()
        try:
            state = asked.say(show, messages.Drained)
            limit_s = time.monotonic() + _AGENT_PATIENCE_S
        except Unreachable:
            if time.monotonic() > limit_s:
                raise
        # A host that takes long to answer has more to do than that.
        pause_s = max(_POLL_S, time.monotonic() - asked_s)
    click.echo(msgspec.json.encode(state).decode() if as_json else "\n".join(lines(state)))
    if state.phase == "ended" and state.exit_code:
        if state.exit_code == EXIT_REFUSED:
            click.echo(state.why, err=True)
        sys.exit(state.exit_code)
