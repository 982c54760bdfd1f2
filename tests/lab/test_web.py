"""Web servers of several processes move, with clients that keep their connections."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from bench.containers import ContainerSpec
from tests.lab.migrating import migrate, resident, running_on, wait_clean

if TYPE_CHECKING:
    from bench.lab.lab import Lab

pytestmark = pytest.mark.lab


def test_nginx_and_a_python_server_move_with_their_connections(agents: Lab) -> None:
    with contextlib.ExitStack() as stack:
        guests = [
            stack.enter_context(
                resident(agents, ContainerSpec(workload, workload, address=f"10.77.0.{at}/24"))
            )
            for at, workload in ((80, "nginx"), (81, "web"))
        ]
        for guest in guests:
            moved = migrate(agents.host("A"), guest.name, "B")
            assert moved.done["downtime_ms"] > 0
            assert running_on(agents, guest.name) == ["B"]
            assert guest.stop_probe().clean
        wait_clean(agents.host("A"))
