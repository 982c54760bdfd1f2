"""Who is believed: real handshakes, blocking and asyncio, with every kind of wrong identity."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from structlog.testing import capture_logs

from tests.identities import Fleet
from transport import certificates, identity, sealed_files, tls
from transport.certificates import LEAF_LIFE, Role
from transport.errors import (
    CertificateExpiredError,
    CertificateMalformedError,
    CertificateRevokedError,
    IdentityUnusableError,
    PeerNotTrustedError,
    RoleNotAllowedError,
    SignatureWrongError,
    StreamBrokenError,
    TlsError,
    TransportError,
)
from transport.identity import HostIdentity, IdentityPaths, Peer, TlsIdentity, peer_of

Verdict = Peer | Exception
DAY = datetime.timedelta(days=1)
HOUR = DAY / 24


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def meet(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[Verdict, Verdict]:
    """A handshake over a pair of sockets: what the client, and the server makes of the other."""
    ours, theirs = socket.socketpair()
    verdicts: dict[str, Verdict] = {}

    def be(side: str, shake: Callable[[], ssl.SSLSocket]) -> None:
        try:
            with tls.handshake_errors(side), shake() as stream:
                verdicts[side] = peer_of(stream)
                # In TLS 1.3 a client hears by its first read that it was refused.
                stream.sendall(b"x")
                if stream.recv(1) != b"x":
                    raise StreamBrokenError("it left")
        except (TransportError, OSError) as error:
            verdicts[side] = error
        finally:
            (ours if side == "client" else theirs).close()

    def serve() -> None:
        be("server", lambda: server.wrap_socket(theirs, server_side=True))

    for one in (ours, theirs):
        one.settimeout(20)
    thread = threading.Thread(target=serve)
    thread.start()
    be("client", lambda: client.wrap_socket(ours, server_hostname=name))
    thread.join()
    return verdicts["client"], verdicts["server"]


def refused(verdict: Verdict, kind: type[Exception], match: str = "") -> bool:
    return isinstance(verdict, kind) and match in str(verdict)


def contexts(client: IdentityPaths, server: IdentityPaths) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return HostIdentity.load(client).client_context(), HostIdentity.load(server).server_context()


def test_two_hosts_know_each_other(fleet: Fleet) -> None:
    alpha, beta = fleet.host("alpha"), fleet.host("beta.example.com")
    client, server = meet(*contexts(alpha, beta), "beta.example.com")
    assert client == HostIdentity.load(beta).owner
    assert server == HostIdentity.load(alpha).owner
    assert (server.name, server.role) == ("alpha", Role.HOST)


def test_a_host_answers_to_the_addresses_that_it_was_enrolled_with(fleet: Fleet) -> None:
    beta = fleet.host("beta", ("10.0.0.2", "fd00::2"))
    for called in ("10.0.0.2", "fd00::2"):
        client, _ = meet(*contexts(fleet.host("alpha"), beta), called)
        assert isinstance(client, Peer)
        assert client.name == "beta"
    client, _ = meet(*contexts(fleet.host("alpha"), beta), "10.0.0.3")
    assert refused(client, TlsError, "mismatch")


def test_another_hosts_certificate_is_not_the_one_that_was_called(fleet: Fleet) -> None:
    client, _ = meet(*contexts(fleet.host("alpha"), fleet.host("gamma")), "beta")
    assert refused(client, TlsError, "Hostname mismatch")


def test_another_fleet(fleet: Fleet, tmp_path: Path) -> None:
    stranger = Fleet(tmp_path / "elsewhere").host("alpha")
    own = fleet.host("beta")
    client, server = meet(*contexts(stranger, own), "beta")
    assert refused(client, PeerNotTrustedError)
    client, server = meet(*contexts(own, stranger), "alpha")
    assert refused(client, PeerNotTrustedError)
    # It believes in this fleet, and its own certificate is of the other one.
    chain = sealed_files.read(stranger.leaf)
    for path, data in (
        (stranger.ca, fleet.authority.certificate_pem),
        (stranger.crl, fleet.authority.crl_pem),
        (stranger.leaf, chain),
    ):
        sealed_files.replace(path, data)
    impostor = TlsIdentity(stranger).client_context()
    client, server = meet(impostor, HostIdentity.load(own).server_context(), "beta")
    assert refused(server, PeerNotTrustedError)
    assert not isinstance(client, Peer)


def test_a_revoked_host_is_refused_by_both_sides_at_the_next_handshake(fleet: Fleet) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    server = beta.server_context()
    assert isinstance(meet(alpha.client_context(), server, "beta")[1], Peer)
    revoked = fleet.revoke(alpha.paths)
    assert beta.take_revocations(revoked)
    client, verdict = meet(alpha.client_context(), server, "beta")
    assert refused(verdict, CertificateRevokedError, "alpha")
    assert isinstance(client, StreamBrokenError)
    client, _ = meet(beta.client_context(), alpha.server_context(), "alpha")
    assert refused(client, CertificateRevokedError, "alpha")


def test_an_open_connection_ends_when_its_peer_is_revoked(fleet: Fleet) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    ours, theirs = socket.socketpair()
    calling = alpha.client_context()
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(calling.wrap_socket, ours, server_hostname="beta")
        with beta.server_context().wrap_socket(theirs, server_side=True) as server:
            buffer = bytearray(1)
            with client.result() as stream:
                stream.sendall(b"12")
                assert server.recv(1) == b"1"
                sealed_files.replace(beta.paths.crl, fleet.revoke(alpha.paths))
                assert server.recv_into(buffer) == 1  # nobody has looked at the files yet
                beta.refresh()
                stream.sendall(b"34")
                with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
                    server.recv(1)
                with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
                    server.recv_into(buffer)


def test_a_revoked_host_knows_it(fleet: Fleet) -> None:
    paths = fleet.host("alpha")
    host = HostIdentity.load(paths)
    host.take_revocations(fleet.revoke(paths))
    with pytest.raises(CertificateRevokedError):
        HostIdentity.load(paths)


def test_an_operator_calls_and_is_not_called(fleet: Fleet) -> None:
    person, host = fleet.operator("alice"), fleet.host("beta")
    _, server = meet(*contexts(person, host), "beta")
    assert isinstance(server, Peer)
    assert (server.name, server.role, str(server)) == ("alice", Role.OPERATOR, "operator alice")
    client, _ = meet(*contexts(host, person), "alice")
    assert refused(client, RoleNotAllowedError)


# --- what a host can make with the key of its own identity ---

Change = Callable[[x509.CertificateBuilder], x509.CertificateBuilder]


def show(
    paths: IdentityPaths, names: list[x509.GeneralName], *, begins: int = -1, ends: int = 1
) -> TlsIdentity:
    """A leaf that the host at `paths` has made as it likes, in place of the product's."""
    key, owner = identity.read_identity(paths)
    leaf_key, at = Ed25519PrivateKey.generate(), identity.now()
    digest = owner.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(owner.subject)
        .public_key(leaf_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at + begins * DAY)
        .not_valid_after(at + ends * DAY)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier(digest, None, None), critical=False)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(leaf_key.public_key()), critical=False
        )
        .sign(key, None)
    )
    pem = b"".join(one.public_bytes(Encoding.PEM) for one in (made, owner))
    sealed_files.replace(paths.leaf, identity.private_pem(leaf_key) + pem)
    return TlsIdentity(paths)


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName(name) for name in names]


@pytest.mark.parametrize(
    ("names", "asked", "why"),
    [
        (dns("alpha.test"), {}, ""),
        (dns("db.alpha.test"), {}, "can't speak as db.alpha.test"),
        (dns("beta"), {}, "permitted subtree violation"),
        (dns("*.alpha.test"), {}, "can't speak as"),
        (dns("alpha.test", "alpha.test"), {}, "exactly one host"),
        ([*dns("alpha.test"), x509.RFC822Name("a@b.c")], {}, "exactly one host"),
        ([*dns("alpha.test"), x509.IPAddress(ip_address("10.0.0.2"))], {}, "excluded"),
        ([x509.RFC822Name("a@b.c")], {}, "exactly one host"),
        ([], {}, "Empty Subject"),
        (dns("alpha.test"), {"ends": 0}, "expired"),
        (dns("alpha.test"), {"begins": 1, "ends": 2}, "not yet valid"),
    ],
)  # fmt: skip
def test_a_host_can_speak_for_itself_alone(
    fleet: Fleet, names: list[x509.GeneralName], asked: dict[str, int], why: str
) -> None:
    own, other = fleet.host("alpha.test"), HostIdentity.load(fleet.host("beta"))
    forger = show(own, names, **asked)
    _, server = meet(forger.client_context(), other.server_context(), "beta")
    client, _ = meet(other.client_context(), forger.server_context(), "alpha.test")
    if why:
        assert refused(server, TlsError, why)
        assert isinstance(client, TlsError)
    else:
        assert isinstance(server, Peer)
        assert isinstance(client, Peer)


def test_an_identity_is_no_leaf(fleet: Fleet) -> None:
    alpha, beta = fleet.host("alpha"), HostIdentity.load(fleet.host("beta"))
    sealed_files.replace(alpha.leaf, sealed_files.read(alpha.identity))
    _, server = meet(TlsIdentity(alpha).client_context(), beta.server_context(), "beta")
    assert refused(server, CertificateMalformedError, "chain of 2")


@pytest.mark.parametrize(
    ("name", "role", "why"),
    [
        ("alpha", Role.HOST, "chain of 4"),  # OpenSSL takes it: nothing above is a limit to it
        ("alpha", Role.OPERATOR, "path length"),
        ("beta", Role.HOST, "path length"),
    ],
)
def test_no_host_makes_identities(fleet: Fleet, name: str, role: Role, why: str) -> None:
    """One of its own name would have a serial number that no list of revocations has."""
    alpha, beta = fleet.host("alpha"), HostIdentity.load(fleet.host("beta"))
    (key, owner), at = identity.read_identity(alpha), identity.now()
    child_key, leaf_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    child = certificates.make_identity(
        child_key.public_key(), name, role, (), authority=owner, authority_key=key, at=at
    )
    leaf = certificates.make_leaf(
        leaf_key.public_key(), identity=child, identity_key=child_key, at=at
    )
    pem = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, child, owner))
    sealed_files.replace(alpha.leaf, identity.private_pem(leaf_key) + pem)
    forger = TlsIdentity(alpha)
    _, server = meet(forger.client_context(), beta.server_context(), "beta")
    assert refused(server, TlsError, why)
    client, _ = meet(beta.client_context(), forger.server_context(), name)
    assert refused(client, TlsError, why)


def test_no_certificate_at_all_and_no_older_tls(fleet: Fleet) -> None:
    beta = HostIdentity.load(fleet.host("beta"))
    bare = ssl.create_default_context(cafile=str(beta.paths.ca))
    _, server = meet(bare, beta.server_context(), "beta")
    assert refused(server, PeerNotTrustedError)
    old = HostIdentity.load(fleet.host("alpha")).client_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    _, server = meet(old, beta.server_context(), "beta")
    assert refused(server, TlsError)


# --- renewal ---


@pytest.mark.parametrize(("left", "is_due"), [(HOUR, False), (-HOUR, True)])
def test_a_leaf_is_renewed_at_half_of_its_life_without_a_restart(
    fleet: Fleet, left: datetime.timedelta, is_due: bool
) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    server = beta.server_context()
    (key, owner), leaf_key = identity.read_identity(beta.paths), Ed25519PrivateKey.generate()
    made = certificates.make_leaf(
        leaf_key.public_key(), identity=owner, identity_key=key,
        at=identity.now() - LEAF_LIFE / 2 + left,
    )  # fmt: skip
    pem = b"".join(one.public_bytes(Encoding.PEM) for one in (made, owner))
    sealed_files.replace(beta.paths.leaf, identity.private_pem(leaf_key) + pem)
    former = shown(alpha, beta)
    assert former == made.public_bytes(Encoding.DER)
    assert beta.renew() == is_due
    assert not beta.renew()
    assert server is beta.server_context()
    assert (shown(alpha, beta) != former) == is_due


def shown(client: TlsIdentity, server: TlsIdentity) -> bytes:
    """The leaf that the server shows."""
    leaf: list[bytes] = []

    class Looking(identity._FleetSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            leaf.append(self.getpeercert(binary_form=True) or b"")

    context = client.client_context()
    context.sslsocket_class = Looking
    meet(context, server.server_context(), "beta")
    return leaf[0]


def test_a_host_that_is_enrolled_again_while_it_runs(fleet: Fleet) -> None:
    running, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    former = running.owner
    fleet.host("alpha", at=running.paths.directory)
    assert running.owner.serial != former.serial
    assert not running.renew()
    _, server = meet(running.client_context(), beta.server_context(), "beta")
    assert server == running.owner
    client, _ = meet(beta.client_context(), running.server_context(), "alpha")
    assert client == running.owner
    peer, key = identity.verify_certificate(running.certificate_der, beta.paths, identity.now())
    identity.verify_signature(key, running.sign(b"x"), b"x")
    assert peer == running.owner


def test_damaged_files_leave_the_former_ones_in_force(fleet: Fleet) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    for path in (beta.paths.ca, beta.paths.crl, beta.paths.leaf):
        good = sealed_files.read(path)
        sealed_files.replace(path, b"damaged")
        with capture_logs() as lines:
            for _ in range(2):
                _, server = meet(alpha.client_context(), beta.server_context(), "beta")
                assert server == alpha.owner
        assert [line["event"] for line in lines] == ["identity not taken anew"]
        with pytest.raises(TlsError):
            TlsIdentity(beta.paths)
        sealed_files.replace(path, good)


@pytest.mark.parametrize("file", ["ca", "crl", "leaf", "identity"])
def test_an_identity_that_is_not_complete_is_none(fleet: Fleet, file: str) -> None:
    paths = fleet.host("alpha")
    getattr(paths, file).unlink()
    if file == "leaf":
        with pytest.raises(IdentityUnusableError, match=r"host\.pem"):
            TlsIdentity(paths)
        return  # the key's holder makes another
    with pytest.raises(IdentityUnusableError, match=file):
        HostIdentity.load(paths)


def test_a_key_that_others_may_read_is_not_used(fleet: Fleet) -> None:
    paths = fleet.host("alpha")
    paths.identity.chmod(0o640)
    with pytest.raises(IdentityUnusableError, match="0640"):
        HostIdentity.load(paths)
    paths.identity.chmod(0o600)
    paths.leaf.chmod(0o604)
    with pytest.raises(IdentityUnusableError, match="0604"):
        TlsIdentity(paths)


def test_all_files_are_their_owners_alone(fleet: Fleet) -> None:
    paths = fleet.host("alpha")
    assert paths.directory.stat().st_mode & 0o777 == 0o700
    files = sorted(path.name for path in paths.directory.iterdir())
    assert files == ["ca.pem", "crl.pem", "host.pem", "identity.pem"]
    assert {path.stat().st_mode & 0o777 for path in paths.directory.iterdir()} == {0o600}


# --- revocations ---


def test_revocations_only_grow(fleet: Fleet, tmp_path: Path) -> None:
    alpha, beta = fleet.host("alpha"), HostIdentity.load(fleet.host("beta"))
    old = fleet.authority.crl_pem
    new = fleet.revoke(alpha)
    assert beta.take_revocations(new)
    assert not beta.take_revocations(new)
    assert not beta.take_revocations(old)
    assert beta.revocations.number == 2
    stranger = Fleet(tmp_path / "elsewhere")
    foreign = stranger.revoke(stranger.host("alpha"), stranger.host("beta"))
    with pytest.raises(PeerNotTrustedError):
        beta.take_revocations(foreign)
    damaged = bytearray(fleet.revoke(fleet.host("gamma")))
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(PeerNotTrustedError):
        beta.take_revocations(bytes(damaged))
    with pytest.raises(CertificateMalformedError):
        beta.take_revocations(b"-----BEGIN X509 CRL-----\n" + b"A" * (2 << 20))
    assert beta.revocations.number == 2


# --- signatures and their certificates ---


def test_signatures(fleet: Fleet) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), fleet.host("beta")
    signature = alpha.sign(b"a manifest")
    peer, key = identity.verify_certificate(alpha.certificate_der, beta, identity.now())
    assert peer == alpha.owner
    identity.verify_signature(key, signature, b"a manifest")
    for wrong, data in (
        (signature, b"another"),
        (signature[:-1], b"a manifest"),
        (b"", b"a manifest"),
        (bytes(64), b"a manifest"),
        (identity.read_identity(alpha.paths)[0].sign(b"a manifest"), b"a manifest"),
    ):
        with pytest.raises(SignatureWrongError):
            identity.verify_signature(key, wrong, data)


def test_a_signers_certificate(fleet: Fleet, tmp_path: Path) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    der, at = alpha.certificate_der, identity.now()
    verify = identity.verify_certificate
    stranger = HostIdentity.load(Fleet(tmp_path / "elsewhere").host("alpha"))
    leaf = ssl.PEM_cert_to_DER_cert(
        identity._certificates_in(alpha.paths.leaf.read_bytes())[0].decode()
    )
    altered = der[:-1] + bytes([der[-1] ^ 1])
    # Signed by Ed448, says its outer part, and by Ed25519 its inner one.
    torn = b"\x2b\x65\x71".join(der.rsplit(b"\x2b\x65\x70", 1))
    unheard_of = der.replace(b"\x2b\x65\x70\x03\x21", b"\x2b\x65\x2a\x03\x21")
    assert unheard_of != der
    wrongs = (stranger.certificate_der, leaf, altered, torn, unheard_of, der[:-9], b"", b"0" * 9000)
    for wrong in wrongs:
        with pytest.raises(PeerNotTrustedError):
            verify(wrong, beta.paths, at)
    for late in (366 * DAY, -DAY):
        with pytest.raises(CertificateExpiredError):
            verify(der, beta.paths, at + late)
    beta.take_revocations(fleet.revoke(alpha.paths))
    with pytest.raises(CertificateRevokedError):
        verify(der, beta.paths, at)


# --- asyncio, which aiohttp speaks ---


async def test_asyncio_ends_a_handshake_with_a_refused_peer(fleet: Fleet) -> None:
    alpha, beta = HostIdentity.load(fleet.host("alpha")), HostIdentity.load(fleet.host("beta"))
    served: list[Peer] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(peer_of(writer.get_extra_info("ssl_object")))
        with suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(1):
                writer.write(data)
        writer.close()

    async def ask(caller: TlsIdentity) -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=caller.client_context(), server_hostname="beta"
        )
        assert peer_of(writer.get_extra_info("ssl_object")) == beta.owner
        try:
            writer.write(b"x")
            return await reader.read(1)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=beta.server_context())
    port = server.sockets[0].getsockname()[1]
    async with server:
        assert await ask(alpha) == b"x"
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=alpha.client_context(), server_hostname="beta"
        )
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        beta.take_revocations(fleet.revoke(alpha.paths))
        with suppress(ConnectionError):
            assert await ask(alpha) == b""
        # The one that was open is not served any more, either.
        writer.write(b"x")
        with suppress(ConnectionError):
            assert await reader.read(1) == b""
        writer.close()
        assert served == [alpha.owner, alpha.owner]
        gamma = HostIdentity.load(fleet.host("gamma"))
        gamma.take_revocations(fleet.revoke(beta.paths))
        with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
            await ask(gamma)
