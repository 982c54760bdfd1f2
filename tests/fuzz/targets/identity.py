"""Certificates and revocation lists: what a peer shows, and what it brings for others.

    first byte  0 a certificate, in each place of a chain | 1 a revocation list
                2 an identity that the authority has signed, whatever is in it | 3 a leaf of a host

All are DER but for the list, which is PEM. In 2 and 3 the certificate gets the signature that its
content asks for, because nothing else would ever be looked at behind it.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from transport import certificates
from transport.certificates import Revocations, Role
from transport.errors import TlsError

MAX_BYTES = 4 << 10
IS_JSON = False

SIGNATURE_BYTES = 64

_NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_AUTHORITY_KEY, _HOST_KEY, _LEAF_KEY = (
    Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3)
)
_AUTHORITY = certificates.make_authority(_AUTHORITY_KEY, "fleet", _NOW)
_IDENTITY = certificates.make_identity(
    _HOST_KEY.public_key(),
    "a.test",
    Role.HOST,
    (ipaddress.ip_address("10.0.0.1"),),
    authority=_AUTHORITY,
    authority_key=_AUTHORITY_KEY,
    at=_NOW,
)
_LEAF = certificates.make_leaf(
    _LEAF_KEY.public_key(), identity=_IDENTITY, identity_key=_HOST_KEY, at=_NOW
)


def one_input(data: bytes) -> None:
    """Nothing but TlsError may come of it; nobody is believed to be another one."""
    if not data:
        return
    content = data[1:]
    match data[0] % 4:
        case 0:
            _strange(content)
        case 1:
            with suppress(TlsError):
                certificates.read_revocations(content, _AUTHORITY)
        case 2:
            with suppress(TlsError):
                identity = certificates.read_certificate(signed(content, _AUTHORITY_KEY))
                peer, _ = certificates.peer_of_identity(identity, _AUTHORITY, _NOW)
                certificates.check_name(peer.name)
        case _:
            with suppress(TlsError):
                leaf = certificates.read_certificate(signed(content, _HOST_KEY))
                peer = certificates.peer_of_chain([leaf, _IDENTITY, _AUTHORITY], _AUTHORITY, _NOW)
                assert (peer.name, peer.role) == ("a.test", Role.HOST)


def _strange(data: bytes) -> None:
    """Nothing that our authority has not signed is believed: what it has is of one host."""
    with suppress(TlsError):
        certificates.read_authority(data, _NOW)
    with suppress(TlsError):
        found = certificates.read_certificate(data)
        with suppress(TlsError):
            peer, _ = certificates.peer_of_identity(found, _AUTHORITY, _NOW)
            assert (peer.name, peer.role) == ("a.test", Role.HOST)
        with suppress(TlsError):
            peer = certificates.peer_of_chain([found, _IDENTITY, _AUTHORITY], _AUTHORITY, _NOW)
            assert (peer.name, peer.role) == ("a.test", Role.HOST)


def signed(der: bytes, key: Ed25519PrivateKey) -> bytes:
    """A certificate with the signature of `key` over its content, if it has the usual form."""
    content = der[4:-SIGNATURE_BYTES]
    if len(content) < 4 or not content.startswith(b"\x30\x82"):
        return der
    size = 4 + int.from_bytes(content[2:4], "big")
    return der[:-SIGNATURE_BYTES] + key.sign(content[:size])


def seeds() -> Iterator[bytes]:
    for kind, certificate in (
        (0, _AUTHORITY),
        (0, _IDENTITY),
        (2, _IDENTITY),
        (0, _LEAF),
        (3, _LEAF),
    ):
        yield bytes([kind]) + certificate.public_bytes(Encoding.DER)
    revoked = certificates.make_revocations(
        Revocations(3, frozenset((5, 1 << 100))),
        authority=_AUTHORITY,
        authority_key=_AUTHORITY_KEY,
        at=_NOW,
    )
    yield b"\1" + revoked.public_bytes(Encoding.PEM)
    yield b"\0" + _LEAF.public_bytes(Encoding.PEM)


DICTIONARY = (
    b"a.test",
    b"*.test",
    b"host",
    b"operator",
    b"\x55\x1d\x11",  # subjectAltName
    b"\x55\x1d\x13",  # basicConstraints
    b"\x55\x1d\x1e",  # nameConstraints
    b"\x2b\x65\x70",  # Ed25519
    b"\x82\x06",
    b"-----BEGIN CERTIFICATE-----",
    b"-----BEGIN X509 CRL-----",
)
