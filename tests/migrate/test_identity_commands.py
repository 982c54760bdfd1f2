"""`migrate ca` and `migrate identity`, as somebody types them who enrols a host by hand."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrate.cli import cli
from migrate.errors import MigrateError
from transport import authority as authorities
from transport.authority import Authority
from transport.errors import CertificateRevokedError
from transport.identity import HostIdentity, IdentityPaths, Role

PASSPHRASE = "correct horse battery"


class Desk:
    """An operator with a fleet, and a host's configuration directory beside it."""

    def __init__(self, base: Path) -> None:
        self.fleet = base / "fleet"
        self.config = base / "etc"
        self.tls = IdentityPaths(self.config / "tls")
        self.passphrase = base / "passphrase"
        self.passphrase.write_text(PASSPHRASE + "\n")
        self.passphrase.chmod(0o600)

    def ca(self, *words: str, stdin: str = "", code: int = 0) -> str:
        given = ("--fleet", str(self.fleet), "--passphrase-file", str(self.passphrase))
        return self.run("ca", *words, *given, stdin=stdin, code=code)

    def identity(self, *words: str, stdin: str = "", code: int = 0) -> str:
        return self.run("identity", *words, "--config", str(self.config), stdin=stdin, code=code)

    def run(self, *words: str, stdin: str = "", code: int = 0) -> str:
        ran = CliRunner().invoke(cli, words, input=stdin, standalone_mode=False)
        text, found = ran.stdout, 0
        if isinstance(ran.exception, MigrateError):
            text, found = ran.exception.render(), ran.exception.exit_code
        elif ran.exception is not None:
            raise ran.exception
        assert found == code, text
        assert PASSPHRASE not in ran.output + text
        return text


def changed(answer: str, certificate: str) -> str:
    return json.dumps({**json.loads(answer), "certificate": certificate})


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(authorities, "_KDF_ROUNDS", 1)
    return Desk(tmp_path)


def test_a_person_gets_an_identity_and_loses_it(desk: Desk) -> None:
    assert str(desk.fleet) in desk.ca("init")
    assert "already" in desk.ca("init", code=1)
    desk.ca("operator", "alice")
    person = HostIdentity.load(IdentityPaths(desk.fleet / "operators" / "alice"))
    assert (person.owner.name, person.owner.role) == ("alice", Role.OPERATOR)
    assert desk.ca("list").split()[:3] == [f"{person.owner.serial:x}", "operator", "alice"]
    assert "no name" in desk.ca("operator", "../bob", code=1)
    there = ("operator", "recover", "localhost", "m-1", "--fleet", str(desk.fleet), "--port", "9")
    assert "does not answer" in desk.run(*there, "--as", "alice", code=1)
    assert "there is no" in desk.run(*there, "--as", "bob", code=1)
    assert "no identity of bob" in desk.ca("revoke", "bob", code=2)

    assert "alice" in desk.ca("revoke", "alice")
    assert desk.ca("list").split()[-1] == "revoked"
    assert "no identity of alice" in desk.ca("revoke", "alice", code=2)
    person.take_revocations((desk.fleet / "crl.pem").read_bytes())
    with pytest.raises(CertificateRevokedError):
        HostIdentity.load(person.paths)


def test_the_passphrase_is_not_taken_from_a_file_that_others_read(desk: Desk) -> None:
    desk.passphrase.chmod(0o644)
    assert "0644" in desk.ca("init", code=2)
    assert not desk.fleet.exists()
    desk.passphrase.chmod(0o600)
    desk.ca("init")
    desk.passphrase.write_text("another one entirely")
    assert "does not open" in desk.ca("list", code=1)


def test_a_host_is_enrolled_by_hand(desk: Desk, tmp_path: Path) -> None:
    desk.ca("init")
    assert "no " in desk.identity("show", code=1)
    wanted = desk.identity("request")
    assert wanted.startswith("-----BEGIN CERTIFICATE REQUEST-----")
    assert "PRIVATE" not in wanted
    host = socket.gethostname()
    assert "asks for an identity" in desk.ca("sign", "another", "-", stdin=wanted, code=1)
    answer = desk.ca("sign", host, "-", "--address", "10.0.0.2", stdin=wanted)
    for wrong in ("", "{}", "[]", '{"ca": 1}', changed(answer, "x" * 9000), "x" * (3 << 20)):
        desk.identity("install", stdin=wrong, code=2)
    desk.identity("install", stdin=changed(answer, wanted), code=1)
    assert host in desk.identity("install", stdin=answer)

    shown = json.loads(desk.identity("show", "--json"))
    own = HostIdentity.load(desk.tls)
    assert (shown["name"], shown["role"]) == (host, "host")
    assert (shown["serial"], shown["fleet"]) == (f"{own.owner.serial:x}", own.fleet)
    assert f"{'name:':<13}{host}" in desk.identity("show")

    authority = Authority.open(desk.fleet, PASSPHRASE.encode())
    authority.revoke(0x77)
    latest = authority.crl_pem.decode()
    assert "list 2 is taken" in desk.identity("revocations", stdin=latest)
    assert "list 2 is the latest" in desk.identity("revocations", stdin=latest)
    desk.identity("revocations", stdin=latest.replace("A", "B", 3), code=1)
    assert own.revocations.serials == {0x77}

    desk.fleet = tmp_path / "other"
    desk.ca("init")
    answer = desk.ca("sign", host, "-", stdin=desk.identity("request"))
    assert "another fleet" in desk.identity("install", stdin=answer, code=1)
    desk.identity("install", "--new-fleet", stdin=answer)
    assert HostIdentity.load(desk.tls).fleet != shown["fleet"]
