"""Twelve containers under load leave a host for three others, and come home.

Asked for by name: `scripts/test tests/long`. Its last lines are for README and ARCHITECTURE.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from bench.probe_process import start_probe
from migrate.config import DOWNTIME_MS_MAX_DEFAULT
from migrate.drain_report import OVER
from tests.lab.migrating import resident, running_on
from tests.lab.test_drain import assert_unharmed, drained

if TYPE_CHECKING:
    from bench.lab.host import Host
    from bench.probe_process import ProbeProcess
    from tests.lab.migrating import Resident

LONG_S = 600.0
TO = ("--to", "B,C,D")
KINDS = ("redis", "nginx", "web", "memory") * 3
# Connections to each server of several processes, besides the one that each container has.
MORE_CLIENTS = 3


def spec(number: int, workload: str) -> ContainerSpec:
    args = ("2",) if workload == "memory" else ()
    address = f"10.77.0.{40 + number}/24"
    return ContainerSpec(f"t{number}", workload, args=args, address=address, address6=None)


def assert_told_when_over(host: Host, state: dict[str, Any]) -> None:
    """What stood still for longer than asked, by more than half, is said to have."""
    told = host.run(["migrate", "status"]).stdout.splitlines()
    for one in state["moves"]:
        (line,) = (line for line in told if line.startswith(f"  {one['container']} "))
        is_over = one["downtime_ms"] > OVER * DOWNTIME_MS_MAX_DEFAULT
        assert is_over == ("asked for" in line), line


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
        others: list[ProbeProcess] = []
        for number, kind in enumerate(KINDS):
            guests.append(stack.enter_context(resident(lab, spec(number, kind), rate_per_s=50)))
            if kind == "redis":
                guests[-1].redis("fill")
            if guests[-1].spec.client == "http":
                given = ("http", guests[-1].spec.ip, guests[-1].spec.port)
                others += [
                    stack.enter_context(start_probe(*given, host=lab.client, rate_per_s=10))
                    for _ in range(MORE_CLIENTS)
                ]
        print(f"{len(guests)} containers run on A, load {os.getloadavg()[0]:.1f}", flush=True)
        begun_s = time.monotonic()
        host, three = lab.host("A"), ("--max-parallel", "3")
        emptied = drained(host, "drain-node", *TO, *three, deadline_s=LONG_S)
        tell("drain-node", emptied, time.monotonic() - begun_s)
        assert {one["state"] for one in emptied["moves"]} == {"arrived"}
        assert len(emptied["moves"]) == len(KINDS)
        assert emptied["cordoned"]
        assert_told_when_over(host, emptied)
        for one in emptied["moves"]:
            assert running_on(lab, one["container"]) == [one["target"]]
        begun_s = time.monotonic()
        home = drained(host, "undrain", *three, deadline_s=LONG_S)
        tell("undrain", home, time.monotonic() - begun_s)
        assert_told_when_over(host, home)
        assert all(running_on(lab, guest.name) == ["A"] for guest in guests)
        for guest in guests:
            if guest.spec.workload == "redis":
                guest.redis("verify")
        assert_unharmed(guests)
        for probe in others:
            assert probe.alive(), "a further connection broke"
            seen = probe.stop()
            assert seen.clean, seen
