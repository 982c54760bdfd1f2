"""The errors of SSH: one sentence for each class says when it is raised."""

from __future__ import annotations

from transport.errors import TransportError


class SshError(TransportError):
    """Something over SSH did not work. remedy: what to do about it, empty if nobody knows."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class SshConfigError(SshError):
    """A destination is none, or OpenSSH's configuration asks for what can't be done here."""


class SshUnreachableError(SshError):
    """No SSH server answers there, or the connection to it was lost."""


class HostKeyError(SshError):
    """The server did not prove that it is the host that was meant."""


class HostKeyUnknownError(HostKeyError):
    """No known_hosts has a key of this host, and nobody accepted the one that it showed."""


class HostKeyChangedError(HostKeyError):
    """A known_hosts has another key of this host than the one that it showed."""


class HostKeyRevokedError(HostKeyError):
    """A known_hosts says that the key which the host showed is revoked."""


class SshAuthError(SshError):
    """The server accepted none of the user's keys and passwords."""


class SshCommandError(SshError):
    """A command on the other host printed more than was expected, or took too long."""
