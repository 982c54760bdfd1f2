"""The file of a host's policy: what it may say, and what becomes of one that says it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from migrate.commands.policy import policy as command
from migrate.policy import POLICY_BYTES_MAX, Policy, PolicyError, PolicyFile, load, parse, render

WHOLE = """\
[receive]
from = ["db-*", "web[12]"]
containers = ["db"]
runtimes = ["runc"]
require_user_namespace = true
bind_mounts = ["/srv/shared"]
devices = ["/dev/fuse"]
capabilities = ["CAP_NET_ADMIN"]
seccomp_off = true
kernel_files = true
privileged = true
labels = ["ssd", "zone=a"]

[receive.quotas]
sessions = 3
sessions_per_host = 1
memory_mib = 4096
rootfs_mib = 8192

[send]
to = ["db-*"]
containers = ["db"]
devices = ["/dev/fuse"]

[clone]
from = ["db-*"]
to = []
containers = ["db"]
hooks = ["fresh-*"]"""


def test_without_a_file_the_fleet_may_send_and_nothing_is_privileged(tmp_path: Path) -> None:
    policy = load(tmp_path / "policy.toml")
    assert policy == Policy() == parse("")
    assert (policy.receive.hosts, policy.send.hosts) == (("*",), ("*",))
    assert not policy.receive.privileged
    assert not policy.receive.seccomp_off
    assert policy.receive.devices == policy.receive.capabilities == policy.receive.bind_mounts == ()


def test_what_it_may_say_is_said_again() -> None:
    assert render(parse(WHOLE)) == WHOLE
    assert parse(render(Policy())) == Policy()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[receive]\nform = []", 2),
        ("# nothing\nclone = 1", 2),
        ("[receive]\n\nfrom = ['a b']", 3),
        ("[receive]\nfrom = ['a', 7]", 2),
        ("[receive]\nbind_mounts = ['srv']", 2),
        ("[receive]\ncapabilities = ['NET_ADMIN']", 2),
        ("[receive]\nprivileged = 'no'", 2),
        ("[send]\nto = ['a']\n[receive.quotas]\nsessions = 99", 4),
        ("[receive]\nquotas.memory_mib = -1", 2),
        ("receive = {from = [2]}", 1),
        ("[receive]\nfrom = 'a'\n[send]\nto = ['b']", 2),
        ("[send]\nto =\n[receive]", 2),
        ("[send]\n[send]", 2),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, line: int) -> None:
    with pytest.raises(PolicyError, match=rf"line {line}\b"):
        parse(text)


@pytest.mark.parametrize("text", ["a = " + "[" * 30000, "#" * (POLICY_BYTES_MAX + 1)])
def test_what_is_too_large_or_deep_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        parse(text)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except PolicyError:
        return


def test_a_change_is_in_force_for_the_next_who_asks(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    file = PolicyFile(path)
    assert file.current() == Policy()
    path.write_text('[receive]\nfrom = ["a"]')
    assert file.current().receive.hosts == ("a",)
    path.write_text("[receive]\nfrom = a")
    # Not the older one, which somebody wanted to be rid of.
    for _ in range(2):
        with pytest.raises(PolicyError, match="line 2"):
            file.current()
    path.write_text('[receive]\nfrom = ["b"]')
    assert file.current().receive.hosts == ("b",)
    path.unlink()
    assert file.current() == Policy()


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write_is_nobodys_word(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "policy.toml"
    path.touch()
    path.chmod(mode)
    with pytest.raises(PolicyError, match="written by others"):
        load(path)


def test_what_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(PolicyError):
        load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="UTF-8"):
        load(path)


def test_a_file_is_checked_before_it_counts(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(WHOLE)
    bad.write_text("[recieve]")
    assert CliRunner().invoke(command, ["check", str(good)]).exit_code == 0
    refused = CliRunner().invoke(command, ["check", str(bad)])
    assert isinstance(refused.exception, PolicyError)
    assert "line 1" in refused.exception.message
    assert refused.exception.exit_code == 2
