"""The `tree` workload as tests look at it: what it finds wrong with itself, how far it has come."""

from __future__ import annotations

import json

from tests.lab.migrating import Resident
from tests.lab.waiting import wait_until


def tree_faults(guest: Resident) -> dict[str, str]:
    """What a tree finds wrong with itself."""
    verdicts: dict[str, str] = json.loads(guest.ask("CHECK")[0])
    assert len(verdicts) > 30
    return {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}


def tree_counters(guest: Resident) -> dict[str, int]:
    """How far each thread and feature of a tree has come."""
    answer = json.loads(guest.ask("COUNTERS")[0])
    counts: dict[str, int] = dict(answer["progress"])
    for process, beats in enumerate(answer["beats"]):
        counts |= {f"{process}.{thread}": beat for thread, beat in enumerate(beats)}
    return counts


def check_tree(guest: Resident) -> None:
    """Every thread and every feature of a tree goes on, and nothing is wrong."""
    assert tree_faults(guest) == {}
    before = tree_counters(guest)

    def all_grew() -> bool:
        now = tree_counters(guest)
        return all(now[name] > count for name, count in before.items())

    wait_until("every counter of the tree grows", all_grew)
    assert tree_faults(guest) == {}
