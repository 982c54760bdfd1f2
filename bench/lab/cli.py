"""`scripts/lab`: labs by hand."""

from __future__ import annotations

import os
import sys
import time

import click

from bench.lab import lab as labs
from bench.lab.enter import inside_environment
from bench.lab.errors import LabError

DEFAULT_NAME = "lab"
name_option = click.option("--name", default=DEFAULT_NAME, show_default=True, help="Of the lab.")


@click.group()
def main() -> None:
    """Real hosts in namespaces of this machine, joined by a network of their own."""


@main.command()
@name_option
@click.argument("hosts", nargs=-1)
@click.option("--rate", help="Of each host's link, both ways, like 1gbit. Default: unlimited.")
@click.option("--delay", default="0ms", show_default=True, help="On all that a host sends.")
@click.option("--subnet", default=0, show_default=True, help="Third byte of the addresses.")
@click.option("--agents", is_flag=True, help="Start `migrate agent` on every host.")
@click.option("--vm", is_flag=True, help="Virtual machines (scripts/setup --vm made their image).")
def up(
    name: str,
    hosts: tuple[str, ...],
    rate: str | None,
    delay: str,
    subnet: int,
    agents: bool,
    vm: bool,
) -> None:
    """Start a lab with HOSTS (A and B), which stays until `lab down`."""
    started_s = time.monotonic()
    delay_ms = _milliseconds(delay)
    lab = labs.Lab(
        hosts or ("A", "B"),
        name=name,
        subnet=subnet,
        rate=rate,
        delay_ms=delay_ms,
        machines=vm,
        owned=False,
    )
    lab.start()
    if agents:
        lab.start_agents()
    _show(lab)
    click.echo(f"lab {name} is up ({time.monotonic() - started_s:.1f} s)")


@main.command()
@name_option
@click.option("--all", "every", is_flag=True, help="All labs, also those that tests own.")
def down(name: str, every: bool) -> None:
    """End a lab; nothing of it is left."""
    for each in labs.names() if every else [name]:
        found = labs.take_down(each)
        click.echo(f"lab {each} is down" if found else f"lab {each} was not up")


@main.command("list")
def list_labs() -> None:
    """Show the labs that are up."""
    for name in labs.names():
        try:
            lab = labs.Lab.attach(name)
        except LabError:
            click.echo(f"lab {name}: on its way up or down")
            continue
        click.echo(f"lab {name} (keeper {lab.keeper_pid})")
        _show(lab)


@main.command("exec", context_settings={"ignore_unknown_options": True})
@name_option
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def execute(name: str, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND (a shell) inside HOST, or inside `client`."""
    node = labs.Lab.attach(name).host(host)
    full = node.command_line(command or ("bash",), tty=sys.stdin.isatty())
    os.execvpe(full[0], full, inside_environment())


def _show(lab: labs.Lab) -> None:
    for node in [*lab.hosts, lab.client]:
        click.echo(f"  {node.name:10} {node.address:15} {node.address6:18} pid {node.pid}")


def _milliseconds(text: str) -> float:
    try:
        return float(text.removesuffix("ms"))
    except ValueError:
        raise click.BadParameter(f"{text!r}: use for example 10ms") from None


def run() -> None:
    try:
        main()
    except LabError as error:
        click.echo(f"lab: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    run()
