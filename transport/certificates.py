"""The certificates of a fleet: how they are made, and what they must look like to be believed.

::

    authority (CA, held by the operator, 10 years)
      └ identity (a host's or an operator's, 1 year)   subject CN=NAME, OU=ROLE
          │                                            may sign for the name NAME alone
          └ leaf (made by the host itself, 24 hours)   what is shown in a TLS handshake

The authority's revocation list names identities. So who shows a leaf is judged by the identity
above it, and the chain has exactly these three: what a host's identity has signed can't stand
between. OpenSSL alone would allow it one of the same name: a path length counts no certificate that
is issued by its own subject (RFC 5280, 4.2.1.9).

All keys are Ed25519. Pure: the time comes as data, files are somebody else's matter.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from transport.errors import (
    CertificateExpiredError,
    CertificateMalformedError,
    CertificateRevokedError,
    PeerNotTrustedError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

AUTHORITY_LIFE = datetime.timedelta(days=3650)
IDENTITY_LIFE = datetime.timedelta(days=365)
LEAF_LIFE = datetime.timedelta(hours=24)
BACKDATE = datetime.timedelta(hours=1)
"""Certificates begin so long ago: the clock of whoever checks one may be that much behind."""

CERTIFICATE_BYTES_MAX = 8 << 10
"""Ours have some 700 bytes; what is larger is not looked at."""
REVOCATIONS_BYTES_MAX = 1 << 20
"""Room for 20,000 revoked hosts."""

NAME_CHARACTERS_MAX = 64
"""Of a common name (RFC 5280, ub-common-name), and of a Linux hostname."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
ADDRESSES_MAX = 16

_EVERY_ADDRESS = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_T = TypeVar("_T", bound=x509.ExtensionType)


class Role(StrEnum):
    """What the holder of an identity may do."""

    HOST = "host"
    """Sends and receives containers."""
    OPERATOR = "operator"
    """A person: may decide about what is in doubt, and never sends a container."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the other side has proven to be; `serial` is its identity certificate's."""

    name: str
    role: Role
    serial: int

    def __str__(self) -> str:
        """For logs and errors: a host by its name, anybody else with the role."""
        return self.name if self.role is Role.HOST else f"{self.role} {self.name}"


@dataclass(frozen=True, slots=True)
class Revocations:
    """A list that the authority has signed. Each has a higher number than the one before."""

    number: int
    serials: frozenset[int]


def check_name(name: str) -> str:
    """`name`, if a host or an operator can be called so. Raises CertificateMalformedError."""
    if len(name) > NAME_CHARACTERS_MAX or not _NAME.fullmatch(name):
        raise CertificateMalformedError(
            f"{name[:NAME_CHARACTERS_MAX]!r} is no name for an identity: letters, digits,"
            f" hyphens and dots, {NAME_CHARACTERS_MAX} at most"
        )
    return name


# --- making ---


def make_authority(key: Ed25519PrivateKey, name: str, at: datetime.datetime) -> x509.Certificate:
    """The certificate of a new authority, signed by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _begin(subject, subject, key.public_key(), at, at + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(certificates=True, revocations=True), critical=True)
        .sign(key, None)
    )


def make_identity(
    key: Ed25519PublicKey,
    peer_name: str,
    role: Role,
    addresses: Sequence[Address],
    *,
    authority: x509.Certificate,
    authority_key: Ed25519PrivateKey,
    at: datetime.datetime,
) -> x509.Certificate:
    """What a host or an operator gets: it can sign leaves for its own name and addresses alone."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, check_name(peer_name)),
        ]
    )
    permitted: list[x509.GeneralName] = [x509.DNSName(peer_name)]
    permitted += [x509.IPAddress(ipaddress.ip_network(address)) for address in addresses]
    # A constraint of one kind of name says nothing about the others (RFC 5280, 4.2.1.10).
    excluded = None if addresses else [x509.IPAddress(network) for network in _EVERY_ADDRESS]
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _begin(subject, authority.subject, key, at, min(at + IDENTITY_LIFE, expiry_of(authority)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True, signatures=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, excluded), critical=True)
        .add_extension(issuer_id, critical=False)
        .sign(authority_key, None)
    )


def make_leaf(
    key: Ed25519PublicKey,
    *,
    identity: x509.Certificate,
    identity_key: Ed25519PrivateKey,
    at: datetime.datetime,
) -> x509.Certificate:
    """A certificate for TLS, of all that `identity` may speak for."""
    constraints = _extension(identity, x509.NameConstraints)
    names: list[x509.GeneralName] = []
    for permitted in constraints.permitted_subtrees or ():
        if isinstance(permitted, x509.IPAddress):
            network = permitted.value
            assert isinstance(network, ipaddress.IPv4Network | ipaddress.IPv6Network)
            permitted = x509.IPAddress(network.network_address)  # noqa: PLW2901
        names.append(permitted)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(identity_key.public_key())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _common_name(identity.subject))])
    end = min(at + LEAF_LIFE, expiry_of(identity))
    return (
        _begin(subject, identity.subject, key, at, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signatures=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(identity_key, None)
    )


def make_revocations(
    revoked: Revocations,
    *,
    authority: x509.Certificate,
    authority_key: Ed25519PrivateKey,
    at: datetime.datetime,
) -> x509.CertificateRevocationList:
    """The list as the authority publishes it. It holds until a later one is heard of."""
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(at - BACKDATE)
        .next_update(expiry_of(authority))
        .add_extension(x509.CRLNumber(revoked.number), critical=False)
        .add_extension(issuer_id, critical=False)
    )
    for serial in sorted(revoked.serials):
        entry = (
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at - BACKDATE)
        )
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority_key, None)


# --- reading ---


def read_certificate(data: bytes) -> x509.Certificate:
    """PEM (the first in it) or DER. Raises CertificateMalformedError."""
    if len(data) > CERTIFICATE_BYTES_MAX:
        raise CertificateMalformedError(f"a certificate of {len(data)} bytes")
    with _well_formed("certificate"):
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)


def read_authority(data: bytes, at: datetime.datetime) -> x509.Certificate:
    """An authority's certificate, PEM or DER. Raises TlsError."""
    authority = read_certificate(data)
    with _well_formed("certificate of an authority"):
        constraints = _extension(authority, x509.BasicConstraints)
        if not constraints.ca or authority.subject != authority.issuer:
            raise CertificateMalformedError("this is not the certificate of an authority")
        _public_key(authority)
        _check_issued(authority, authority)
    _check_time(authority, at)
    return authority


def read_revocations(data: bytes, authority: x509.Certificate) -> Revocations:
    """The authority's list, PEM. Raises CertificateMalformedError, PeerNotTrustedError."""
    if len(data) > REVOCATIONS_BYTES_MAX:
        raise CertificateMalformedError(f"a revocation list of {len(data)} bytes")
    with _well_formed("revocation list"):
        found = x509.load_pem_x509_crl(data)
        key = _public_key(authority)
        if found.issuer != authority.subject or not found.is_signature_valid(key):
            raise PeerNotTrustedError("a revocation list that is not of this fleet's authority")
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        return Revocations(number, frozenset(entry.serial_number for entry in found))


def peer_of_identity(
    identity: x509.Certificate, authority: x509.Certificate, at: datetime.datetime
) -> tuple[Peer, Ed25519PublicKey]:
    """Whose an identity certificate is, and the key that its holder signs with.

    Raises CertificateMalformedError, PeerNotTrustedError, CertificateExpiredError.
    """
    with _well_formed("identity"):
        _check_issued(identity, authority)
        constraints = _extension(identity, x509.BasicConstraints)
        usage = _extension(identity, x509.KeyUsage)
        if (constraints.ca, constraints.path_length) != (True, 0) or not usage.digital_signature:
            raise CertificateMalformedError("a certificate that is no identity")
        peer = Peer(
            check_name(_common_name(identity.subject)),
            _role(identity.subject),
            identity.serial_number,
        )
        key = _public_key(identity)
    _check_time(identity, at)
    return peer, key


def peer_of_chain(
    chain: Sequence[x509.Certificate], authority: x509.Certificate, at: datetime.datetime
) -> Peer:
    """Whose a leaf is: `chain` is the leaf, its identity, and whatever more was found above.

    A leaf has exactly one DNS name, the very one of its identity: the constraint there would allow
    names below it too, which may be other hosts'. Raises TlsError.
    """
    if len(chain) != 3:
        raise CertificateMalformedError(f"a chain of {len(chain)} certificates instead of 3")
    leaf, identity, _ = chain
    peer, _ = peer_of_identity(identity, authority, at)
    _check_issued(leaf, identity)
    with _well_formed("certificate"):
        names = list(_extension(leaf, x509.SubjectAlternativeName))
    dns = [one.value for one in names if isinstance(one, x509.DNSName)]
    others = [one for one in names if not isinstance(one, x509.DNSName | x509.IPAddress)]
    if len(dns) != 1 or others:
        raise CertificateMalformedError(f"a certificate is for exactly one host, not {names}")
    if dns[0] != peer.name:
        raise CertificateMalformedError(f"{peer.name} can't speak as {dns[0]}")
    return peer


def check_not_revoked(peer: Peer, revoked: Collection[int]) -> None:
    """Raises CertificateRevokedError."""
    if peer.serial in revoked:
        raise CertificateRevokedError(f"the identity of {peer} ({peer.serial:x}) was revoked")


def name_of(certificate: x509.Certificate) -> str:
    """The common name of its subject."""
    return _common_name(certificate.subject)


def expiry_of(certificate: x509.Certificate) -> datetime.datetime:
    return certificate.not_valid_after_utc


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    at: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    *, certificates: bool = False, revocations: bool = False, signatures: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signatures,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=revocations,
        encipher_only=False,
        decipher_only=False,
    )


def _extension(certificate: x509.Certificate, kind: type[_T]) -> _T:
    return certificate.extensions.get_extension_for_class(kind).value


def _public_key(certificate: x509.Certificate) -> Ed25519PublicKey:
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateMalformedError("a key of another kind than Ed25519")
    return key


def _common_name(name: x509.Name) -> str:
    return _only(name, NameOID.COMMON_NAME)


def _role(name: x509.Name) -> Role:
    return Role(_only(name, NameOID.ORGANIZATIONAL_UNIT_NAME))


def _only(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    found = name.get_attributes_for_oid(kind)
    if len(found) != 1:
        raise CertificateMalformedError(f"{name.rfc4514_string()!r} is no identity")
    return str(found[0].value)


def _check_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    strange = PeerNotTrustedError("a certificate that this fleet's authority did not sign")
    with _well_formed("certificate"):
        if certificate.issuer != authority.subject:
            raise strange
        try:
            certificate.verify_directly_issued_by(authority)
        except InvalidSignature as error:
            raise strange from error


def _check_time(certificate: x509.Certificate, at: datetime.datetime) -> None:
    with _well_formed("certificate"):
        is_valid = certificate.not_valid_before_utc <= at <= expiry_of(certificate)
    if not is_valid:
        raise CertificateExpiredError(
            f"a certificate that holds from {certificate.not_valid_before_utc:%F %R}"
            f" to {expiry_of(certificate):%F %R} UTC"
        )


@contextmanager
def _well_formed(what: str) -> Iterator[None]:
    """The library reads lazily: any access may find what is not as RFC 5280 has it."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.ExtensionNotFound,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise CertificateMalformedError(f"this is no {what} of a fleet: {error}") from error
