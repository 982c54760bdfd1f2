"""Migrations that are under way at the same time between the same two hosts."""

from __future__ import annotations

from typing import Final

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.lab.migrating import begin, resident, running_on, wait_clean

ARGS: Final = ("12", "--text", "30", "--zero", "10")
FIRST: Final = ContainerSpec(
    "mv-first", "memory", ARGS, 48, address="10.77.0.88/24", address6="fd77::88/112"
)
SECOND: Final = ContainerSpec(
    "mv-second", "memory", ARGS, 32, address="10.77.0.89/24", address6="fd77::89/112"
)
COUNTER: Final = ContainerSpec(
    "mv-counter", "memory", ARGS, 32, address="10.77.0.90/24", address6="fd77::90/112"
)


def test_two_one_way_and_one_the_other_way_at_once(agents: Lab) -> None:
    """Each arrives with its own memory, and takes nothing of the others with it."""
    a, b = agents.host("A"), agents.host("B")
    with (
        resident(agents, FIRST) as first,
        resident(agents, SECOND) as second,
        resident(agents, COUNTER, on="B") as counter,
    ):
        guests = [first, second, counter]
        under_way = [
            begin(a, first.name, "B"),
            begin(a, second.name, "B"),
            begin(b, counter.name, "A"),
        ]
        ended = [one.finish() for one in under_way]
        reports = [one.done for one in ended]
        assert [(one["container"], one["target"]) for one in reports] == [
            (first.name, "B"),
            (second.name, "B"),
            (counter.name, "A"),
        ]
        assert [running_on(agents, guest.name) for guest in guests] == [["B"], ["B"], ["A"]]
        wait_clean(a, counter.name)
        wait_clean(b, first.name, second.name)
        for guest in guests:
            guest.verify()
            guest.wait_answers()
        clients = [guest.stop_probe() for guest in guests]
    assert all(client.clean for client in clients), clients
    wait_clean(a)
    wait_clean(b)


def test_one_container_is_moved_once(agents: Lab) -> None:
    """Of two migrations of one container, one is refused and the other one is done."""
    a, b = agents.host("A"), agents.host("B")
    with resident(agents, FIRST) as guest:
        ended = [one.finish() for one in [begin(a, guest.name, "B"), begin(a, guest.name, "B")]]
        assert sorted(one.code == 0 for one in ended) == [False, True], ended
        assert running_on(agents, guest.name) == ["B"]
        wait_clean(a)
        wait_clean(b, guest.name)
        guest.verify()
        assert guest.stop_probe().clean
