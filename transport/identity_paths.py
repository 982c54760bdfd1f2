"""Where the files of an identity are. Apart from `identity.py`, which takes a while to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class IdentityPaths:
    """The files of one host's identity."""

    directory: Path

    @property
    def ca(self) -> Path:
        """The authority."""
        return self.directory / "ca.pem"

    @property
    def crl(self) -> Path:
        """What the authority has revoked."""
        return self.directory / "crl.pem"

    @property
    def identity(self) -> Path:
        """The key that never leaves this host, and its certificate."""
        return self.directory / "identity.pem"

    @property
    def leaf(self) -> Path:
        """Key and chain of what is shown in TLS today."""
        return self.directory / "host.pem"
