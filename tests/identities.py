"""A fleet for tests: hosts and operators with identities of one authority, good ones and bad ones.

Made by the product's own authority and enrolment, so a test that speaks TLS tests those too.
"""

from __future__ import annotations

from pathlib import Path

from transport import enrolment
from transport.authority import Authority
from transport.identity import HostIdentity, IdentityPaths, Role


class Fleet:
    """An authority, and identities below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.temporary()
        self._made = 0

    def host(
        self, name: str, addresses: tuple[str, ...] = (), at: Path | None = None
    ) -> IdentityPaths:
        """The files of an enrolled host, in `at` or a directory of their own."""
        return self._enrol(name, Role.HOST, addresses, at)

    def operator(self, name: str, at: Path | None = None) -> IdentityPaths:
        return self._enrol(name, Role.OPERATOR, (), at)

    def revoke(self, *revoked: IdentityPaths) -> bytes:
        """Take identities back; the list that says so, which nobody has yet."""
        self.authority.revoke(*(HostIdentity.load(one).owner.serial for one in revoked))
        return self.authority.crl_pem

    def _enrol(
        self, name: str, role: Role, addresses: tuple[str, ...], at: Path | None
    ) -> IdentityPaths:
        self._made += 1
        paths = IdentityPaths(at or self.directory / f"{self._made}-{name}")
        enrolment.enrol_here(paths, self.authority, name, role, addresses)
        return paths
