"""A container that writes too fast where cgroup v2 has the controller `cpu`: slowed by a limit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.migrating import Resident, begin, migrate, resident, running_on, wait_clean
from tests.lab.waiting import wait_until

# As fast as it can.
SPEC: Final = ContainerSpec(
    "vm-throttle", "memory", args=("100000",), memory_mib=8, address="10.77.0.62/24", address6=None
)
RATE: Final = "20mbit"
FAST: Final = "10gbit"
OWN_LIMIT: Final = "90000 100000"
PROGRAM: Final = Path(__file__).parents[1] / "lab/programs/busy_memory.c"


@pytest.fixture
def guest(machines: Lab, tmp_path: Path) -> Iterator[Resident]:
    program = tmp_path / "busy_memory"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, PROGRAM], check=True)
    with resident(machines, SPEC, program=program, rate_per_s=20) as guest:
        machines.set_rate("A", RATE)
        yield guest
        machines.set_rate("A", FAST)


def limit(host: Host, name: str) -> str:
    """What the container may use of its processors."""
    return host.read_text(f"/sys/fs/cgroup/dolly/{name}/cpu.max").strip()


def test_its_limit_is_what_it_was_whatever_happens(guest: Resident) -> None:
    source, target = guest.lab.host("A"), guest.lab.host("B")
    # As an operator would set it.
    source.write_text(f"/sys/fs/cgroup/dolly/{guest.name}/cpu.max", OWN_LIMIT)
    underway = begin(source, guest.name, "B", "--json", "--max-downtime", "500")
    wait_until("it is slowed", lambda: underway.events("throttled"), deadline_s=240.0)
    assert limit(source, guest.name) != OWN_LIMIT
    underway.kill()
    underway.finish()
    wait_until("it is as before", lambda: limit(source, guest.name) == OWN_LIMIT)
    wait_clean(source, guest.name)
    wait_clean(target)
    assert running_on(guest.lab, guest.name) == ["A"]

    moved = migrate(source, guest.name, "B", "--json", "--max-downtime", "500", deadline_s=400.0)
    for line in moved.stdout.splitlines():
        if '"progress"' not in line:
            print(line[:300])
    report = moved.done
    assert report["throttle"]["by"] == "cpu.max"
    # That of its configuration: what is set by hand does not travel, nor does what slowed it.
    assert limit(target, guest.name) == "max 100000"
    assert running_on(guest.lab, guest.name) == ["B"]
    wait_clean(source)
    guest.ask("RATE 0")
    guest.verify()
    assert guest.stop_probe().clean
