"""`migrate ca`: the authority of a fleet, on the machine of the person who holds it."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click
import msgspec

from migrate.commands.identity import Answer
from migrate.commands.terminal import passphrase
from migrate.errors import UsageError
from migrate.hosts.book import fleet_directory
from migrate.identity import identity_errors
from transport import enrolment
from transport.authority import REQUEST_BYTES_MAX, Authority
from transport.identity import IdentityPaths, Role

at_fleet = click.option(
    "--fleet",
    type=click.Path(file_okay=False, path_type=Path),
    default=fleet_directory,
    show_default="~/.config/migrate/fleet",
    help="Where the authority is.",
)
_passphrase_file = click.option(
    "--passphrase-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of the authority's key; else it is asked for.",
)


@click.group("ca")
def ca() -> None:
    """The authority of a fleet: make it, give identities to persons, take identities back."""


@ca.command("init")
@at_fleet
@_passphrase_file
def init(fleet: Path, passphrase_file: Path | None) -> None:
    """Make the authority of a new fleet. Who has its key and passphrase rules all its hosts."""
    secret = passphrase(passphrase_file, "passphrase for the new authority")
    if passphrase_file is None and passphrase(None, "the same again") != secret:
        raise UsageError("these were two different passphrases")
    with identity_errors():
        Authority.create(fleet, secret)
    click.echo(f"the authority is in {fleet}: keep a copy of this directory, and the passphrase")


@ca.command("sign")
@click.argument("name")
@click.argument("request", type=click.File("rb"))
@click.option("--address", "addresses", multiple=True, help="May be called by this address too.")
@at_fleet
@_passphrase_file
def sign(
    name: str,
    request: IO[bytes],
    addresses: tuple[str, ...],
    fleet: Path,
    passphrase_file: Path | None,
) -> None:
    """Give the host NAME an identity for its REQUEST (a file, - for standard input).

    The answer, on standard output, is for migrate identity install. Make sure that the request is
    that host's: whoever made it will speak for it.
    """
    with identity_errors():
        authority = Authority.open(fleet, passphrase(passphrase_file))
        wanted = request.read(REQUEST_BYTES_MAX + 1)
        certificate = authority.issue(wanted, name, Role.HOST, addresses)
        answer = Answer(
            authority.certificate_pem.decode(), authority.crl_pem.decode(), certificate.decode()
        )
    click.echo(msgspec.json.encode(answer).decode())


@ca.command("operator")
@click.argument("name")
@at_fleet
@_passphrase_file
def operator(name: str, fleet: Path, passphrase_file: Path | None) -> None:
    """Give a person an identity: they may decide about migrations in doubt, on every host."""
    secret = passphrase(passphrase_file)
    paths = operator_paths(fleet, name)
    with identity_errors():
        identity = enrolment.enrol_here(paths, Authority.open(fleet, secret), name, Role.OPERATOR)
        click.echo(f"{paths.directory}: {identity.owner}, until {identity.expires:%F}")


def operator_paths(fleet: Path, name: str) -> IdentityPaths:
    """The identity of an operator."""
    return IdentityPaths(fleet / "operators" / name)


@ca.command("list")
@at_fleet
@_passphrase_file
def show(fleet: Path, passphrase_file: Path | None) -> None:
    """Show every identity that the authority has signed."""
    with identity_errors():
        for one in Authority.open(fleet, passphrase(passphrase_file)).issued():
            state = "revoked" if one.revoked else f"until {one.expires:%F}"
            click.echo(f"{one.peer.serial:x}  {one.peer.role:<8}  {one.peer.name}  {state}")


@ca.command("revoke")
@click.argument("who")
@at_fleet
@_passphrase_file
def revoke(who: str, fleet: Path, passphrase_file: Path | None) -> None:
    """Take back the identities of a NAME, or the one with this SERIAL.

    It counts on a host from when that host has the new list: migrate hosts revocations. A host is
    better removed by migrate hosts remove.
    """
    with identity_errors():
        authority = Authority.open(fleet, passphrase(passphrase_file))
        found = [
            one.peer
            for one in authority.issued()
            if not one.revoked and who in (one.peer.name, f"{one.peer.serial:x}")
        ]
        if not found:
            raise UsageError(f"no identity of {who} is in force", remedy="migrate ca list")
        authority.revoke(*(peer.serial for peer in found))
    for peer in found:
        click.echo(f"revoked: {peer} ({peer.serial:x})")
