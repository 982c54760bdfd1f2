"""A host that answers over SSH as it should, and as it should not. It is this machine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import MigrateError, Unreachable
from migrate.hosts import bundle
from migrate.hosts.remote import RemoteHost
from tests.transport.ssh.place import Place
from transport.ssh import connecting


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


@pytest.fixture
def host(place: Place) -> Iterator[RemoteHost]:
    """Commands run as who runs the tests, root."""
    server = place.serve()
    place.know(server)
    with RemoteHost.reach(f"somebody@127.0.0.1:{server.port}", place.asking()) as host:
        yield host


def _program(root: Path, script: str) -> str:
    """A `migrate` that was installed there."""
    path = root / "current/bin/migrate"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(root)


def test_a_bundle_is_installed(host: RemoteHost, tmp_path: Path) -> None:
    root = str(tmp_path / "there")
    assert host.probe(root).installed == ""
    made = bundle.make()
    host.install(made.version, made.archive, root)
    facts = host.probe(root)
    assert facts.installed == made.version
    assert facts.python[:2] >= sys.version_info[:2]


def test_an_answer_is_read(host: RemoteHost, tmp_path: Path) -> None:
    root = _program(tmp_path / "there", 'cat; echo "$@" >&2')
    assert host.migrate(["x"], dict[str, int], stdin=b'{"a": 1}', root=root) == {"a": 1}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo none", "answers what can't be understood"),
        (r"printf '\\377\\376'", "answers what can't be understood"),
        ('echo \'{"a": "b"}\'', "answers what can't be understood"),
        ("echo '[[[[[[' | tr -d '\\n'", "answers what can't be understood"),
        ("yes", "prints more than"),
        ("yes >&2", "prints more than"),
        ("echo 'no space left' >&2; exit 7", "failed with status 7: no space left"),
        ("kill -9 $$", "failed with status"),
        ("exec sleep 100", "takes too long"),
    ],
)
def test_an_answer_that_is_none(host: RemoteHost, tmp_path: Path, script: str, said: str) -> None:
    root = _program(tmp_path / "there", script)
    deadline_s = 1.0 if "sleep" in script else 60.0
    with pytest.raises(MigrateError, match=said) as refused:
        host.migrate(["x"], dict[str, int], root=root, deadline_s=deadline_s)
    assert "somebody@127.0.0.1" in str(refused.value)


def test_a_program_that_is_not_there(host: RemoteHost, tmp_path: Path) -> None:
    with pytest.raises(MigrateError, match="failed with status 127"):
        host.migrate(["x"], dict[str, Any], root=str(tmp_path / "nowhere"))


def test_a_host_whose_key_has_changed_is_not_reached(place: Place) -> None:
    server = place.serve()
    place.know(server, place.user_key)
    with pytest.raises(Unreachable, match="has changed"):
        RemoteHost.reach(f"somebody@127.0.0.1:{server.port}", place.asking(accept_new=True))
    assert server.attempts == []


def test_a_server_that_is_silent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "CONNECT_DEADLINE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Unreachable, match="no SSH connection"):
            RemoteHost.reach(f"somebody@127.0.0.1:{port}", place.asking())
