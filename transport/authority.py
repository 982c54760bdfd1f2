"""The authority of a fleet: signs identities, takes them back. Held by the operator, offline.

::

    ca.pem           its certificate
    ca.key           its private key, OpenSSH's format, encrypted with a passphrase
    crl.pem          the latest revocation list
    issued/SERIAL.pem  every identity that it has signed

OpenSSH's format, because it derives the key by bcrypt: PKCS8 as this library (and OpenSSL by
default) writes it tries a passphrase in a millisecond, this takes half a second. The passphrase is
changed by `ssh-keygen -p -a 48 -f ca.key`.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PrivateFormat,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID

from transport import certificates, sealed_files
from transport.certificates import Peer, Revocations, Role
from transport.errors import (
    AuthorityUnusableError,
    CertificateMalformedError,
    PassphraseWrongError,
)
from transport.identity import now

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PASSPHRASE_CHARACTERS_MIN = 8
_KDF_ROUNDS = 48
REQUEST_BYTES_MAX = 4 << 10


@dataclass(frozen=True, slots=True)
class Issued:
    """An identity that the authority has signed."""

    peer: Peer
    expires: datetime.datetime
    revoked: bool


class Authority:
    """An open authority. One thread; several processes may have the same one open."""

    def __init__(
        self, key: Ed25519PrivateKey, certificate: x509.Certificate, directory: Path | None
    ) -> None:
        """Use `create`, `open` or `temporary`."""
        self._key = key
        self._certificate = certificate
        self._directory = directory
        self._memory: dict[int, x509.Certificate] = {}
        self._list = b""

    @classmethod
    def create(cls, directory: Path, passphrase: bytes) -> Authority:
        """A new fleet's. Raises AuthorityUnusableError, also where there is one already."""
        if len(passphrase) < PASSPHRASE_CHARACTERS_MIN:
            raise PassphraseWrongError(
                f"a passphrase has {PASSPHRASE_CHARACTERS_MIN} characters at least"
            )
        key, certificate = _make()
        encryption = (
            PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(_KDF_ROUNDS).build(passphrase)
        )
        sealed = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, encryption)
        try:
            sealed_files.make_directory(directory)
            with sealed_files.locked(directory):
                if (directory / "ca.key").exists():
                    raise AuthorityUnusableError(f"there is an authority in {directory} already")
                sealed_files.make_directory(directory / "issued")
                made = cls(key, certificate, directory)
                made._publish(Revocations(1, frozenset()))
                sealed_files.replace(directory / "ca.pem", made.certificate_pem)
                # Last: with it the authority exists.
                sealed_files.replace(directory / "ca.key", sealed)
        except OSError as error:
            raise AuthorityUnusableError(f"cannot write {directory}: {error}") from error
        return made

    @classmethod
    def open(cls, directory: Path, passphrase: bytes) -> Authority:
        """Raises AuthorityUnusableError, PassphraseWrongError, TlsError."""
        try:
            sealed = sealed_files.read_secret(directory / "ca.key")
            certificate = certificates.read_authority(
                sealed_files.read(directory / "ca.pem"), now()
            )
        except OSError as error:
            raise AuthorityUnusableError(f"no authority in {directory}: {error}") from error
        try:
            key = load_ssh_private_key(sealed, passphrase)
        except (ValueError, TypeError) as error:
            raise PassphraseWrongError(
                f"this passphrase does not open {directory}/ca.key"
            ) from error
        if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
            raise AuthorityUnusableError(
                f"ca.key and ca.pem in {directory} are not one authority's"
            )
        return cls(key, certificate, directory)

    @classmethod
    def temporary(cls) -> Authority:
        """One without files, for a single migration or a lab."""
        key, certificate = _make()
        made = cls(key, certificate, None)
        made._publish(Revocations(1, frozenset()))
        return made

    @property
    def certificate_pem(self) -> bytes:
        """What every host of the fleet gets as ca.pem."""
        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def crl_pem(self) -> bytes:
        """The latest revocation list."""
        if self._directory is None:
            return self._list
        try:
            return sealed_files.read(self._directory / "crl.pem")
        except OSError as error:
            raise AuthorityUnusableError(f"no revocation list: {error}") from error

    def issue(self, csr_pem: bytes, name: str, role: Role, addresses: Sequence[str] = ()) -> bytes:
        """The identity certificate (PEM) for the request of `name`, which has to ask for that name.

        addresses: where a host may be called by address instead of by name. Nothing else is taken
        from the request but its key. Raises CertificateMalformedError, AuthorityUnusableError.
        """
        if len(addresses) > certificates.ADDRESSES_MAX:
            raise CertificateMalformedError(f"{len(addresses)} addresses for {name}")
        try:
            parsed = [ipaddress.ip_address(address) for address in addresses]
        except ValueError as error:
            raise CertificateMalformedError(str(error)) from error
        identity = certificates.make_identity(
            _requested_key(csr_pem, name),
            name,
            role,
            parsed,
            authority=self._certificate,
            authority_key=self._key,
            at=now(),
        )
        self._keep(identity)
        return identity.public_bytes(Encoding.PEM)

    def issued(self) -> list[Issued]:
        """All identities that were ever signed, by name, of one name the latest last."""
        revoked = certificates.read_revocations(self.crl_pem, self._certificate).serials
        found = []
        for certificate in self._kept():
            peer, _ = certificates.peer_of_identity(
                certificate, self._certificate, certificate.not_valid_before_utc
            )
            expires = certificates.expiry_of(certificate)
            found.append(Issued(peer, expires, peer.serial in revoked))
        return sorted(found, key=lambda one: (one.peer.name, one.expires))

    def revoke(self, *serials: int) -> None:
        """Take identities back: the next list has them. Raises AuthorityUnusableError."""
        if self._directory is None:
            self._revoke(serials)
            return
        try:
            with sealed_files.locked(self._directory):
                self._revoke(serials)
        except OSError as error:
            raise AuthorityUnusableError(f"cannot revoke: {error}") from error

    def _revoke(self, serials: Iterable[int]) -> None:
        former = certificates.read_revocations(self.crl_pem, self._certificate)
        self._publish(Revocations(former.number + 1, former.serials | set(serials)))

    def _publish(self, revoked: Revocations) -> None:
        made = certificates.make_revocations(
            revoked, authority=self._certificate, authority_key=self._key, at=now()
        )
        self._list = made.public_bytes(Encoding.PEM)
        if self._directory is not None:
            sealed_files.replace(self._directory / "crl.pem", self._list)

    def _keep(self, identity: x509.Certificate) -> None:
        if self._directory is None:
            self._memory[identity.serial_number] = identity
            return
        path = self._directory / "issued" / f"{identity.serial_number:040x}.pem"
        try:
            sealed_files.replace(path, identity.public_bytes(Encoding.PEM))
        except OSError as error:
            raise AuthorityUnusableError(f"cannot keep {path}: {error}") from error

    def _kept(self) -> list[x509.Certificate]:
        if self._directory is None:
            return list(self._memory.values())
        try:
            return [
                certificates.read_certificate(sealed_files.read(path))
                for path in (self._directory / "issued").glob("*.pem")
            ]
        except OSError as error:
            raise AuthorityUnusableError(f"cannot read what was issued: {error}") from error


def _make() -> tuple[Ed25519PrivateKey, x509.Certificate]:
    """A key and its certificate, with a name that no other authority has."""
    key = Ed25519PrivateKey.generate()
    return key, certificates.make_authority(key, f"migrate fleet {secrets.token_hex(4)}", now())


def _requested_key(csr_pem: bytes, name: str) -> Ed25519PublicKey:
    if len(csr_pem) > REQUEST_BYTES_MAX:
        raise CertificateMalformedError(f"a request of {len(csr_pem)} bytes")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        names = [one.value for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = request.public_key()
        is_signed = request.is_signature_valid
    except (ValueError, TypeError) as error:
        raise CertificateMalformedError(f"this is no request for an identity: {error}") from error
    if not isinstance(key, Ed25519PublicKey) or not is_signed:
        raise CertificateMalformedError("a request is signed by the Ed25519 key that it is about")
    if names != [name]:
        raise CertificateMalformedError(f"{names} asks for an identity, not {name}")
    return key
