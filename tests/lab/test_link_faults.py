"""The link breaks, falls silent, is slow, late, lossy: the same session goes on, and finishes.

What lasts longer than a migration waits for is in test_failures_link.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.invariants import (
    AGENT_LOG,
    FAST,
    SLOW,
    Threatened,
    attempt,
    failure_lab,
    migration_id,
    session_states,
    threatened,
    wait_round,
    wait_session,
)
from tests.lab.migrating import Underway, running_on, wait_clean
from tests.lab.waiting import wait_until

PAGE_BYTES: Final = 4096
# What a stream may have sent without an answer (transport/core/connection.py), and a lab's streams.
IN_FLIGHT_BYTES: Final = 2 * 8 * ((1 << 20) + (8 << 10))
# Headers of frames, and marks of zero pages.
HEADERS_BYTES: Final = 64 << 10
# What an agent logs when the source's connection has ended otherwise than in order.
BROKEN: Final = "the link is broken"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


def assert_went_on(under: Threatened, underway: Underway, breaks: int = 0) -> None:
    """It has moved in one session, and no round was begun anew: see `transport/sender.py`."""
    lab, name = under.lab, under.name
    session = migration_id(underway)
    report = underway.finish().done
    assert session_states(lab.host("B"), session).count("receiving") == 1
    numbers = [one["number"] for one in report["rounds"]]
    assert numbers == sorted(set(numbers)), report["rounds"]
    first = report["rounds"][0]
    pages = first["pages"] + first["zero_pages"] + first["unchanged_pages"]
    assert pages * PAGE_BYTES <= report["memory_bytes"] + (4 << 20), first
    raw_bytes = sum(one["bytes_raw"] for one in report["rounds"])
    sent_bytes = sum(one["bytes_sent"] for one in report["rounds"])
    limit_bytes = raw_bytes + len(numbers) * HEADERS_BYTES + breaks * IN_FLIGHT_BYTES
    assert sent_bytes <= limit_bytes, report["rounds"]
    lab.set_rate("A", FAST)
    assert running_on(lab, name) == ["B"]
    wait_clean(lab.host("A"))
    wait_clean(lab.host("B"), name)
    under.guest.wait_answers()
    under.guest.verify()


def breaks(host: Host) -> int:
    """How often a control channel has broken on a target, by its agent's log."""
    return host.read_text(AGENT_LOG).count(BROKEN)


def reset(lab: Lab) -> None:
    """Resets control channel and streams, once there are some again."""
    before = breaks(lab.host("B"))

    def done() -> bool:
        lab.reset_connections("A", "B")
        return breaks(lab.host("B")) > before

    wait_until("the control channel is reset", done)


def test_a_reset_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "k-copy") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            reset(lab)
            lab.set_rate("A", FAST)
            assert_went_on(under, underway, breaks=1)


def test_a_reset_while_both_sides_prepare(lab: Lab) -> None:
    with threatened(lab, "k-prep", args=("50",)) as under, attempt(under) as underway:
        underway.wait_phase("prepare")
        # The last round is long then.
        lab.set_rate("A", SLOW)
        wait_session(lab.host("B"), migration_id(underway), "prepared")
        reset(lab)
        lab.set_rate("A", FAST)
        assert_went_on(under, underway, breaks=1)


def test_several_resets_in_a_row(lab: Lab) -> None:
    with threatened(lab, "k-many") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            for _ in range(4):
                reset(lab)
            lab.set_rate("A", FAST)
            assert_went_on(under, underway, breaks=4)


def test_silence_that_ends(lab: Lab) -> None:
    """Longer than a control channel takes for alive, shorter than it is waited for."""
    with threatened(lab, "k-silent") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            before = breaks(lab.host("B"))
            lab.set_isolated(["A", "B"], isolated=True)
            wait_until("it is noticed", lambda: breaks(lab.host("B")) > before)
            lab.set_isolated(["A", "B"], isolated=False)
            lab.set_rate("A", FAST)
            assert_went_on(under, underway, breaks=1)


def test_a_link_of_one_megabit(lab: Lab) -> None:
    with threatened(lab, "k-1mbit", args=("0",), memory_mib=1) as under:
        lab.set_rate("A", "1mbit")
        with attempt(under) as underway:
            assert_went_on(under, underway)


@pytest.mark.parametrize(
    "fault",
    [{"loss": 0.02}, {"reorder": 0.05}, {"delay_ms": 500.0}],
    ids=["loss", "reorder", "delay"],
)
def test_a_bad_link(lab: Lab, fault: dict[str, Any]) -> None:
    (kind,) = fault
    with threatened(lab, f"k-{kind[:5]}", memory_mib=4) as under:
        lab.set_fault("A", **fault)
        try:
            with attempt(under) as underway:
                assert_went_on(under, underway)
        finally:
            lab.set_fault("A")
