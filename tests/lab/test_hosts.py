"""A fleet that grows and shrinks by `migrate hosts`, with real sshd: from nothing to migrations."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab import fleet
from tests.lab.fleet import INSTALLED, PATIENCE_S
from tests.lab.migrating import resident, running_on
from tests.lab.waiting import wait_until

pytestmark = pytest.mark.timeout(900)

AGENT_LOG = "/var/log/migrate-agent.log"
# With the identity that was kept: the handshake, and the first word that comes back.
CALL = """
from pathlib import Path
from transport import tls
from transport.identity import HostIdentity, IdentityPaths
context = HostIdentity.load(IdentityPaths(Path("/root/kept"))).client_context()
try:
    stream = tls.connect("B", 7337, context, server_name="B")
    stream.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
    print(stream.recv(100) or "hung up")
except OSError:
    print("hung up")
"""
SPEC = ContainerSpec(
    "enrolled", "memory", args=("16",), memory_mib=32, address="10.77.0.160/24", address6=None
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The client is the operator; hosts A, B and C are in no fleet and have no agent."""
    with Lab(["A", "B", "C"]) as lab:
        for host in lab.hosts:
            host.run(["rm", "-rf", "/etc/migrate", INSTALLED])
        fleet.found(lab)
        yield lab


def _add(lab: Lab, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return fleet.add(lab, f"root@{name}", *options)


def _migrate(host: Host, name: str, target: str) -> subprocess.CompletedProcess[str]:
    return host.run([INSTALLED, name, "--to", target], check=False, timeout_s=PATIENCE_S)


def test_a_host_that_lacks_something_is_told_what(lab: Lab) -> None:
    host = lab.host("C")
    host.run(["mv", "/usr/bin/rsync", "/root/rsync"])
    host.run(["mv", "/usr/lib/python3/dist-packages/zstandard", "/root/zstandard"])
    host.run(["sh", "-c", "mv /usr/lib/python3/dist-packages/zstandard-*info /root/"])
    try:
        refused = _add(lab, "C")
        assert refused.returncode == 2
        assert "lacks the program rsync, Python's zstandard>=0.23" in refused.stderr
        assert "apt-get install python3-zstandard rsync there" in refused.stderr
        assert not host.path("/opt/migrate").exists()
        assert fleet.hosts(lab, "list", "--json").stdout.strip() == "[]"
    finally:
        host.run(["mv", "/root/rsync", "/usr/bin/rsync"])
        host.run(["sh", "-c", "mv /root/zstandard* /usr/lib/python3/dist-packages/"])


def test_hosts_from_their_enrolment_to_their_removal(lab: Lab) -> None:
    """One story, since each step needs the one before: enrol, migrate, upgrade, remove, refused."""
    for host in lab.hosts:
        added = _add(lab, host.name)
        assert added.returncode == 0, added
        assert f"migrate CONTAINER --to {host.name}" in added.stdout
        assert "its agent was started" in added.stderr
        key = host.path("/etc/migrate/tls/identity.pem")
        assert key.stat().st_mode & 0o777 == 0o600
    listed = json.loads(fleet.hosts(lab, "list", "--json").stdout)
    assert [one["name"] for one in listed] == ["A", "B", "C"]
    checked = fleet.hosts(lab, "check", "--json")
    assert checked.returncode == 0, checked
    assert [one["problems"] for one in json.loads(checked.stdout)] == [[], [], []]

    _add_again(lab)
    _upgrade(lab)
    with resident(lab, SPEC) as guest:
        moved = _migrate(lab.host("A"), guest.name, "B")
        assert moved.returncode == 0, moved
        assert running_on(lab, guest.name) == ["B"]
        guest.verify()
        _remove(lab)
        refused = _migrate(lab.host("B"), guest.name, "C")
        assert refused.returncode != 0
        assert running_on(lab, guest.name) == ["B"]
        guest.wait_answers()
        assert guest.stop_probe().clean


def _add_again(lab: Lab) -> None:
    """It changes nothing."""
    before = fleet.state(lab.host("A"))
    again = _add(lab, "A")
    assert again.returncode == 0, again
    assert "its agent runs" in again.stderr
    after = fleet.state(lab.host("A"))
    assert after["identity"]["serial"] == before["identity"]["serial"]
    assert after["agent_pid"] == before["agent_pid"]


def _upgrade(lab: Lab) -> None:
    """An agent of another version is replaced by this one."""
    host = lab.host("A")
    version = fleet.make_older(host)
    ill = fleet.hosts(lab, "check", "A")
    assert ill.returncode == 0, ill

    upgraded = _add(lab, "A")
    assert "its agent was restarted" in upgraded.stderr, upgraded
    state = fleet.state(host)
    assert state["agent_version"] == state["version"] == version


def _remove(lab: Lab) -> None:
    """Who is removed has no identity left, and could do nothing with one that it kept."""
    host = lab.host("C")
    host.run(["cp", "-a", "/etc/migrate/tls", "/root/kept"])
    removed = fleet.remove(lab, "C")
    assert removed.returncode == 0, removed
    assert not host.path("/etc/migrate/tls").exists()
    assert "A: knows what is revoked" in removed.stderr
    assert "B: knows what is revoked" in removed.stderr
    known = json.loads(fleet.hosts(lab, "list", "--json").stdout)
    assert [one["name"] for one in known] == ["A", "B"]

    hung_up = host.run(["/opt/migrate/current/bin/python", "-c", CALL])
    assert hung_up.stdout.strip() == "hung up"
    wait_until("B has said why", lambda: len(_refusals(lab.host("B"), host)) == 1)


def _refusals(at: Host, of: Host) -> list[str]:
    log = at.read_text(AGENT_LOG).splitlines()
    return [line for line in log if "revoked" in line and of.address in line]


def test_a_changed_host_key_is_refused(lab: Lab) -> None:
    operator = lab.client
    known = operator.read_text("/root/.ssh/known_hosts")
    other = operator.run(["ssh-keyscan", "-t", "ed25519", "B"]).stdout.split()[-1]
    lines = [line.split() for line in known.splitlines()]
    changed = [[*line[:2], other] if "A" in line[0].split(",") else line for line in lines]
    text = "".join(" ".join(line) + "\n" for line in changed)
    operator.write_text("/root/.ssh/known_hosts", text)
    try:
        refused = _add(lab, "A", "--accept-new")
        assert refused.returncode == 1
        assert "the key of a has changed: it shows SHA256:" in refused.stderr
        assert "/root/.ssh/known_hosts:" in refused.stderr
        ill = fleet.hosts(lab, "check", "A")
        assert ill.returncode == 1
        assert "has changed" in ill.stdout
    finally:
        operator.write_text("/root/.ssh/known_hosts", known)


def test_a_host_that_is_down_is_removed_and_named(lab: Lab) -> None:
    """Last, since B is lost by it."""
    lab.crash("B")
    removed = fleet.remove(lab, "B")
    assert removed.returncode == 1
    assert "not told: B" in removed.stderr
    assert "A: knows what is revoked" in removed.stderr
    revoked = lab.client.run(
        ["migrate", "ca", "list", "--passphrase-file", fleet.PASSPHRASE]
    ).stdout
    assert [line for line in revoked.splitlines() if " B " in line and "revoked" in line]
