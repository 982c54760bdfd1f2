"""Connections on loopback: what each end hears when they can't be made, and how they end."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from tests.identities import Fleet
from transport import certificates, identity, sealed_files, tls
from transport.errors import (
    CertificateExpiredError,
    CertificateRevokedError,
    PeerNameMismatchError,
    PeerNotTrustedError,
    StreamBrokenError,
    TlsError,
    TransportError,
)
from transport.identity import HostIdentity, IdentityPaths, TlsIdentity, peer_of

NAME = "target.test"


@contextmanager
def server(context: ssl.SSLContext) -> Iterator[tuple[int, list[object]]]:
    """Accepts one connection and echoes a byte; yields the port and what happened to it."""
    outcome: list[object] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            stream = tls.accepted(listening.accept()[0], context)
        except (TransportError, OSError) as error:
            outcome.append(error)
            return
        try:
            tls.shake_hands(stream)
            outcome.append(peer_of(stream).name)
            stream.sendall(stream.recv(1))
        except TransportError as error:
            outcome.append(error)
        finally:
            tls.part(stream)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1], outcome
    finally:
        with socket.socket() as waking:  # in case that nobody came
            waking.connect_ex(listening.getsockname())
        thread.join()
        listening.close()


def talk(port: int, context: ssl.SSLContext, name: str = NAME) -> ssl.SSLSocket:
    """Connect, and read once: in TLS 1.3 that is when a client hears that it was refused."""
    stream = tls.connect("127.0.0.1", port, context, server_name=name)
    try:
        with tls.handshake_errors(name):
            stream.sendall(b"x")
            if stream.recv(1) != b"x":
                raise StreamBrokenError("the server left without a word")
    except BaseException:
        stream.close()
        raise
    return stream


@pytest.fixture
def client(fleet: Fleet) -> ssl.SSLContext:
    return HostIdentity.load(fleet.host("source.test")).client_context()


def accepting(paths: IdentityPaths) -> ssl.SSLContext:
    return TlsIdentity(paths).server_context()


def expired(paths: IdentityPaths) -> TlsIdentity:
    """A host that has missed to renew."""
    (key, owner), leaf_key = identity.read_identity(paths), Ed25519PrivateKey.generate()
    at = identity.now() - certificates.LEAF_LIFE - datetime.timedelta(minutes=1)
    leaf = certificates.make_leaf(leaf_key.public_key(), identity=owner, identity_key=key, at=at)
    chain = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, owner))
    sealed_files.replace(paths.leaf, identity.private_pem(leaf_key) + chain)
    return TlsIdentity(paths)


def test_both_sides_know_each_other(fleet: Fleet, client: ssl.SSLContext) -> None:
    with server(accepting(fleet.host(NAME))) as (port, outcome), talk(port, client) as stream:
        assert stream.version() == "TLSv1.3"
        assert peer_of(stream).name == NAME
    assert outcome == ["source.test"]


@pytest.mark.parametrize("wrong", ["fleet", "name", "expired", "revoked"])
def test_a_client_refuses_a_server(
    fleet: Fleet, client: ssl.SSLContext, tmp_path_factory: pytest.TempPathFactory, wrong: str
) -> None:
    paths, error = fleet.host(NAME), TlsError
    if wrong == "fleet":
        paths, error = Fleet(tmp_path_factory.mktemp("other")).host(NAME), PeerNotTrustedError
    elif wrong == "name":
        paths, error = fleet.host("other.test"), PeerNameMismatchError
    elif wrong == "expired":
        paths, error = expired(paths).paths, CertificateExpiredError
    else:
        knowing = HostIdentity.load(fleet.host("source.test"))
        knowing.take_revocations(fleet.revoke(paths))
        client, error = knowing.client_context(), CertificateRevokedError
    with server(accepting(paths)) as (port, outcome), pytest.raises(error):
        talk(port, client)
    # What only the fleet refuses is refused after the handshake, with silence.
    silent = [] if wrong != "revoked" else [outcome.pop(0)]
    assert silent in ([], ["source.test"])
    assert all(isinstance(one, TransportError) for one in outcome)


def test_a_server_refuses_a_client_and_both_hear_why(
    fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Fleet(tmp_path_factory.mktemp("other")).host("source.test")
    for path, data in (
        (other.ca, fleet.authority.certificate_pem),
        (other.crl, fleet.authority.crl_pem),
    ):
        sealed_files.replace(path, data)
    late = expired(fleet.host("source.test"))
    target = accepting(fleet.host(NAME))
    for caller, error in (
        (TlsIdentity(other), PeerNotTrustedError),
        (late, CertificateExpiredError),
    ):
        with server(target) as (port, outcome), pytest.raises(error):
            talk(port, caller.client_context())
        assert isinstance(outcome[0], error)


def test_a_server_that_does_not_speak_tls_is_no_server(client: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            plain, _ = listening.accept()
            with plain:
                plain.sendall(b"220 mail\r\n")
                plain.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TlsError):
            talk(listening.getsockname()[1], client)
        thread.join()


def test_nobody_listens(client: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(StreamBrokenError, match=str(port)):
        talk(port, client)


def test_cutting_ends_a_blocked_read(fleet: Fleet, client: ssl.SSLContext) -> None:
    with server(accepting(fleet.host(NAME))) as (port, _):
        stream = tls.connect("127.0.0.1", port, client, server_name=NAME)
        ended = threading.Event()

        def read() -> None:
            with suppress(OSError):
                stream.recv(1)
            ended.set()

        thread = threading.Thread(target=read)
        thread.start()
        tls.cut(stream)
        assert ended.wait(10)
        thread.join()
        tls.cut(stream)  # once more does no harm
        stream.close()
        tls.cut(stream)
