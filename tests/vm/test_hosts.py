"""`migrate hosts` where systemd, sudo and apt are: from nothing to an agent that is a service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab import fleet
from tests.lab.fleet import INSTALLED
from tests.lab.migrating import migrate, resident, running_on
from tests.lab.waiting import wait_until
from tests.vm import apt_source

USER: Final = "keeper"
UNIT: Final = "migrate-agent.service"
LACKING: Final = ("criu", "python3-pycriu", "python3-zstandard", "rsync")
# What comes along.
NEEDED: Final = ("libcriu2",)
SPEC: Final = ContainerSpec(
    "vm-service", "memory", args=("1",), memory_mib=8, address="10.77.0.62/24", address6=None
)
_ASIDE: Final = f"mv /etc/migrate /root/lab-identity; mv {INSTALLED} /root/lab-migrate"
_BACK: Final = f"""
    [ ! -x /opt/migrate/current/bin/migrate ] || /opt/migrate/current/bin/migrate service remove
    rm -rf /etc/migrate /opt/migrate {INSTALLED}
    mv /root/lab-identity /etc/migrate; mv /root/lab-migrate {INSTALLED}
"""
# With no password, but not locked: sshd without PAM lets nobody in who is.
_USER: Final = f"""
    useradd --create-home --password '*' {USER}
    cp -r /root/.ssh /home/{USER}/ && chown -R {USER} /home/{USER}/.ssh
    echo '{USER} ALL=(root) NOPASSWD: ALL' >/etc/sudoers.d/{USER}
"""
_NO_USER: Final = f"userdel --force --remove {USER} 2>/dev/null; rm -f /etc/sudoers.d/{USER}"


@pytest.fixture
def strangers(machines: Lab) -> Iterator[Lab]:
    """The machines as hosts of no fleet, B without some packages; afterwards as they were."""
    for host in machines.hosts:
        machines.kill_agent(host.name)
        host.run(["sh", "-ec", _ASIDE])
    fleet.found(machines)
    target = machines.host("B")
    target.run(["sh", "-ec", _USER])
    with apt_source.serving(machines, target, [*LACKING, *NEEDED]):
        purge = ["apt-get", "purge", "-q", "-y", *LACKING, *NEEDED]
        target.run(purge, timeout_s=fleet.PATIENCE_S)
        try:
            yield machines
        finally:
            install = "apt-get -q update && apt-get -q -y install --no-install-recommends"
            target.run(["sh", "-c", f"{install} {' '.join(LACKING)}"], timeout_s=fleet.PATIENCE_S)
    target.run(["sh", "-c", _NO_USER])
    for host in machines.hosts:
        host.run(["sh", "-ec", _BACK])
    machines.start_agents()


def unit(host: Host) -> dict[str, str]:
    """What systemd says of the agent."""
    wanted = "--property=ActiveState,UnitFileState,LoadState,MainPID"
    lines = host.run(["systemctl", "show", UNIT, wanted]).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_agents_as_services(strangers: Lab) -> None:
    """One story, since each step needs the one before."""
    source, target = strangers.hosts
    for host, user, *options in ((source, "root"), (target, USER, "--install-packages")):
        added = fleet.add(strangers, f"{user}@{host.name}", *options)
        assert added.returncode == 0, added
        assert "its agent was started" in added.stderr
        shown = unit(host)
        assert (shown["ActiveState"], shown["UnitFileState"]) == ("active", "enabled")
        assert int(shown["MainPID"]) == fleet.state(host)["agent_pid"]
    assert f"B: installs {' '.join(LACKING)}" in added.stderr
    assert fleet.hosts(strangers, "check").returncode == 0

    with resident(strangers, SPEC) as guest:
        assert migrate(source, guest.name, "B").done
        _restart(target)
        guest.verify()
        _upgrade(strangers, target)
        guest.wait_answers()
        assert migrate(target, guest.name, "A").done
        assert running_on(strangers, guest.name) == ["A"]
        _remove(strangers, source)
        guest.verify()
        assert guest.stop_probe().clean


def _restart(host: Host) -> None:
    """By its operator; the container that it has received stays (KillMode)."""
    before = unit(host)["MainPID"]
    host.run(["systemctl", "restart", UNIT])
    assert unit(host)["MainPID"] not in (before, "0")
    wait_until(
        "the agent listens again",
        lambda: fleet.state(host)["listens"],
        deadline_s=60 * host.patience,
    )


def _upgrade(lab: Lab, host: Host) -> None:
    version = fleet.make_older(host)
    upgraded = fleet.add(lab, f"{USER}@{host.name}")
    assert "its agent was restarted" in upgraded.stderr, upgraded
    state = fleet.state(host)
    assert state["agent_version"] == state["version"] == version
    assert int(unit(host)["MainPID"]) == state["agent_pid"]


def _remove(lab: Lab, host: Host) -> None:
    """Its agent is no service any more, and has no identity; what it has received runs on."""
    removed = fleet.remove(lab, host.name)
    assert removed.returncode == 0, removed
    assert not host.path("/etc/migrate/tls").exists()
    assert unit(host)["LoadState"] == "not-found"
    assert unit(host)["ActiveState"] == "inactive"
    assert not host.path(f"/etc/systemd/system/multi-user.target.wants/{UNIT}").is_symlink()
    assert fleet.state(host)["agent_pid"] == 0
