"""What the options of the command change, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.lab.filtering import filtered
from tests.lab.invariants import explained
from tests.lab.migrating import (
    Migration,
    Resident,
    Underway,
    migrate,
    remains,
    resident,
    running_on,
    wait_clean,
)

SPEC: Final = ContainerSpec(
    "mv-options",
    "memory",
    args=("8", "--text", "30"),
    memory_mib=16,
    address="10.77.0.85/24",
    address6="fd77::85/112",
)
# It writes more than a link of RATE carries.
BUSY: Final = ContainerSpec(
    "mv-busy",
    "memory",
    args=("60",),
    memory_mib=16,
    address="10.77.0.86/24",
    address6="fd77::86/112",
)
RATE: Final = "200mbit"


@pytest.fixture(scope="module")
def guest(agents: Lab) -> Iterator[Resident]:
    """One container for all tests of this module, wherever it is."""
    with resident(agents, SPEC) as guest:
        yield guest
        assert guest.stop_probe().clean


def away(guest: Resident, *options: str) -> Migration:
    """Moves it to the other host."""
    (source,) = running_on(guest.lab, guest.name)
    target = {"A": "B", "B": "A"}[source]
    moved = migrate(guest.lab.host(source), guest.name, target, *options)
    if moved.code == 0 and "--dry-run" not in options:
        assert running_on(guest.lab, guest.name) == [target]
        wait_clean(guest.lab.host(source))
        wait_clean(guest.lab.host(target), guest.name)
        guest.verify()
    return moved


def test_a_dry_run_changes_nothing(guest: Resident) -> None:
    lab = guest.lab
    before = {host.name: remains(host) for host in lab.hosts}
    answer = away(guest, "--dry-run")
    assert answer.code == 0, answer.stderr
    assert "nothing stands in the way" in answer.stdout
    assert "tracker write-protect (it works here" in answer.stdout
    assert answer.report is None
    assert {host.name: remains(host) for host in lab.hosts} == before
    guest.wait_answers()


def test_a_filter_of_system_calls_over_the_command_refuses_it(guest: Resident) -> None:
    """Under it the container could be frozen, and then neither dumped nor let go."""
    (name,) = running_on(guest.lab, guest.name)
    source, others = guest.lab.host(name), {"A": "B", "B": "A"}
    program = filtered(source, "migrate")
    refused = Underway(
        source, guest.name, [guest.name, "--to", others[name]], None, program=program
    )
    assert set(explained(refused.finish(), 2).refusals) == {"filtered"}
    assert running_on(guest.lab, guest.name) == [name]
    guest.wait_answers()


def test_an_eager_restore_needs_no_fill(guest: Resident) -> None:
    report = away(guest, "--restore", "eager").done
    assert report["restore"] == "eager"
    assert not report["fill_ms"]
    assert not report["faults"]
    assert report["rounds"][0]["pages"] >= SPEC.memory_mib * 256


def test_without_a_tracker_it_is_warned_of_and_stopped_for_the_whole_copy(guest: Resident) -> None:
    moved = away(guest, "--tracker", "none")
    report = moved.done
    assert report["tracker"] == "none"
    (warning,) = report["warnings"]
    assert "stands still" in warning
    # Everything is in one round, the one that is sent while the container is frozen.
    assert max(one["pages"] for one in report["rounds"]) >= SPEC.memory_mib * 256
    assert "warning" in moved.stdout
    assert "stands still" in " ".join(moved.stdout.split())


def test_one_round_is_the_last_when_it_may_be_only_one(guest: Resident) -> None:
    report = away(guest, "--max-rounds", "1", "--max-downtime", "1").done
    assert "after the last of 1 rounds" in report["freeze_reason"]


def test_lines_tell_the_way_where_no_terminal_is(guest: Resident) -> None:
    moved = away(guest)
    assert moved.code == 0, moved.stderr
    assert moved.stderr == ""
    assert "\x1b" not in moved.stdout
    # Each line once, in the order of the way.
    words = ["preflight", "tracker write-protect", "rootfs", "round 1", "prepare  ", "freeze  "]
    words += ["moved  ", "filled  ", "way  "]
    places = [moved.stdout.find(word) for word in words]
    assert -1 not in places, (words, moved.stdout)
    assert places == sorted(places), moved.stdout
    assert moved.stdout.count("round 1 ") == 1


def test_json_is_an_event_a_line_and_the_report_last(guest: Resident) -> None:
    moved = away(guest, "--json")
    *events, report = moved.events
    assert report == moved.done
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["phase", "started"]
    assert kinds[-2:] == ["moved", "filled"]
    rounds = [event for event in events if event["event"] == "round"]
    assert [one["number"] for one in rounds] == list(range(1, len(rounds) + 1))
    for one, kept in zip(rounds, report["rounds"], strict=False):
        assert one["bytes_sent"] == kept["bytes_sent"]
    assert rounds[-1]["decision"] == "freeze"
    assert any(event["event"] == "progress" for event in events)
    (downtime,) = [event["downtime_ms"] for event in events if event["event"] == "moved"]
    assert downtime == report["downtime_ms"]
    assert json.loads(moved.stdout.splitlines()[-1])["outcome"] == "done"


def test_a_stall_is_given_up_and_the_container_runs_on(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"], rate=RATE)
    lab.start_agents()
    with resident(lab, BUSY) as guest:
        given_up = migrate(lab.host("A"), guest.name, "B", "--on-stall", "abort")
        assert given_up.code == 1
        assert re.search("faster than sent|would not bring it down", given_up.stderr)
        assert "--on-stall freeze" in given_up.stderr
        assert "runs on A" in given_up.stderr
        report = given_up.report
        assert report is not None
        assert report["outcome"] == "aborted"
        assert report["downtime_ms"] is None
        assert len(report["rounds"]) >= 3
        assert running_on(lab, guest.name) == ["A"]
        wait_clean(lab.host("B"))
        wait_clean(lab.host("A"), guest.name)
        guest.wait_answers()
        guest.verify()
        assert guest.stop_probe().clean
