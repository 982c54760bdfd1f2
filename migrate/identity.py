"""The identity of this host, for those who speak to other hosts, and what its errors mean here."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from migrate.errors import MigrateError
from transport.errors import TransportError
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate import config


def own_identity(paths: config.HostPaths) -> HostIdentity:
    """What is in this host's files, its certificate for TLS renewed if that is due.

    Raises MigrateError.
    """
    try:
        return HostIdentity.load(paths.tls)
    except TransportError as error:
        raise MigrateError(
            f"this host has no identity that it can use: {error}",
            remedy="enrol it: migrate hosts add, or by hand: migrate identity",
        ) from error


@contextmanager
def identity_errors() -> Iterator[None]:
    """Errors of identities and authorities as this package's."""
    try:
        yield
    except TransportError as error:
        raise MigrateError(str(error)) from error
