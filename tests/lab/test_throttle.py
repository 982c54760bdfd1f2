"""A container that writes faster than its link carries: slowed until it can be moved, and running
freely afterwards, whoever dies meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.compiling import compiled
from tests.lab.invariants import is_frozen, picture
from tests.lab.migrating import Resident, begin, migrate, resident, running_on, wait_clean
from tests.lab.waiting import wait_until

RATE: Final = "80mbit"
LIMIT_MS: Final = 500
SPEC: Final = ContainerSpec(
    "mv-throttle",
    "memory",
    # As fast as it can.
    args=("100000",),
    memory_mib=8,
    address="10.77.0.87/24",
    address6=None,
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(["A", "B"], rate=RATE) as lab:
        lab.start_agents()
        yield lab


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """programs/busy_memory.c."""
    return compiled("busy_memory", tmp_path_factory.mktemp("programs"))


@pytest.fixture
def guest(lab: Lab, busy: Path) -> Iterator[Resident]:
    with resident(lab, SPEC, program=busy) as guest:
        yield guest
        # Its writer leaves the lock to nobody.
        guest.ask("RATE 0")
        guest.verify()
        assert guest.stop_probe().clean


def events(told: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in told if one.get("event") == kind]


def keeper(host: Host) -> str:
    """The pid of what slows the container, as its host sees it."""
    return host.run(["pgrep", "-f", "migrate.throttle_keeper"]).stdout.strip()


def assert_moved(guest: Resident) -> None:
    """It runs on B, freely, and nothing is left of what slowed it."""
    assert running_on(guest.lab, guest.name) == ["B"]
    assert not is_frozen(guest.lab.host("B"), guest.name)
    wait_clean(guest.lab.host("A"))
    wait_clean(guest.lab.host("B"), guest.name)


def test_it_is_slowed_until_it_can_be_moved(guest: Resident) -> None:
    moved = migrate(guest.lab.host("A"), guest.name, "B", "--json", "--max-downtime", str(LIMIT_MS))
    report = moved.done
    rounds, steps = events(moved.events, "round"), events(moved.events, "throttled")
    shares = [step["cpu_percent"] for step in steps]
    assert shares == sorted(shares, reverse=True)
    assert report["throttle"] == {
        "cpu_percent": shares[-1],
        "by": "pulses of the freezer",
        "steps": len(steps),
    }
    # What was left of its memory after each round did not fall before, and has fallen since.
    stalled = [one for one in rounds if one["decision"] == "stalled"]
    assert rounds[-1]["decision"] == "freeze", moved.stdout
    assert rounds[-1]["remaining_bytes"] < stalled[0]["remaining_bytes"] / 2
    assert report["predicted_downtime_ms"] <= LIMIT_MS
    assert_moved(guest)


def test_killed_with_what_slows_it_it_is_given_back_and_then_frozen_as_it_is(
    guest: Resident,
) -> None:
    """Nobody is left but the agent of the host, and what hangs has left the container frozen."""
    source = guest.lab.host("A")
    before = picture(source, guest.name)
    underway = begin(source, guest.name, "B", "--json")
    wait_until("it is slowed", lambda: underway.events("throttled"), deadline_s=60.0)
    source.run(["kill", "-STOP", keeper(source)])
    source.write_text(f"/sys/fs/cgroup/dolly/{guest.name}/cgroup.freeze", "1")
    underway.kill()
    underway.finish()
    wait_until("it is as before", lambda: picture(source, guest.name) == before)
    wait_clean(source, guest.name)
    wait_clean(guest.lab.host("B"))
    assert running_on(guest.lab, guest.name) == ["A"]
    guest.wait_answers()
    report = migrate(source, guest.name, "B", "--on-stall", "freeze").done
    assert report["throttle"] is None
    assert "faster than sent" in report["freeze_reason"] or "not bring" in report["freeze_reason"]
    assert report["predicted_downtime_ms"] > 300
    assert_moved(guest)
