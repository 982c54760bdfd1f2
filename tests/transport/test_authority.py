"""The fleet's authority and enrolment: what is signed, for whom, and what stays after a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.identities import Fleet
from transport import authority, certificates, enrolment, identity
from transport.authority import Authority
from transport.certificates import Role
from transport.errors import (
    AuthorityUnusableError,
    CertificateMalformedError,
    CertificateRevokedError,
    IdentityUnusableError,
    PassphraseWrongError,
    PeerNotTrustedError,
)
from transport.identity import HostIdentity, IdentityPaths

PASSPHRASE = b"correct horse battery"


@pytest.fixture(autouse=True)
def quick_kdf(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs a thief time would cost these tests time."""
    monkeypatch.setattr(authority, "_KDF_ROUNDS", 1)


def install(paths: IdentityPaths, signer: Authority, pem: bytes, **more: bool) -> HostIdentity:
    return enrolment.install(
        paths, ca=signer.certificate_pem, crl=signer.crl_pem, certificate=pem, **more
    )


def test_an_authority_is_kept_and_opened_again(tmp_path: Path) -> None:
    directory = tmp_path / "fleet"
    made = Authority.create(directory, PASSPHRASE)
    with pytest.raises(AuthorityUnusableError, match="already"):
        Authority.create(directory, PASSPHRASE)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600, 0o700}
    assert PASSPHRASE not in b"".join(path.read_bytes() for path in directory.glob("*.*"))

    again = Authority.open(directory, PASSPHRASE)
    assert again.certificate_pem == made.certificate_pem
    paths = IdentityPaths(tmp_path / "host")
    pem = again.issue(enrolment.request(paths, "alpha"), "alpha", Role.HOST)
    host = install(paths, again, pem)
    person = IdentityPaths(tmp_path / "person")
    pem = made.issue(enrolment.request(person, "alice"), "alice", Role.OPERATOR)
    operator = install(person, made, pem)

    assert [one.peer for one in made.issued()] == [operator.owner, host.owner]
    made.revoke(operator.owner.serial)
    again.revoke(0x77)  # it knows of the other's list
    known = Authority.open(directory, PASSPHRASE)
    assert [one.revoked for one in known.issued()] == [True, False]
    host.take_revocations(known.crl_pem)
    assert host.revocations == certificates.Revocations(3, frozenset({operator.owner.serial, 0x77}))


def test_a_passphrase_opens_it(tmp_path: Path) -> None:
    with pytest.raises(PassphraseWrongError):
        Authority.create(tmp_path / "fleet", b"short")
    Authority.create(tmp_path / "fleet", PASSPHRASE)
    with pytest.raises(PassphraseWrongError):
        Authority.open(tmp_path / "fleet", b"correct horse")
    with pytest.raises(PassphraseWrongError):
        Authority.open(tmp_path / "fleet", b"")


def test_what_is_no_authority(tmp_path: Path) -> None:
    with pytest.raises(AuthorityUnusableError, match="no authority"):
        Authority.open(tmp_path, PASSPHRASE)
    Authority.create(tmp_path / "one", PASSPHRASE)
    Authority.create(tmp_path / "two", PASSPHRASE)
    (tmp_path / "one/ca.key").chmod(0o644)
    with pytest.raises(AuthorityUnusableError, match="0644"):
        Authority.open(tmp_path / "one", PASSPHRASE)
    (tmp_path / "two/ca.key").write_bytes((tmp_path / "one/ca.key").read_bytes())
    with pytest.raises(AuthorityUnusableError, match="not one authority"):
        Authority.open(tmp_path / "two", PASSPHRASE)
    (tmp_path / "two/ca.key").write_bytes(b"")
    with pytest.raises(PassphraseWrongError):
        Authority.open(tmp_path / "two", PASSPHRASE)


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", "a.", "*", "*.example.com", "a/b", "ä", "a_b", "a\0b", "a" * 65]
)
def test_names_that_no_host_can_have(fleet: Fleet, tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateMalformedError):
        enrolment.request(IdentityPaths(tmp_path / "host"), name)
    csr = enrolment.request(IdentityPaths(tmp_path / "host"), "alpha")
    with pytest.raises(CertificateMalformedError):
        fleet.authority.issue(csr, name, Role.HOST)
    assert fleet.authority.issued() == []


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_request_is_for_its_own_name_and_key(fleet: Fleet, tmp_path: Path) -> None:
    paths = IdentityPaths(tmp_path / "host")
    csr = enrolment.request(paths, "alpha")
    assert requested_key(enrolment.request(paths, "alpha")) == requested_key(csr)
    with pytest.raises(CertificateMalformedError, match="alpha"):
        fleet.authority.issue(csr, "beta", Role.HOST)
    middle = len(csr) // 2
    altered = (
        csr[:middle] + (b"A" if csr[middle : middle + 1] != b"A" else b"B") + csr[middle + 1 :]
    )
    for wrong in (b"", b"x" * 5000, csr[:-40], altered, request_by_ecdsa("alpha")):
        with pytest.raises(CertificateMalformedError):
            fleet.authority.issue(wrong, "alpha", Role.HOST)
    with pytest.raises(CertificateMalformedError):
        fleet.authority.issue(csr, "alpha", Role.HOST, ("10.0.0.256",))


def requested_key(csr: bytes) -> object:
    return x509.load_pem_x509_csr(csr).public_key()


def request_by_ecdsa(name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
    return made.public_bytes(Encoding.PEM)


def test_nothing_but_the_key_is_taken_from_a_request(fleet: Fleet, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "alpha"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "operator"),
        ]
    )
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=9), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("beta")]), critical=False)
        .sign(key, None)
    )
    pem = fleet.authority.issue(csr.public_bytes(Encoding.PEM), "alpha", Role.HOST)
    made = certificates.read_certificate(pem)
    names = made.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    assert [one.value for one in names] == ["host"]
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.path_length == 0
    with pytest.raises(x509.ExtensionNotFound):
        made.extensions.get_extension_for_class(x509.SubjectAlternativeName)


# --- on the host ---


def test_an_answer_is_installed_only_whole(fleet: Fleet, tmp_path: Path) -> None:
    signer, paths = fleet.authority, IdentityPaths(tmp_path / "host")
    pem = signer.issue(enrolment.request(paths, "alpha"), "alpha", Role.HOST)
    other = Authority.temporary()
    parts: dict[str, Any] = {
        "ca": signer.certificate_pem,
        "crl": signer.crl_pem,
        "certificate": pem,
    }
    key = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alpha")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, None)
    not_ours = signer.issue(csr.public_bytes(Encoding.PEM), "alpha", Role.HOST)
    for wrong in (
        {"ca": other.certificate_pem},
        {"crl": other.crl_pem},
        {"certificate": not_ours},
        {"certificate": signer.certificate_pem},
        {"ca": pem},
        {"ca": b""},
        {"crl": b""},
        {"certificate": b"x" * 9000},
    ):
        with pytest.raises(PeerNotTrustedError):
            enrolment.install(paths, **{**parts, **wrong})
        assert [path.name for path in paths.directory.iterdir()] == ["pending.key"]
    host = enrolment.install(paths, **parts)
    assert enrolment.install(paths, **parts).owner == host.owner
    signer.revoke(host.owner.serial)
    with pytest.raises(CertificateRevokedError):
        install(paths, signer, pem)


def test_the_present_identity_works_until_the_answer_is_there(fleet: Fleet) -> None:
    paths = fleet.host("alpha")
    former = HostIdentity.load(paths).owner
    csr = enrolment.request(paths, "alpha")
    assert HostIdentity.load(paths).owner == former
    pem = fleet.authority.issue(csr, "alpha", Role.HOST)
    assert install(paths, fleet.authority, pem).owner.serial != former.serial
    assert not enrolment.pending_key(paths).exists()


def test_an_older_list_is_not_installed_over_a_newer_one(fleet: Fleet) -> None:
    paths, old = fleet.host("alpha"), fleet.authority.crl_pem
    host = HostIdentity.load(paths)
    host.take_revocations(fleet.revoke(fleet.host("beta")))
    pem = ssl.DER_cert_to_PEM_cert(host.certificate_der).encode()
    again = enrolment.install(paths, ca=fleet.authority.certificate_pem, crl=old, certificate=pem)
    assert again.revocations.number == 2


def test_a_host_leaves_its_fleet_only_when_told_to(fleet: Fleet) -> None:
    paths, other = fleet.host("alpha"), Authority.temporary()
    former = HostIdentity.load(paths).owner
    pem = other.issue(enrolment.request(paths, "alpha"), "alpha", Role.HOST)
    with pytest.raises(PeerNotTrustedError, match="another fleet"):
        install(paths, other, pem)
    assert HostIdentity.load(paths).owner == former
    moved = install(paths, other, pem, new_fleet=True)
    assert identity.verify_certificate(moved.certificate_der, paths, identity.now())


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityUnusableError):
        enrolment.request(IdentityPaths(tmp_path / "file" / "tls"), "alpha")
    with pytest.raises(AuthorityUnusableError):
        Authority.create(tmp_path / "file" / "fleet", PASSPHRASE)
