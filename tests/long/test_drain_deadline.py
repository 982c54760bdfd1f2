"""A deadline that is long enough: what small containers took is not held against a large one."""

from __future__ import annotations

import contextlib

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.lab.migrating import resident, running_on
from tests.lab.test_drain import assert_unharmed, drained, moves

LARGE_MIB = 512
DEADLINE_S = 240


def spec(number: int, mib: int) -> ContainerSpec:
    address = f"10.77.0.{60 + number}/24"
    return ContainerSpec(
        f"d{number}", "memory", args=("1",), memory_mib=mib, address=address, address6=None
    )


@pytest.mark.timeout(600)
def test_a_large_container_leaves_behind_small_ones_within_the_deadline() -> None:
    with Lab(["A", "B"]) as lab, contextlib.ExitStack() as stack:
        lab.start_agents()
        host = lab.host("A")
        sizes = (1, 1, 1, LARGE_MIB)
        specs = [spec(number, mib) for number, mib in enumerate(sizes)]
        guests = [stack.enter_context(resident(lab, one, rate_per_s=100)) for one in specs]
        # It has no say in what is measured: a program of the operator that takes its time.
        host.write_text("/etc/migrate/drain.d/slow", "#!/bin/sh\nsleep 5\n", 0o755)
        state = drained(host, "drain-node", "--to", "B", "--deadline", str(DEADLINE_S))
        for one in state["moves"]:
            print(
                f"{one['container']}: predicted {one['predicted_s']:.1f} s,"
                f" took {one['seconds']:.1f} s",
                flush=True,
            )
        assert moves(state) == {guest.name: ("arrived", "B") for guest in guests}
        assert all(running_on(lab, guest.name) == ["B"] for guest in guests)
        assert_unharmed(guests)
