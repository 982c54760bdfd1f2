"""The identities of a lab, judged by the TLS and SSH implementations that meet them."""

from __future__ import annotations

import io
import socket
import ssl
import threading
from pathlib import Path

import paramiko
import pytest

from bench.lab.pki import Credential, LabAuthority, make_ssh_key


def _context(
    directory: Path, authority: LabAuthority, credential: Credential, *, server: bool
) -> ssl.SSLContext:
    side = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # OpenSSL's strictest reading of RFC 5280; Python's default from 3.13 on.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=authority.certificate)
    chain = directory / f"{server}.pem"
    chain.write_text(credential.certificate + credential.key)
    context.load_cert_chain(chain)
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """The host name in the client's certificate, as the server saw it."""
    ours, theirs = socket.socketpair()
    peer: list[str] = []

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as wrapped:
                certificate = wrapped.getpeercert()
                assert certificate is not None
                peer.extend(value for kind, value in certificate["subjectAltName"] if kind == "DNS")
                wrapped.sendall(b"!")
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as wrapped:
            wrapped.recv(1)
    finally:
        ours.close()
        thread.join()
    return peer[0]


@pytest.mark.parametrize("name", ["B", "b", "10.77.0.102", "fd77::102"])
def test_two_hosts_know_each_other_by_name_and_address(tmp_path: Path, name: str) -> None:
    authority = LabAuthority("test")
    server = authority.issue("B", ["10.77.0.102", "fd77::102"])
    client = authority.issue("A", ["10.77.0.101"])
    peer = _handshake(
        _context(tmp_path, authority, server, server=True),
        _context(tmp_path, authority, client, server=False),
        name,
    )
    assert peer == "A"


def test_a_host_is_not_taken_for_another(tmp_path: Path) -> None:
    authority = LabAuthority("test")
    server = _context(tmp_path, authority, authority.issue("B", ["10.77.0.102"]), server=True)
    client = _context(tmp_path, authority, authority.issue("A", []), server=False)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(server, client, "C")


def test_a_host_of_another_lab_is_a_stranger(tmp_path: Path) -> None:
    authority, other = LabAuthority("test"), LabAuthority("test")
    server = _context(tmp_path, authority, other.issue("B", []), server=True)
    client = _context(tmp_path, authority, authority.issue("A", []), server=False)
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, client, "B")


def test_ssh_reads_the_keys() -> None:
    key = make_ssh_key()
    loaded = paramiko.Ed25519Key.from_private_key(io.StringIO(key.private))
    assert f"ssh-ed25519 {loaded.get_base64()}" == key.public
