"""`migrate identity`: how this host gets its identity, what it is, and what was revoked.

`migrate hosts add` calls these over SSH; by hand they enrol a host without SSH.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Annotated

import click
import msgspec
from msgspec import Meta

from migrate import config
from migrate.errors import UsageError
from migrate.identity import identity_errors, own_identity
from transport import certificates, enrolment

_ANSWER_BYTES_MAX = 2 * certificates.REVOCATIONS_BYTES_MAX

_Certificate = Annotated[str, Meta(max_length=certificates.CERTIFICATE_BYTES_MAX)]
_config = click.option(
    "--config",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=config.HostPaths().config,
    hidden=True,
)


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the authority gives a host, each part PEM."""

    ca: _Certificate
    crl: Annotated[str, Meta(max_length=certificates.REVOCATIONS_BYTES_MAX)]
    certificate: _Certificate


@click.group("identity")
def identity() -> None:
    """This host's identity: ask for one, install it, look at it."""


@identity.command("request")
@_config
def request(directory: Path) -> None:
    """Make a key that never leaves this host, and print the request for its certificate (PEM)."""
    with identity_errors():
        wanted = enrolment.request(_paths(directory).tls, socket.gethostname())
    click.echo(wanted.decode(), nl=False)


@identity.command("install")
@click.option("--new-fleet", is_flag=True, help="Give up the identity in another fleet for it.")
@_config
def install(directory: Path, new_fleet: bool) -> None:
    """Install the authority's answer from standard input: {"ca", "crl", "certificate"}, JSON."""
    try:
        answer = msgspec.json.decode(_standard_input(), type=Answer)
    except msgspec.MsgspecError as error:
        raise UsageError(f"this is no answer of an authority: {error}") from error
    with identity_errors():
        made = enrolment.install(
            _paths(directory).tls,
            ca=answer.ca.encode(),
            crl=answer.crl.encode(),
            certificate=answer.certificate.encode(),
            new_fleet=new_fleet,
        )
    click.echo(f"this host is {made.owner}, until {made.expires:%F}")


@identity.command("revocations")
@_config
def revocations(directory: Path) -> None:
    """Take the authority's list of revoked identities from standard input (PEM), if it is newer."""
    own = own_identity(_paths(directory))
    with identity_errors():
        is_new = own.take_revocations(_standard_input())
    click.echo(f"list {own.revocations.number} is {'taken' if is_new else 'the latest here'}")


@identity.command("show")
@click.option("--json", "as_json", is_flag=True, help="A JSON object.")
@_config
def show(directory: Path, as_json: bool) -> None:
    """Show who this host is to others."""
    own = own_identity(_paths(directory))
    shown = {
        "name": own.owner.name,
        "role": str(own.owner.role),
        "serial": f"{own.owner.serial:x}",
        "fleet": own.fleet,
        "expires": f"{own.expires:%F %R} UTC",
        "revocations": own.revocations.number,
        "revoked": len(own.revocations.serials),
    }
    if as_json:
        click.echo(msgspec.json.encode(shown).decode())
    else:
        click.echo("\n".join(f"{label + ':':<13}{value}" for label, value in shown.items()))


def _paths(directory: Path) -> config.HostPaths:
    return config.HostPaths(config=directory)


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read(_ANSWER_BYTES_MAX + 1)
    if len(data) > _ANSWER_BYTES_MAX:
        raise UsageError(f"more than {_ANSWER_BYTES_MAX} bytes on standard input")
    return data
