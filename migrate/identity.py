"""The identity of this host, for those who speak to other hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.errors import MigrateError
from transport.errors import TransportError
from transport.identity import HostIdentity

if TYPE_CHECKING:
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
            phase="preflight",
            remedy=f"enrol it: its files are in {paths.tls.directory}",
        ) from error
