"""Who is not of the fleet, or not any more, or not the one: refused on both ports in one line."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from tests.hostile.scene import ADDRESS, Scene
from tests.identities import Fleet
from tests.migrate.test_front import SOURCE, TARGET
from tests.transport.transfer_parts import DEADLINE_S, RawClient, wait_until
from transport import certificates
from transport.core.frames import Answer, Status, encode_answer
from transport.identity import HostIdentity, IdentityPaths, private_pem, read_identity

DISTRUSTED = encode_answer(Answer(Status.DISTRUSTED, 0))


def caller(ca: Path, leaf: Path | None) -> ssl.SSLContext:
    """A client that shows what it has, and judges nothing of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if leaf is not None:
        context.load_cert_chain(leaf)
    return context


def of_another_fleet(scene: Scene, base: Path) -> ssl.SSLContext:
    """The very name of the session's source."""
    return caller(scene.rig.paths.tls.ca, Fleet(base / "other").host(SOURCE).leaf)


def revoked(scene: Scene, base: Path) -> ssl.SSLContext:
    del base
    paths = scene.fleet.host("gone.test")
    HostIdentity.load(scene.rig.paths.tls).take_revocations(scene.fleet.revoke(paths))
    there, here = scene.rig.paths.front / "tls" / "crl.pem", scene.rig.paths.tls.crl
    wait_until(lambda: there.read_bytes() == here.read_bytes(), "the front has the list")
    return caller(paths.ca, paths.leaf)


def expired(scene: Scene, base: Path) -> ssl.SSLContext:
    """It was good three days ago."""
    paths = scene.fleet.host("late.test")
    key, identity = read_identity(paths)
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    return caller(paths.ca, leaf_of(identity, key, then, base / "late.pem"))


def of_a_name_below(scene: Scene, base: Path) -> ssl.SSLContext:
    """A host of the fleet signs a leaf for the session's source with its own identity."""
    paths = scene.fleet.host("test")
    key, _ = read_identity(paths)
    _, source = read_identity(scene.rig.identity.paths)
    now = datetime.datetime.now(datetime.UTC)
    return caller(paths.ca, leaf_of(source, key, now, base / "below.pem", paths))


def without_one(scene: Scene, base: Path) -> ssl.SSLContext:
    del base
    return caller(scene.rig.paths.tls.ca, None)


def leaf_of(
    identity: x509.Certificate,
    identity_key: Ed25519PrivateKey,
    at: datetime.datetime,
    path: Path,
    chain: IdentityPaths | None = None,
) -> Path:
    """A leaf in a file, with its key and the identity behind it: `identity`, or that in `chain`."""
    key = Ed25519PrivateKey.generate()
    leaf = certificates.make_leaf(
        key.public_key(), identity=identity, identity_key=identity_key, at=at
    )
    behind = identity if chain is None else read_identity(chain)[1]
    shown = (leaf, behind)
    path.write_bytes(private_pem(key) + b"".join(one.public_bytes(Encoding.PEM) for one in shown))
    return path


def knock(port: int, context: ssl.SSLContext) -> bytes:
    """All that comes back from the port."""
    said = b""
    with (
        suppress(OSError),
        socket.create_connection((ADDRESS, port), timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname=TARGET) as stream,
    ):
        stream.sendall(b"GET /v1/sessions/m/control HTTP/1.1\r\nHost: x\r\n\r\n")
        while data := stream.recv(4096):
            said += data
    return said


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (of_another_fleet, "unable to get local issuer"),
        (revoked, "was revoked"),
        (expired, "expired"),
        (of_a_name_below, "certificate"),
        (without_one, "a certificate is missing"),
    ],
)
async def test_whoever_is_not_of_the_fleet(
    scene: Scene, tmp_path: Path, make: Callable[[Scene, Path], ssl.SSLContext], why: str
) -> None:
    def logged_after(count: int) -> Callable[[], bool]:
        return lambda: len(scene.lines()) > count

    def attack() -> None:
        context = make(scene, tmp_path)
        for port in scene.ports:
            count = len(scene.lines())
            # Whose handshake is fine learns by an answer that it is over, at the data port.
            told = make is revoked and port == scene.ports[1]
            assert knock(port, context) == (DISTRUSTED if told else b"")
            wait_until(logged_after(count), "it is logged")
            (line,) = scene.lines()[count:]
            assert "refused" in line
            assert ADDRESS in line
            assert why in line
        scene.check_others()

    await asyncio.to_thread(attack)


async def test_another_host_of_the_fleet(scene: Scene) -> None:
    """It knows the ticket, and is not the one who was given it."""

    def attack() -> None:
        ticket, other = scene.rig.begin(), scene.host("other.test")
        count = len(scene.lines())
        with RawClient(scene.ports[1], other) as thief:
            assert thief.greet(ticket).status == Status.REFUSED
        wait_until(lambda: len(scene.lines()) > count, "it is logged")
        (line,) = scene.lines()[count:]
        assert "stream refused" in line
        assert "other.test" in line
        assert ticket.hex() not in line
        with RawClient(scene.ports[1], scene.rig.identity.client_context()) as source:
            assert source.greet(ticket).status == Status.ACCEPTED

    await asyncio.to_thread(attack)
