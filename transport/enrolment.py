"""How a host gets its identity: it makes a key and a request, the authority answers, it installs.

The key is made here and never leaves. Until the answer is installed it lies beside the present
identity, which goes on working. Files: see `identity.py`; the pending key is `pending.key`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from transport import certificates, sealed_files
from transport.errors import IdentityUnusableError, PeerNotTrustedError
from transport.identity import HostIdentity, now, private_pem, read_identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transport.authority import Authority
    from transport.identity import IdentityPaths, Role


def request(paths: IdentityPaths, name: str) -> bytes:
    """A signing request (PEM) for `name`, with a key of this host that waits for the answer.

    Asked again before the answer it is the same key. Raises CertificateMalformedError,
    IdentityUnusableError.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, certificates.check_name(name))])
    try:
        sealed_files.make_directory(paths.directory)
        with sealed_files.locked(paths.directory):
            key = _pending(paths)
            if key is None:
                key = Ed25519PrivateKey.generate()
                sealed_files.replace(pending_key(paths), private_pem(key))
    except OSError as error:
        raise IdentityUnusableError(f"cannot make a key in {paths.directory}: {error}") from error
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, None)
    return made.public_bytes(Encoding.PEM)


def install(
    paths: IdentityPaths, *, ca: bytes, crl: bytes, certificate: bytes, new_fleet: bool = False
) -> HostIdentity:
    """Take the authority's answer, all PEM, when everything in it fits together.

    The identity of another fleet is only given up with `new_fleet`. Asked again with the same it
    changes nothing. Raises TlsError; then the former identity is as it was.
    """
    authority = certificates.read_authority(ca, now())
    revoked = certificates.read_revocations(crl, authority)
    identity = certificates.read_certificate(certificate)
    peer, public_key = certificates.peer_of_identity(identity, authority, now())
    certificates.check_not_revoked(peer, revoked.serials)
    try:
        with sealed_files.locked(paths.directory):
            key = _key_of(paths, public_key)
            if _is_of_another(paths, authority) and not new_fleet:
                raise PeerNotTrustedError("this host belongs to another fleet")
            if revoked.number > _known_number(paths, authority):
                sealed_files.replace(paths.crl, crl)
            sealed_files.replace(paths.ca, authority.public_bytes(Encoding.PEM))
            sealed_files.replace(
                paths.identity, private_pem(key) + identity.public_bytes(Encoding.PEM)
            )
            pending_key(paths).unlink(missing_ok=True)
    except OSError as error:
        raise IdentityUnusableError(f"cannot install into {paths.directory}: {error}") from error
    return HostIdentity.load(paths)


def enrol_here(
    paths: IdentityPaths,
    authority: Authority,
    name: str,
    role: Role,
    addresses: Sequence[str] = (),
) -> HostIdentity:
    """All of it on one machine, for who has the authority there. Raises TlsError."""
    certificate = authority.issue(request(paths, name), name, role, addresses)
    return install(
        paths, ca=authority.certificate_pem, crl=authority.crl_pem, certificate=certificate
    )


def pending_key(paths: IdentityPaths) -> Path:
    """Where the key of a request waits."""
    return paths.directory / "pending.key"


def _pending(paths: IdentityPaths) -> Ed25519PrivateKey | None:
    if not pending_key(paths).exists():
        return None
    key = load_pem_private_key(sealed_files.read_secret(pending_key(paths)), password=None)
    return key if isinstance(key, Ed25519PrivateKey) else None


def _key_of(paths: IdentityPaths, public: Ed25519PublicKey) -> Ed25519PrivateKey:
    """The key of the request, or of the identity that is installed already."""
    pending = _pending(paths)
    if pending is not None and pending.public_key() == public:
        return pending
    if paths.identity.exists():
        installed, _ = read_identity(paths)
        if installed.public_key() == public:
            return installed
    raise PeerNotTrustedError("the certificate is for a key that this host does not have")


def _is_of_another(paths: IdentityPaths, authority: x509.Certificate) -> bool:
    if not paths.ca.exists():
        return False
    present = certificates.read_certificate(sealed_files.read(paths.ca))
    return present.public_key() != authority.public_key()


def _known_number(paths: IdentityPaths, authority: x509.Certificate) -> int:
    """Of the list that is here; -1: there is none of this authority."""
    try:
        return certificates.read_revocations(sealed_files.read(paths.crl), authority).number
    except (FileNotFoundError, PeerNotTrustedError):
        return -1
