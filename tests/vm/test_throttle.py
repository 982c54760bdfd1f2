"""A container that writes too fast where cgroup v2 has the controller `cpu`: slowed by a limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.compiling import compiled
from tests.lab.migrating import (
    Migration,
    Resident,
    begin,
    migrate,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.waiting import wait_until

# As fast as it can.
SPEC: Final = ContainerSpec(
    "vm-throttle", "memory", args=("100000",), memory_mib=8, address="10.77.0.68/24", address6=None
)
RATE: Final = "20mbit"
FAST: Final = "10gbit"
OWN_LIMIT: Final = "90000 100000"
# Of a container whose configuration has none.
NO_LIMIT: Final = "max 100000"
# Both hold the container back: the limit all the time, the tracker for moments.
OPTIONS: Final = ("--json", "--max-downtime", "500", "--tracker", "soft-dirty")


@pytest.fixture
def guest(machines: Lab, tmp_path: Path) -> Iterator[Resident]:
    program = compiled("busy_memory", tmp_path)
    with resident(machines, SPEC, program=program, rate_per_s=20) as guest:
        for host in ("A", "B"):
            machines.set_rate(host, RATE)
        yield guest
        for host in ("A", "B"):
            machines.set_rate(host, FAST)


def limit_path(name: str) -> str:
    return f"/sys/fs/cgroup/dolly/{name}/cpu.max"


def limit(host: Host, name: str) -> str:
    """What the container may use of its processors."""
    return host.read_text(limit_path(name)).strip()


def events(migration: Migration, kind: str) -> list[dict[str, Any]]:
    return [one for one in migration.events if one.get("event") == kind]


def test_its_limit_is_what_it_was_whatever_happens(guest: Resident) -> None:
    source, target = guest.lab.host("A"), guest.lab.host("B")
    # As an operator would set it.
    source.write_text(limit_path(guest.name), OWN_LIMIT)
    a_killed_coordinator_leaves_it_alone(guest, source)
    wait_clean(target)

    given_up = migrate(source, guest.name, "B", *OPTIONS, "--on-stall", "abort")
    assert given_up.code == 1
    assert not events(given_up, "throttled")
    assert "runs on A" in given_up.stderr
    assert limit(source, guest.name) == OWN_LIMIT
    wait_clean(source, guest.name)
    wait_clean(target)
    assert running_on(guest.lab, guest.name) == ["A"]

    moved = migrate(source, guest.name, "B", *OPTIONS)
    assert moved.done["throttle"]["by"] == "cpu.max"
    rounds = events(moved, "round")
    stalled = [one for one in rounds if one["decision"] == "stalled"]
    assert rounds[-1]["decision"] == "freeze", moved.stdout
    assert rounds[-1]["remaining_bytes"] < stalled[0]["remaining_bytes"] / 2
    # That of its configuration: what is set by hand does not travel, nor does what slowed it.
    assert limit(target, guest.name) == NO_LIMIT
    assert running_on(guest.lab, guest.name) == ["B"]
    wait_clean(source)
    wait_clean(target, guest.name)

    report = migrate(target, guest.name, "A", *OPTIONS, "--on-stall", "freeze").done
    assert report["throttle"] is None
    assert "faster than sent" in report["freeze_reason"] or "not bring" in report["freeze_reason"]
    assert limit(source, guest.name) == NO_LIMIT
    assert running_on(guest.lab, guest.name) == ["A"]
    wait_clean(target)
    guest.ask("RATE 0")
    guest.verify()
    assert guest.stop_probe().clean


def a_killed_coordinator_leaves_it_alone(guest: Resident, source: Host) -> None:
    underway = begin(source, guest.name, "B", *OPTIONS)
    patience = source.patience
    wait_until("it is slowed", lambda: underway.events("throttled"), deadline_s=60.0 * patience)
    # Except while the tracker works.
    wait_until("the limit is lower", lambda: limit(source, guest.name) != OWN_LIMIT)
    underway.kill()
    underway.finish()
    wait_until(
        "it is as before",
        lambda: limit(source, guest.name) == OWN_LIMIT,
        deadline_s=20.0 * patience,
    )
    wait_clean(source, guest.name)
    assert running_on(guest.lab, guest.name) == ["A"]
