"""A host that containers are sent to dies, as by a power failure, while one is on its way there."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from bench.lab.lab import Lab
from tests.lab.migrating import resident, running_on
from tests.lab.test_drain import STATE, assert_unharmed, drained, moves, spec
from tests.lab.waiting import wait_until

if TYPE_CHECKING:
    from bench.lab.host import Host

LONG_S = 600.0
MOVING = '"state":"moving"'
# 16 MiB of a container are under way for eight seconds.
SLOWLY = ("--bandwidth", "2")


def ended(host: Host) -> dict[str, Any]:
    """How the drain ended that is under way."""

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(host.read_text(STATE))
        return found

    wait_until("the drain ends", lambda: state()["phase"] == "ended", deadline_s=LONG_S)
    return state()


def crash_a_target(lab: Lab, to: str) -> str:
    """A drain of A begins, and the first target dies in the midst of the copy; which it was."""
    host = lab.host("A")
    host.run(["migrate", "drain-node", "--to", to, *SLOWLY, "--detach"])
    wait_until("a container moves", lambda: MOVING in host.read_text(STATE), deadline_s=60)
    (move,) = (
        one for one in json.loads(host.read_text(STATE))["moves"] if one["state"] == "moving"
    )
    there = lab.host(move["target"])
    arriving = f"/run/migrate/sessions/{move['migration_id']}.target"
    wait_until("a session is open", lambda: there.path(arriving).exists(), deadline_s=60)
    lab.crash(there.name)
    return there.name


@pytest.mark.timeout(1800)
def test_a_target_host_dies_and_everything_still_runs() -> None:
    with Lab(["A", "B", "C"]) as lab, contextlib.ExitStack() as stack:
        lab.start_agents()
        host = lab.host("A")
        guests = [stack.enter_context(resident(lab, spec(number))) for number in range(3)]
        names = [guest.name for guest in guests]

        dead = crash_a_target(lab, "B,C")
        (other,) = {"B", "C"} - {dead}
        state = ended(host)
        assert state["exit_code"] == 0
        assert moves(state) == dict.fromkeys(names, ("arrived", other))
        assert all(running_on(lab, name) == [other] for name in names)
        lab.boot(dead)
        lab.start_agent(dead)
        home = drained(host, "undrain", deadline_s=LONG_S)
        assert moves(home) == dict.fromkeys(names, ("home", other))

        dead = crash_a_target(lab, "B")
        state = ended(host)
        assert state["exit_code"] == 1
        assert {one["state"] for one in state["moves"]} == {"stays"}
        assert all(f"{dead}: " in one["why"] for one in state["moves"]), state
        assert host.path("/var/lib/migrate/cordon.json").exists()
        assert all(running_on(lab, name) == ["A"] for name in names)
        assert_unharmed(guests)
