"""A host that its systemd shuts down is emptied before: `migrate drain-node --install-unit`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from bench.containers import ContainerSpec
from bench.lab import agents
from bench.lab.lab import Lab
from bench.vm.host import MachineHost
from migrate import drain_unit
from migrate.agent.unit import unit_text
from migrate.service import UNIT, UNIT_PATH
from tests.lab.fleet import INSTALLED
from tests.lab.migrating import Resident, resident, running_on
from tests.lab.waiting import wait_until

SPEC: Final = ContainerSpec(
    "vm-leaver", "memory", args=("1",), memory_mib=8, address="10.77.0.63/24", address6=None
)
# The lab's agents have it from Host.run.
_PATIENT: Final = "[Service]\nEnvironment=MIGRATE_SILENCE=15 MIGRATE_LINK_PATIENCE=120\n"
NETWORK: Final = "lab-network.service"
# As what brings up a network does (systemd.special(7)); its end is the end of the network.
_NETWORK_TEXT: Final = """\
[Unit]
Description=The network of the lab
Wants=network.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/usr/sbin/ip link set uplink down
[Install]
WantedBy=multi-user.target
"""
# Of a machine that is off only its console can be read.
_JOURNAL: Final = """\
[Journal]
ForwardToConsole=yes
TTYPath=/dev/ttyS0
MaxLevelConsole=info
"""
_JOURNAL_PATH: Final = "/etc/systemd/journald.conf.d/console.conf"
DEADLINE_S: Final = 900
# Of the machine, after the last unit that waits.
OFF: Final = re.compile(r"reboot: (Restarting system|Power down)")
LISTENS: Final = "event='agent listens'"
OFF_S: Final = drain_unit.OTHER_UNITS_S


@pytest.fixture
def serviced(mortals: Lab) -> Lab:
    """Their agents are services, their network is a unit, and what they write down is seen."""
    for host in mortals.hosts:
        host.run(["mkdir", "-p", f"{UNIT_PATH}.d", "/etc/systemd/journald.conf.d"])
        host.write_text(_JOURNAL_PATH, _JOURNAL)
        host.write_text(str(UNIT_PATH), unit_text(Path(INSTALLED)))
        host.write_text(f"{UNIT_PATH}.d/patient.conf", _PATIENT)
        host.write_text(f"/etc/systemd/system/{NETWORK}", _NETWORK_TEXT)
        host.run(["systemctl", "daemon-reload"])
        host.run(["systemctl", "restart", "systemd-journald"])
        host.run(["systemctl", "enable", "--quiet", "--now", NETWORK, UNIT])
    for host in mortals.hosts:
        agents.wait_listening(host)
    return mortals


def machine(lab: Lab, name: str) -> MachineHost:
    host = lab.host(name)
    assert isinstance(host, MachineHost)
    return host


def install_unit(host: MachineHost, deadline_s: int) -> None:
    words = ["--to", "B", "--deadline", str(deadline_s), "--install-unit"]
    host.run(["migrate", "drain-node", *words], timeout_s=60 * host.patience)


def assert_moves_nothing_by_itself(guest: Resident, host: MachineHost) -> None:
    """Nor does the agent: it is restarted by who installs another version."""
    listening = host.console().count(LISTENS)
    for act, unit in (("restart", drain_unit.UNIT), ("stop", drain_unit.UNIT), ("restart", UNIT)):
        host.run(["systemctl", act, unit], timeout_s=60 * host.patience)
    host.run(["systemctl", "start", drain_unit.UNIT])
    # The former one's front may be seen to listen yet.
    wait_until(
        "the agent listens again",
        lambda: host.console().count(LISTENS) > listening,
        deadline_s=60 * host.patience,
    )
    assert running_on(guest.lab, guest.name) == [host.name]
    assert not host.path("/var/lib/migrate/drain/state.json").exists()
    assert host.console().count("this host does not shut down: nothing is moved") == 2


def shut_down(lab: Lab, host: MachineHost, act: str, *, within_s: float) -> str:
    """Returns when the machine has ended itself; what it has said on its way there."""
    before = len(host.console())
    host.run(["systemctl", act])
    wait_until(
        f"{host.name} is off", lambda: OFF.search(host.console(), before), deadline_s=within_s
    )
    said = host.console()[before:]
    lab.crash(host.name)  # what is left of it: the lab knows now that it is off
    return said


def assert_in_order(text: str, *parts: str) -> None:
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"not after the parts before: {part!r}: {text[-6000:]}"
        at = found + len(part)


@pytest.mark.timeout(2400)
def test_containers_leave_a_host_that_reboots(serviced: Lab) -> None:
    """Before the agent ends, and the network."""
    source = machine(serviced, "A")
    with resident(serviced, SPEC, rate_per_s=20) as guest:
        install_unit(source, DEADLINE_S)
        assert_moves_nothing_by_itself(guest, source)
        said = shut_down(serviced, source, "reboot", within_s=DEADLINE_S + OFF_S)
        assert_in_order(said, f"{guest.name}  ", "runs on B", "has ended with 0", f"Stopped {UNIT}")
        assert_in_order(said, f"Stopped {drain_unit.UNIT}", f"Stopped {NETWORK}")
        assert running_on(serviced, guest.name) == ["B"]
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean
