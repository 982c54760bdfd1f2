"""Destinations, and what the user's ssh makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from transport.ssh.config import Destination, look_up
from transport.ssh.errors import SshConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("db7", Destination("db7")),
        ("root@db7", Destination("db7", "root")),
        ("root@db7:2222", Destination("db7", "root", 2222)),
        ("a@realm@db7", Destination("db7", "a@realm")),
        ("root@10.0.0.7", Destination("10.0.0.7", "root")),
        ("root@[fd00::7]:2222", Destination("fd00::7", "root", 2222)),
        ("root@fd00::7", Destination("fd00::7", "root")),
        ("root@[fd00::7]", Destination("fd00::7", "root")),
    ],
)
def test_destinations(text: str, expected: Destination) -> None:
    assert Destination.parse(text) == expected
    assert Destination.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "root@", "-oProxyCommand=x", "root@-x", "a b@db7", "root@db 7", "db7:0", "db7:70000",
     "db7:x", "$(x)@db7", "db7;x", "db7/x", "x" * 300],
)  # fmt: skip
def test_what_is_no_destination(text: str) -> None:
    with pytest.raises(SshConfigError):
        Destination.parse(text)


def _config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config"
    path.write_text(text)
    return path


def test_an_alias_is_what_the_configuration_says(tmp_path: Path) -> None:
    included = tmp_path / "more"
    included.write_text("Host db*\n  IdentitiesOnly yes\n  HashKnownHosts yes\n")
    config = _config(
        tmp_path,
        f"""
        Include {included}
        Host db7
          HostName 10.0.0.7
          User admin
          Port 2222
          IdentityFile {tmp_path}/%h.key
          UserKnownHostsFile {tmp_path}/known {tmp_path}/other
          StrictHostKeyChecking yes
          ProxyJump first@a,b:23
        """,
    )
    target = look_up(Destination.parse("db7"), config)
    assert (target.host, target.user, target.port) == ("10.0.0.7", "admin", 2222)
    assert target.identity_files == (tmp_path / "10.0.0.7.key",)
    assert target.identities_only
    assert target.hash_known_hosts
    assert target.user_known_hosts == (tmp_path / "known", tmp_path / "other")
    assert target.strict == "yes"
    assert target.jumps == ("first@a", "b:23")
    assert target.known_as == "[10.0.0.7]:2222"


def test_the_destination_wins_over_the_configuration(tmp_path: Path) -> None:
    config = _config(tmp_path, "Host *\n  User admin\n  Port 2222\n")
    target = look_up(Destination.parse("root@db7:22"), config)
    assert (target.user, target.port, target.known_as) == ("root", 22, "db7")


def test_a_changed_key_is_let_in_by_no_configuration(tmp_path: Path) -> None:
    """`no` would; here it means what accept-new means."""
    config = _config(tmp_path, "StrictHostKeyChecking no\n")
    assert look_up(Destination.parse("db7"), config).strict == "accept-new"


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(SshConfigError, match="can't read its configuration"):
        look_up(Destination.parse("db7"), _config(tmp_path, "Frobnicate yes\n"))
