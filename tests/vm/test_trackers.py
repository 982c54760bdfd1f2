"""Every tracker on a kernel that has all of them: what its rounds send, and that nothing is missed.

The memory workload writes to 512 KiB of 128 MiB without a pause, so a round after the first has
those pages, and what the program keeps of them besides.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.lab.migrating import Resident, migrate, resident, running_on, wait_clean

PAGE_BYTES: Final = 4096
MEMORY_MIB: Final = 128
PAGES: Final = (MEMORY_MIB << 20) // PAGE_BYTES
LATER_SHARE_MAX: Final = 0.01
WRITING: Final = ("1", "--hot-mib", "0.5")
# A round of a slow machine is long, and a container that writes all the time does not converge.
OPTIONS: Final = ("--max-rounds", "3", "--on-stall", "freeze")
# In the order in which they move it; the first as often as a container may have to.
WAYS: Final = (*["soft-dirty"] * 6, "write-protect", "write-protect", "predump", "predump")
# How the target's CRIU fails: after all tasks were restored (FI_POST_RESTORE).
FAILING: Final = {"CRIU_FAULT": "6"}


def spec_of(name: str, last: int, runtime: str = "runc") -> ContainerSpec:
    address = f"10.77.0.{last}/24"
    return ContainerSpec(
        name, "memory", args=WRITING, memory_mib=MEMORY_MIB, address=address, runtime=runtime
    )


def move(guest: Resident, source: str, target: str, tracker: str) -> dict[str, Any]:
    """A migration that succeeds, leaves nothing, and sends little after its first round."""
    lab = guest.lab
    moved = migrate(lab.host(source), guest.name, target, "--tracker", tracker, *OPTIONS)
    report = moved.done
    assert (report["tracker"], report["tracker_reason"]) == (tracker, "it was asked for")
    assert running_on(lab, guest.name) == [target]
    wait_clean(lab.host(source))
    wait_clean(lab.host(target), guest.name)
    first, *later = report["rounds"]
    # For the table of docs/facts.md; shown by pytest -s.
    print(tracker, json.dumps({"rounds": report["rounds"], "downtime_ms": report["downtime_ms"]}))
    assert first["pages"] + first["zero_pages"] >= PAGES * 99 // 100
    assert len(later) >= 2
    assert all(one["pages"] < PAGES * LATER_SHARE_MAX for one in later), report["rounds"]
    guest.verify()
    guest.wait_answers()
    return report


def test_there_and_back_by_each(machines: Lab) -> None:
    ends = ("A", "B")
    with resident(machines, spec_of("vm-trackers", 62), rate_per_s=20) as guest:
        for number, tracker in enumerate(WAYS):
            move(guest, ends[number % 2], ends[1 - number % 2], tracker)
        assert guest.stop_probe().clean


@pytest.mark.parametrize(("tracker", "last"), [("soft-dirty", 63), ("predump", 64)])
def test_after_a_failed_restore_all_is_sent_again(machines: Lab, tracker: str, last: int) -> None:
    """The migration that failed has cleared the bits: they say nothing any more."""
    source = machines.host("A")
    with resident(machines, spec_of("vm-again", last), rate_per_s=20) as guest:
        machines.kill_agent("B")
        machines.start_agent("B", env=FAILING)
        failed = migrate(source, guest.name, "B", "--tracker", tracker, *OPTIONS)
        machines.kill_agent("B")
        machines.start_agent("B")
        assert failed.code == 1
        assert "runs on A" in failed.stderr
        assert running_on(machines, guest.name) == ["A"]
        wait_clean(source, guest.name)
        guest.verify()
        guest.wait_answers()
        move(guest, "A", "B", tracker)
        assert guest.stop_probe().clean


def test_a_container_of_crun_there_and_back(machines: Lab) -> None:
    for host in machines.hosts:
        host.write_text("/etc/migrate/policy.toml", '[receive]\nruntimes = ["runc", "crun"]\n')
    with resident(machines, spec_of("vm-crun", 65, "crun"), rate_per_s=20) as guest:
        for source, target in (("A", "B"), ("B", "A")):
            assert move(guest, source, target, "soft-dirty")["runtime"] == "crun"
        assert guest.stop_probe().clean
