"""Who may talk to whom: real handshakes on loopback, with every kind of wrong certificate."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.transport.transfer_parts import Authority
from transport import tls
from transport.errors import (
    CertificateExpiredError,
    PeerNameMismatchError,
    PeerNotTrustedError,
    StreamBrokenError,
    TlsError,
    TransportError,
)

NAME = "target.test"
PAST = datetime.datetime.now(tz=datetime.UTC) - datetime.timedelta(days=1)


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
            outcome.append(tls.peer_name(stream))
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


def test_both_sides_know_each_other(authority: Authority) -> None:
    context = tls.server_context(authority.issue(NAME))
    client = tls.client_context(authority.issue("source.test"))
    with server(context) as (port, outcome), talk(port, client) as stream:
        assert stream.version() == "TLSv1.3"
        assert tls.peer_name(stream) == NAME
    assert outcome == ["source.test"]


Wrong = Callable[[Authority, Authority], tls.TlsPaths]


@pytest.mark.parametrize(
    ("identity", "error"),
    [
        pytest.param(
            lambda good, bad: bad.issue(NAME, trusting=good), PeerNotTrustedError, id="other-ca"
        ),
        pytest.param(
            lambda good, _: good.issue(NAME, expires=PAST), CertificateExpiredError, id="expired"
        ),
        pytest.param(lambda good, _: good.issue("other.test"), PeerNameMismatchError, id="name"),
    ],
)
def test_a_client_refuses_a_server(
    authority: Authority, stranger: Authority, identity: Wrong, error: type[TlsError]
) -> None:
    context = tls.server_context(identity(authority, stranger))
    client = tls.client_context(authority.issue("source.test"))
    with server(context) as (port, outcome), pytest.raises(error):
        talk(port, client)
    assert isinstance(outcome[0], TransportError)


@pytest.mark.parametrize(
    ("identity", "seen", "told"),
    [
        pytest.param(
            lambda good, bad: bad.issue("source.test", trusting=good),
            PeerNotTrustedError,
            PeerNotTrustedError,
            id="other-ca",
        ),
        pytest.param(
            lambda good, _: good.issue("source.test", expires=PAST),
            CertificateExpiredError,
            CertificateExpiredError,
            id="expired",
        ),
    ],
)
def test_a_server_refuses_a_client_and_both_hear_why(
    authority: Authority,
    stranger: Authority,
    identity: Wrong,
    seen: type[TlsError],
    told: type[TlsError],
) -> None:
    client = tls.client_context(identity(authority, stranger))
    with (
        server(tls.server_context(authority.issue(NAME))) as (port, outcome),
        pytest.raises(told),
    ):
        talk(port, client)
    assert isinstance(outcome[0], seen)


def test_a_client_without_a_certificate_is_refused(authority: Authority) -> None:
    paths = authority.issue(NAME)
    bare = ssl.create_default_context(cafile=str(paths.ca))
    with server(tls.server_context(paths)) as (port, outcome), pytest.raises(PeerNotTrustedError):
        talk(port, bare)
    assert isinstance(outcome[0], PeerNotTrustedError)


def test_tls_1_2_is_refused_by_the_server(authority: Authority) -> None:
    paths = authority.issue(NAME)
    old = tls.client_context(paths)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with server(tls.server_context(paths)) as (port, outcome), pytest.raises(TlsError):
        talk(port, old)
    assert isinstance(outcome[0], TlsError)


def test_tls_1_2_is_refused_by_the_client(authority: Authority) -> None:
    paths = authority.issue(NAME)
    old = tls.server_context(paths)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with server(old) as (port, outcome), pytest.raises(TlsError):
        talk(port, tls.client_context(paths))
    assert isinstance(outcome[0], TlsError)


def test_a_server_that_does_not_speak_tls_is_no_server(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            plain, _ = listening.accept()
            with plain:
                plain.sendall(b"220 mail\r\n")
                plain.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TlsError):
            talk(listening.getsockname()[1], tls.client_context(authority.issue("source.test")))
        thread.join()


def test_nobody_listens(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(StreamBrokenError, match=str(port)):
        talk(port, tls.client_context(authority.issue("source.test")))


@pytest.mark.parametrize(
    "names", [("a.test", "b.test"), ("*.test",), ("127.0.0.1",)], ids=["two", "wildcard", "address"]
)
def test_an_identity_is_exactly_one_name(authority: Authority, names: tuple[str, ...]) -> None:
    client = tls.client_context(authority.issue(*names))
    context = tls.server_context(authority.issue(NAME))
    with server(context) as (port, outcome), pytest.raises(TransportError):
        talk(port, client)
    assert isinstance(outcome[0], PeerNotTrustedError)


def test_an_address_beside_the_name_does_no_harm(authority: Authority) -> None:
    client = tls.client_context(authority.issue("source.test", "127.0.0.1"))
    with server(tls.server_context(authority.issue(NAME))) as (port, outcome):
        talk(port, client).close()
    assert outcome == ["source.test"]


@pytest.mark.parametrize("make", [tls.server_context, tls.client_context])
def test_contexts_always_verify(
    authority: Authority, make: Callable[[tls.TlsPaths], ssl.SSLContext]
) -> None:
    context = make(authority.issue(NAME))
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert tls.client_context(authority.issue(NAME)).check_hostname


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_an_identity_that_cannot_be_loaded(
    authority: Authority, field: str, tmp_path: Path
) -> None:
    changed: dict[str, Any] = {field: tmp_path / "missing.pem"}
    with pytest.raises(TlsError):
        tls.client_context(replace(authority.issue(NAME), **changed))


def test_cutting_ends_a_blocked_read(authority: Authority) -> None:
    paths = authority.issue(NAME)
    with server(tls.server_context(paths)) as (port, _):
        stream = tls.connect("127.0.0.1", port, tls.client_context(paths), server_name=NAME)
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
