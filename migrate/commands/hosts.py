"""`migrate hosts add|list|remove|check`: the operator's hosts, over SSH."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from migrate.commands.over_ssh import over_ssh
from migrate.commands.terminal import passphrase
from migrate.errors import EXIT_FAILED, MigrateError
from migrate.hosts import book, enrolment
from transport.authority import Authority
from transport.errors import TransportError

if TYPE_CHECKING:
    from transport.ssh.asking import Asking

# Hosts that are asked side by side.
_CHECKS_MAX = 16

_fleet = click.option(
    "--fleet",
    type=click.Path(file_okay=False, path_type=Path),
    default=book.fleet_directory,
    show_default="~/.config/migrate/fleet",
    help="Where the authority is and what is known of the hosts.",
)
_passphrase_file = click.option(
    "--passphrase-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of the authority; else it is asked for.",
)


@click.group("hosts")
def hosts() -> None:
    """Enrol hosts over SSH, look after them, take them back."""


@hosts.command("add")
@click.argument("destination", metavar="[USER@]HOST[:PORT]")
@_fleet
@_passphrase_file
@click.option("--install-packages", is_flag=True, help="Let apt install there what is missing.")
@click.option(
    "--wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Wheels for a host whose Python lacks something; else pip gets them.",
)
@click.option(
    "--address", "addresses", multiple=True, help="Another host may call it by this address too."
)
@click.option("--new-fleet", is_flag=True, help="It leaves the fleet that it is in.")
@over_ssh
def add(
    destination: str,
    fleet: Path,
    passphrase_file: Path | None,
    install_packages: bool,
    wheels: Path | None,
    addresses: tuple[str, ...],
    new_fleet: bool,
    asking: Asking,
) -> None:
    """Install the agent on a host, give it an identity, start it.

    Asking again upgrades and repairs; what is there already is left alone.
    """
    authority = _open(fleet, passphrase_file)
    wishes = enrolment.Wishes(install_packages, wheels, new_fleet)
    record = enrolment.add(destination, fleet, authority, asking, wishes, addresses, _tell)
    click.echo(f"{record.name} is in the fleet: migrate CONTAINER --to {record.name}")


@hosts.command("list")
@_fleet
@click.option("--json", "as_json", is_flag=True, help="A JSON array of objects.")
def show(fleet: Path, as_json: bool) -> None:
    """Show the hosts of the fleet."""
    found = book.read(fleet)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    for one in found:
        addresses = f" ({', '.join(one.addresses)})" if one.addresses else ""
        click.echo(f"{one.name}  {one.destination}{addresses}")
    if not found:
        click.echo("no host is in this fleet: migrate hosts add USER@HOST")


@hosts.command("remove")
@click.argument("host")
@_fleet
@_passphrase_file
@over_ssh
def remove(host: str, fleet: Path, passphrase_file: Path | None, asking: Asking) -> None:
    """Revoke a host's identity, tell all others, stop its agent.

    Exit code 1 if a host could not be told; it is named. Then: migrate hosts revocations.
    """
    missed = enrolment.remove(host, fleet, _open(fleet, passphrase_file), asking, _tell)
    _exit_for(missed)


@hosts.command("revocations")
@_fleet
@_passphrase_file
@over_ssh
def revocations(fleet: Path, passphrase_file: Path | None, asking: Asking) -> None:
    """Bring the latest revocation list to all hosts."""
    authority = _open(fleet, passphrase_file)
    try:
        missed = enrolment.push_revocations(fleet, authority, asking, _tell)
    except TransportError as error:
        raise MigrateError(str(error)) from error
    _exit_for(missed)


@hosts.command("check")
@click.argument("names", nargs=-1, metavar="[HOST]...")
@_fleet
@click.option("--json", "as_json", is_flag=True, help="A JSON array of objects.")
@over_ssh
def check(names: tuple[str, ...], fleet: Path, as_json: bool, asking: Asking) -> None:
    """Look whether hosts are well: agent, version, identity, clock. Exit code 1 if one is not."""
    records = [book.find(fleet, name) for name in names] or list(book.read(fleet))
    with ThreadPoolExecutor(_CHECKS_MAX) as pool:
        found = list(pool.map(lambda record: enrolment.check(record, asking), records))
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        click.echo("\n".join(line for one in found for line in _lines(one)))
    if any(one.problems for one in found):
        sys.exit(EXIT_FAILED)


def _open(fleet: Path, passphrase_file: Path | None) -> Authority:
    try:
        return Authority.open(fleet, passphrase(passphrase_file))
    except TransportError as error:
        raise MigrateError(str(error), remedy="a new fleet: migrate ca init") from error


def _lines(health: enrolment.Health) -> list[str]:
    if not health.version:
        return [f"{health.name}: {problem}" for problem in health.problems]
    how = "well" if not health.problems else "NOT WELL"
    lines = [
        f"{health.name}: {how}, version {health.version},"
        f" identity for {health.days_left:.0f} days, clock {health.clock_difference_s:+.1f} s"
    ]
    return lines + [f"  {problem}" for problem in health.problems]


def _exit_for(missed: list[str]) -> None:
    if missed:
        raise MigrateError(
            f"not told: {', '.join(missed)}",
            remedy="as long as they are not, they accept who was revoked:"
            " migrate hosts revocations",
        )


def _tell(line: str) -> None:
    click.echo(line, err=True)
