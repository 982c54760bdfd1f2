"""Migrations between two machines with kernels of their own."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from tests.lab.filtering import filtered
from tests.lab.inside import PRELUDE
from tests.lab.migrating import Resident, migrate, resident, running_on, wait_clean
from tests.vm.kernels import trackers

PAGE_BYTES: Final = 4096
MEMORY_MIB: Final = 24
# It writes to one of them, so however long a round takes, the next one is far less than half.
WRITING: Final = ("1", "--hot-mib", "1")
ROUNDS_MIN: Final = 2
# A round of a slow machine is long, and a container that writes all the time does not converge.
OPTIONS: Final = ("--max-rounds", "3", "--on-stall", "freeze")
# What is chosen where nothing was asked for.
CHOOSE: Final = """
from migrate.options import Options
from migrate.tracking import choose
chosen = choose(Options("any", "B"), None, "A")
answer([chosen.name, chosen.reason])
"""


def move(guest: Resident, source: str, target: str, *options: str) -> dict[str, Any]:
    """A migration that succeeds and leaves nothing; its report."""
    report = migrate(guest.lab.host(source), guest.name, target, *options).done
    assert running_on(guest.lab, guest.name) == [target]
    wait_clean(guest.lab.host(source))
    wait_clean(guest.lab.host(target), guest.name)
    return report


@pytest.mark.ci
def test_memory_moves_there_and_back(machines: Lab) -> None:
    """Under another kernel than the lab's, which one kernel's own copy could not show."""
    spec = ContainerSpec(
        "vm-memory", "memory", args=WRITING, memory_mib=MEMORY_MIB, address="10.77.0.61/24"
    )
    pages = (MEMORY_MIB << 20) // PAGE_BYTES
    with resident(machines, spec, rate_per_s=20) as guest:
        for source, target, tracker in zip("AB", "BA", trackers(machines), strict=False):
            report = move(guest, source, target, "--tracker", tracker, *OPTIONS)
            assert report["tracker"] == tracker
            first, *later = report["rounds"]
            assert first["pages"] + first["zero_pages"] >= pages * 99 // 100
            assert len(later) + 1 >= ROUNDS_MIN
            assert all(one["pages"] < pages // 2 for one in later), report["rounds"]
            guest.verify()
            guest.wait_answers()
        client = guest.stop_probe()
    assert client.clean, client


def test_what_the_kernel_can_do_chooses_the_tracker(machines: Lab) -> None:
    """Unasked: the best that works, found by trying, and the report says which and why."""
    spec = ContainerSpec("vm-auto", "memory", args=WRITING, address="10.77.0.66/24")
    best = trackers(machines)[0]
    with resident(machines, spec, rate_per_s=20) as guest:
        chosen = move(guest, "A", "B", *OPTIONS)
        assert chosen["tracker"] == best
        why = "it works here" if best == "write-protect" else "write-protect does not work here ("
        assert chosen["tracker_reason"].startswith(why)
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean


@pytest.mark.ci
def test_a_kernel_that_refuses_is_believed(machines: Lab) -> None:
    """Under a filter of system calls nobody may trace others that are under one (ptrace(2):
    PTRACE_O_SUSPEND_SECCOMP), as write-protect has to."""
    host = machines.host("A")
    command = filtered(host, "python3", "-c", PRELUDE + CHOOSE, "null")
    name, reason = json.loads(host.run(command, env=PYTHON_INSIDE, timeout_s=120.0).stdout)
    assert name == "soft-dirty"
    assert reason.startswith("write-protect does not work here (")


def test_a_container_of_crun_moves_there_and_back(machines: Lab) -> None:
    for host in machines.hosts:
        host.write_text("/etc/migrate/policy.toml", '[receive]\nruntimes = ["runc", "crun"]\n')
    spec = ContainerSpec("vm-crun", "memory", args=WRITING, address="10.77.0.65/24", runtime="crun")
    with resident(machines, spec, rate_per_s=20) as guest:
        for source, target, tracker in (("A", "B", "soft-dirty"), ("B", "A", "predump")):
            report = move(guest, source, target, "--tracker", tracker, *OPTIONS)
            assert (report["runtime"], report["tracker"]) == ("crun", tracker)
            guest.verify()
            guest.wait_answers()
        assert guest.stop_probe().clean
