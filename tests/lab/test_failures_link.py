"""The network between two hosts fails, or one of them is not who it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from tests.identities import Fleet
from tests.lab.brake import Brake
from tests.lab.invariants import (
    SLOW,
    assert_moves,
    assert_undone,
    attempt,
    explained,
    failure_lab,
    threatened,
    wait_round,
)
from tests.lab.migrating import migrate
from tests.lab.waiting import wait_until
from transport.identity import IdentityPaths

IMPATIENT = ("--link-patience", "2")
TLS = "/etc/migrate/tls"
FRONT = "/run/migrate/front/tls"
FILES = ("ca.pem", "crl.pem", "identity.pem", "host.pem")
# Speaks to the agent's control and data ports in four wrong ways; what it gets, a line each.
STRANGER = """
import socket, ssl, sys

def speak(port, wrap, data):
    try:
        with socket.create_connection((sys.argv[1], port), 10) as raw, wrap(raw) as connection:
            connection.sendall(data)
            answer = connection.recv(4096)
    except OSError as error:
        return f"{type(error).__name__} {getattr(error, 'reason', '') or error.errno}"
    return f"answered {answer[:60]!r}"

anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
old.maximum_version = ssl.TLSVersion.TLSv1_2
request = b"POST /v1/sessions HTTP/1.1\\r\\nHost: B\\r\\nContent-Length: 2\\r\\n\\r\\n{}"
for port in 7337, 7338:
    print(port, "plain", speak(port, lambda raw: raw, request))
    print(port, "nobody", speak(port, anyone.wrap_socket, request))
    print(port, "old", speak(port, old.wrap_socket, request))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


def test_the_link_is_cut_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "l-copy") as under:
        lab.set_rate("A", SLOW)
        with attempt(under, *IMPATIENT) as underway:
            wait_round(underway)
            lab.set_isolated(["A", "B"], isolated=True)
            told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "precopy", "runs on A")
        assert_undone(under)
        lab.set_isolated(["A", "B"], isolated=False)
        assert_moves(under)


def test_the_link_is_cut_while_the_container_is_frozen(lab: Lab) -> None:
    brake = Brake(lab.host("A"))
    with threatened(lab, "l-frozen") as under:
        with brake.on("dump"), attempt(under, *IMPATIENT, env=brake.env) as underway:
            brake.wait_reached(underway)
            lab.set_isolated(["A", "B"], isolated=True)
            brake.release()
            told = explained(underway.finish())
        assert (told.host, told.container) == ("B", "runs on A")
        assert_undone(under)
        lab.set_isolated(["A", "B"], isolated=False)
        assert_moves(under)


@contextmanager
def dressed(host: Host, fleet: Fleet) -> Iterator[IdentityPaths]:
    """That host with an identity of `fleet` in place of its own. Its agent is not told."""
    worn = fleet.host(host.name, (host.address, host.address6))
    right = {file: host.read_text(f"{TLS}/{file}") for file in FILES}
    put_files(host, {file: (worn.directory / file).read_text() for file in FILES})
    yield worn
    put_files(host, right)


def put_files(host: Host, files: dict[str, str]) -> None:
    """Returns when the agent there has given its front what of it concerns that, as it does."""
    for file, text in files.items():
        host.write_text(f"{TLS}/{file}.new", text, 0o600)
        host.run(["mv", f"{TLS}/{file}.new", f"{TLS}/{file}"])

    def are_known() -> bool:
        return all(
            host.read_text(f"{TLS}/{file}") == host.read_text(f"{FRONT}/{file}")
            for file in files.keys() - {"identity.pem"}
        )

    wait_until("the front has the files", are_known)


def test_a_source_of_another_fleet_is_refused(lab: Lab, tmp_path: Path) -> None:
    source = lab.host("A")
    with threatened(lab, "l-fleet") as under:
        with dressed(source, Fleet(tmp_path)):
            told = explained(migrate(source, under.name, "B", "--json"))
        assert (told.host, told.container) == ("B", "runs on A")
        assert "certificate" in told.error
        assert_undone(under)
        assert_moves(under)


def test_a_revoked_source_is_refused(lab: Lab, tmp_path: Path) -> None:
    """Both agents have changed fleets without a restart; then the target hears of a revocation."""
    source, target, fleet = lab.host("A"), lab.host("B"), Fleet(tmp_path)
    with threatened(lab, "l-revoked") as under:
        with dressed(source, fleet) as worn, dressed(target, fleet):
            source.run(["migrate", under.name, "--to", "B", "--dry-run"])
            put_files(target, {"crl.pem": fleet.revoke(worn).decode()})
            told = explained(migrate(source, under.name, "B", "--json"))
        assert (told.host, told.container) == ("B", "runs on A")
        assert "does not accept this host's certificate" in told.error
        assert_undone(under)
        assert_moves(under)


def test_strangers_are_not_heard(lab: Lab) -> None:
    target = lab.host("B")
    said = lab.client.run(["python3", "-c", STRANGER, target.address], env=PYTHON_INSIDE).stdout
    lines = said.splitlines()
    assert len(lines) == 6, said
    for line in lines:
        # The end of the connection or an alert, and nothing else.
        assert "answered b''" in line or "Error" in line, said
    assert "nobody SSLError TLSV13_ALERT_CERTIFICATE_REQUIRED" in said
    assert "old SSLError TLSV1_ALERT_PROTOCOL_VERSION" in said
