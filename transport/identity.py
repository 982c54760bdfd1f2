"""Who this host is, and who the other side of a TLS stream has proven to be.

One directory (0700) holds a host's files (0600), PEM, each replaced by one rename::

    ca.pem        the certificate of the fleet's authority
    crl.pem       the identities that the authority has taken back
    identity.pem  this host's private key, then its identity certificate
    host.pem      the key of the present leaf, the leaf, and the identity certificate again

`TlsIdentity` needs no `identity.pem`: who only speaks TLS has nothing in its hands that is worth
anything tomorrow. Every check of a peer is made inside the handshake, by the classes of streams
that the contexts make: no user of a context can forget one, blocking or asyncio. In each handshake
the files are looked at, and changed ones taken, so a renewal or a revocation needs no restart. What
a peer sends is not given to anybody once its revocation is known, however old the connection is.

It must not know what travels.
"""

from __future__ import annotations

import datetime
import ssl
import sys
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from transport import certificates, sealed_files
from transport.certificates import Peer, Role
from transport.errors import (
    CertificateRevokedError,
    IdentityUnusableError,
    PeerNotTrustedError,
    RoleNotAllowedError,
    SignatureWrongError,
    TlsError,
)
from transport.identity_paths import IdentityPaths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography import x509

__all__ = [
    "HostIdentity",
    "IdentityPaths",
    "Peer",
    "PeerRefused",
    "Role",
    "TlsIdentity",
    "now",
    "peer_of",
    "private_pem",
    "read_identity",
    "verify_certificate",
    "verify_signature",
]

# What a host signs can't be taken for a certificate, which it signs with the same key: DER begins
# with 0x30.
_DOMAIN = b"dolly signature 1\0"
_BEGIN = b"-----BEGIN CERTIFICATE-----"

_T = TypeVar("_T")


class PeerRefused(ssl.SSLCertVerificationError):
    """OpenSSL is content with the peer, and this fleet is not: `refusal` says why.

    An error of `ssl`, since those are what asyncio and aiohttp expect of a handshake.
    """

    def __init__(self, refusal: TlsError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.verify_message = str(refusal)


class _FleetContext(ssl.SSLContext):
    """A context whose streams have the trust that they judge their peers by."""

    trust: _Trust
    revoked: _Revoked


class _FleetSocket(ssl.SSLSocket):
    """A TLS socket that has no peer but one that the fleet knows."""

    peer: Peer | None = None

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        self.peer = _judged(self)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - as in ssl
        """What `recv` and `recv_into` call."""
        received = super().read(len, buffer)
        _check_not_revoked(self, self.peer)
        return received


class _FleetObject(ssl.SSLObject):
    """The same for asyncio."""

    peer: Peer | None = None

    def do_handshake(self) -> None:
        super().do_handshake()
        self.peer = _judged(self)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - as in ssl
        received = super().read(len, buffer)
        _check_not_revoked(self, self.peer)
        return received


def peer_of(stream: object) -> Peer:
    """Who the other side of a TLS stream is, its handshake done. Raises PeerNotTrustedError."""
    peer = getattr(stream, "peer", None)
    if not isinstance(peer, Peer):
        raise PeerNotTrustedError("a connection that has proven nothing")
    return peer


class TlsIdentity:
    """What it takes to speak TLS as this host. Any thread."""

    def __init__(self, paths: IdentityPaths) -> None:
        """Raises TlsError."""
        self.paths = paths
        revoked = _Revoked()
        self._tls = _Watched((paths.ca, paths.crl, paths.leaf), lambda: _TlsFiles(paths, revoked))
        trust = self._tls.present().trust
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, paths, trust, revoked)
        # Called in each handshake, with a name or without: OpenSSL's final_server_name.
        self._server.sni_callback = self._give_present

    def server_context(self) -> ssl.SSLContext:
        """For accepting, for ever: each handshake is made with the files of its moment."""
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """For calling now: it stays with the files of this moment."""
        return self._tls.present().calling

    def refresh(self) -> None:
        """Look at the files now. What was revoked meanwhile ends connections that are open."""
        self._tls.present()

    @property
    def fleet(self) -> str:
        """What the fleet's authority is called; no two are called the same."""
        return certificates.name_of(self._tls.present().trust.authority)

    @property
    def revocations(self) -> certificates.Revocations:
        """What this host knows to be revoked."""
        return self._tls.present().trust.revocations

    def _give_present(
        self, stream: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        del name, context
        stream.context = self._tls.present().accepting


class HostIdentity(TlsIdentity):
    """The identity of this host, or of an operator: with the key that signs. Any thread."""

    def __init__(self, paths: IdentityPaths) -> None:
        """Raises TlsError: IdentityUnusableError, CertificateExpiredError, …RevokedError."""
        self._own = _Watched((paths.ca, paths.identity), lambda: _OwnFiles(paths))
        certificates.check_not_revoked(self.owner, _Trust(paths).revocations.serials)
        self.paths = paths
        self.renew()
        super().__init__(paths)

    @classmethod
    def load(cls, paths: IdentityPaths) -> HostIdentity:
        """What is in the files, with a leaf that holds for half a day at least. Raises TlsError."""
        return cls(paths)

    @property
    def owner(self) -> Peer:
        """Who this host is to others."""
        return self._own.present().owner

    @property
    def certificate_der(self) -> bytes:
        """The identity certificate, for whoever has to verify a signature."""
        return self._own.present().certificate.public_bytes(Encoding.DER)

    @property
    def expires(self) -> datetime.datetime:
        """When this host has to be enrolled anew."""
        return certificates.expiry_of(self._own.present().certificate)

    def sign(self, data: bytes) -> bytes:
        """64 bytes for `verify_signature`."""
        return self._own.present().key.sign(_DOMAIN + data)

    def renew(self) -> bool:
        """Make a new leaf if half of the present one's life is over; whether it was made.

        Raises TlsError.
        """
        own = self._own.present()
        if not _is_due(self.paths.leaf, own.certificate):
            return False
        key = Ed25519PrivateKey.generate()
        leaf = certificates.make_leaf(
            key.public_key(), identity=own.certificate, identity_key=own.key, at=now()
        )
        chain = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, own.certificate))
        try:
            sealed_files.replace(self.paths.leaf, private_pem(key) + chain)
        except OSError as error:
            raise IdentityUnusableError(f"cannot renew {self.paths.leaf}: {error}") from error
        return True

    def take_revocations(self, pem: bytes) -> bool:
        """Keep a list that the authority has signed, if it is newer; whether it was.

        Raises CertificateMalformedError, PeerNotTrustedError, IdentityUnusableError.
        """
        try:
            with sealed_files.locked(self.paths.directory):
                known = _Trust(self.paths)
                brought = certificates.read_revocations(pem, known.authority)
                if brought.number <= known.revocations.number:
                    return False
                sealed_files.replace(self.paths.crl, pem)
        except OSError as error:
            raise IdentityUnusableError(f"cannot write {self.paths.crl}: {error}") from error
        self.refresh()
        return True


def read_identity(paths: IdentityPaths) -> tuple[Ed25519PrivateKey, x509.Certificate]:
    """Key and certificate of `identity.pem`. Raises IdentityUnusableError, …MalformedError."""
    pem = _read(paths.identity, is_secret=True)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityUnusableError(f"{paths.identity} holds no private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityUnusableError(f"{paths.identity} holds a key of another kind than Ed25519")
    found = _certificates_in(pem)
    if len(found) != 1:
        raise IdentityUnusableError(f"{paths.identity} holds {len(found)} certificates, not one")
    return key, certificates.read_certificate(found[0])


def verify_certificate(
    der: bytes, paths: IdentityPaths, at: datetime.datetime
) -> tuple[Peer, Ed25519PublicKey]:
    """Whose an identity certificate is that came with a signature, and the key to verify it with.

    It is of this fleet's authority, holds at the time `at`, and is not revoked. Raises TlsError.
    """
    trust = _Trust(paths)
    identity = certificates.read_certificate(der)
    peer, key = certificates.peer_of_identity(identity, trust.authority, at)
    certificates.check_not_revoked(peer, trust.revocations.serials)
    return peer, key


def verify_signature(key: Ed25519PublicKey, signature: bytes, data: bytes) -> None:
    """Raises SignatureWrongError."""
    try:
        key.verify(signature, _DOMAIN + data)
    except InvalidSignature as error:
        raise SignatureWrongError("the signature is not of this key, or of other bytes") from error


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """PKCS8, not encrypted: for a file that only its owner can read."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def now() -> datetime.datetime:
    """What certificates are judged by."""
    return datetime.datetime.now(datetime.UTC)


class _Trust:
    """The authority and its revocations."""

    def __init__(self, paths: IdentityPaths) -> None:
        self.authority = certificates.read_authority(_read(paths.ca), now())
        self.revocations = certificates.read_revocations(_read(paths.crl), self.authority)


class _Revoked:
    """The serials of the latest list: of all connections of a process, old ones too."""

    serials: frozenset[int] = frozenset()


class _TlsFiles:
    """What can be done with one state of the files that TLS needs."""

    def __init__(self, paths: IdentityPaths, revoked: _Revoked) -> None:
        _read(paths.leaf, is_secret=True)
        self.trust = _Trust(paths)
        self.accepting = _context(ssl.PROTOCOL_TLS_SERVER, paths, self.trust, revoked)
        self.calling = _context(ssl.PROTOCOL_TLS_CLIENT, paths, self.trust, revoked)
        revoked.serials = self.trust.revocations.serials


class _OwnFiles:
    """The key of `identity.pem` and what the authority says about it."""

    def __init__(self, paths: IdentityPaths) -> None:
        self.key, self.certificate = read_identity(paths)
        self.owner, public_key = certificates.peer_of_identity(
            self.certificate, certificates.read_authority(_read(paths.ca), now()), now()
        )
        if self.key.public_key() != public_key:
            raise IdentityUnusableError(f"{paths.identity}: the key is not the certificate's")


class _Watched(Generic[_T]):
    """Something made of files, made again when one of them was replaced. Any thread.

    Files that can't be used leave in place what was made before; the first ones have to be good.
    """

    def __init__(self, files: tuple[Path, ...], make: Callable[[], _T]) -> None:
        self._files = files
        self._make = make
        self._lock = threading.Lock()
        self._seen = self._look()
        self._present = make()

    def present(self) -> _T:
        with self._lock:
            if (seen := self._look()) != self._seen:
                self._seen = seen
                try:
                    self._present = self._make()
                except TlsError as error:
                    log = structlog.get_logger("transport")
                    log.warning("identity not taken anew", why=str(error))
            return self._present

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state_of(path) for path in self._files]


def _context(side: int, paths: IdentityPaths, trust: _Trust, revoked: _Revoked) -> _FleetContext:
    """TLS 1.3, a certificate of the authority from whoever is there. A client checks the name."""
    context = _FleetContext(side)
    context.sslsocket_class = _FleetSocket
    context.sslobject_class = _FleetObject
    context.trust = trust
    context.revoked = revoked
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if side == ssl.PROTOCOL_TLS_SERVER:
        # Streams are few and long: tickets for resumption would only be one more secret about.
        context.num_tickets = 0
    try:
        context.load_verify_locations(cadata=trust.authority.public_bytes(Encoding.DER))
        context.load_cert_chain(paths.leaf)
    except (OSError, ssl.SSLError) as error:
        raise IdentityUnusableError(f"cannot load {paths.leaf}: {error}") from error
    return context


def _judged(stream: ssl.SSLSocket | ssl.SSLObject) -> Peer:
    """The peer of a finished handshake, if it may be spoken to. Raises PeerRefused."""
    context = stream.context
    assert isinstance(context, _FleetContext)
    try:
        chain = [certificates.read_certificate(one) for one in _verified_chain(stream)]
        peer = certificates.peer_of_chain(chain, context.trust.authority, now())
        certificates.check_not_revoked(peer, context.revoked.serials)
        if not stream.server_side and peer.role is not Role.HOST:
            raise RoleNotAllowedError(f"{peer} is no host")
    except TlsError as refusal:
        raise PeerRefused(refusal) from refusal
    return peer


def _check_not_revoked(stream: ssl.SSLSocket | ssl.SSLObject, peer: Peer | None) -> None:
    """Raises PeerRefused."""
    context = stream.context
    assert isinstance(context, _FleetContext)
    if peer is not None and peer.serial in context.revoked.serials:
        raise PeerRefused(CertificateRevokedError(f"the identity of {peer} has been revoked"))


def _verified_chain(stream: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    """The certificates that OpenSSL has verified, the leaf first, the authority last."""
    if sys.version_info >= (3, 13):
        return stream.get_verified_chain()
    # The same, before it was given a public name (CPython 3.10, Modules/_ssl.c).
    inner: Any = vars(stream)["_sslobj"]
    return [one.public_bytes().encode() for one in inner.get_verified_chain()]


def _is_due(path: Path, own: x509.Certificate) -> bool:
    """Whether another leaf has to be made: half of its life is over, or it is not of `own`."""
    try:
        found = _certificates_in(_read(path, is_secret=True))
        leaf, identity = (certificates.read_certificate(one) for one in found)
        half = leaf.not_valid_before_utc + certificates.BACKDATE + certificates.LEAF_LIFE / 2
    except (TlsError, ValueError):
        return True
    return identity != own or not leaf.not_valid_before_utc <= now() < half


def _certificates_in(pem: bytes) -> list[bytes]:
    """Each certificate of a PEM file, which may hold a key before them."""
    _, *found = pem.split(_BEGIN)
    return [_BEGIN + one for one in found]


def _read(path: Path, *, is_secret: bool = False) -> bytes:
    try:
        return sealed_files.read_secret(path) if is_secret else sealed_files.read(path)
    except FileNotFoundError as error:
        raise IdentityUnusableError(f"there is no {path}") from error
    except OSError as error:
        raise IdentityUnusableError(f"cannot read {path}: {error}") from error


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
