"""Twelve containers under load leave a host for three others, and come home.

Asked for by name: `scripts/test tests/long`. Its last lines are for README and ARCHITECTURE.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.lab.migrating import resident, running_on
from tests.lab.test_drain import drained

if TYPE_CHECKING:
    from tests.lab.migrating import Resident

LONG_S = 600.0
TO = ("--to", "B,C,D")
KINDS = ("memory", "redis", "tree", "memory") * 3


def spec(number: int, workload: str) -> ContainerSpec:
    args = {"memory": ("2",), "redis": (), "tree": ()}[workload]
    address = f"10.77.0.{40 + number}/24"
    return ContainerSpec(f"t{number}", workload, args=args, address=address, address6=None)


def tell(what: str, state: dict[str, Any], seconds: float) -> None:
    downtimes = sorted(one["downtime_ms"] for one in state["moves"] if one["downtime_ms"])
    middle, longest = statistics.median(downtimes), downtimes[-1]
    print(
        f"{what}: {len(downtimes)} moves in {seconds:.0f} s, downtime median {middle:.0f} ms,"
        f" longest {longest:.0f} ms",
        flush=True,
    )


@pytest.mark.timeout(1800)
def test_twelve_containers_leave_and_come_home() -> None:
    with Lab(["A", "B", "C", "D"]) as lab, contextlib.ExitStack() as stack:
        lab.start_agents()
        guests: list[Resident] = []
        for number, kind in enumerate(KINDS):
            guests.append(stack.enter_context(resident(lab, spec(number, kind), rate_per_s=50)))
            if kind == "redis":
                guests[-1].redis("fill")
        print(f"{len(guests)} containers run on A", flush=True)
        begun_s = time.monotonic()
        host, three = lab.host("A"), ("--max-parallel", "3")
        emptied = drained(host, "drain-node", *TO, *three, deadline_s=LONG_S)
        tell("drain-node", emptied, time.monotonic() - begun_s)
        assert {one["state"] for one in emptied["moves"]} == {"arrived"}
        assert len(emptied["moves"]) == len(KINDS)
        assert emptied["cordoned"]
        for one in emptied["moves"]:
            assert running_on(lab, one["container"]) == [one["target"]]
        begun_s = time.monotonic()
        home = drained(host, "undrain", *three, deadline_s=LONG_S)
        tell("undrain", home, time.monotonic() - begun_s)
        assert all(running_on(lab, guest.name) == ["A"] for guest in guests)
        for guest in guests:
            if guest.spec.workload == "memory":
                guest.verify()
            assert guest.probe is not None
            assert guest.probe.alive(), f"the connection to {guest.name} broke"
            seen = guest.stop_probe()
            assert seen.clean, seen
