"""The link to a copy's target falls silent: what both sides wait for takes its time."""

from __future__ import annotations

from tests.lab.brake import Brake
from tests.lab.cloning import cloning, failed
from tests.lab.invariants import (
    FAST,
    SLOW,
    assert_undone,
    failure_lab,
    threatened,
    wait_round,
)


def test_a_copy_is_given_up_when_the_link_falls_silent() -> None:
    """While memory is copied, and in the restore: the target may be sure of nothing then until it
    can ask."""
    with failure_lab() as lab, threatened(lab, "c-silent") as under:
        brake = Brake(lab.host("B"))
        for phase in ("precopy", "restore"):
            lab.set_rate("A", SLOW if phase == "precopy" else FAST)
            with brake.on("restore"), cloning(lab, under.name, "--link-patience", "0") as underway:
                if phase == "precopy":
                    wait_round(underway)
                else:
                    brake.wait_reached(underway)
                lab.set_isolated(["A", "B"], isolated=True)
                try:
                    told = failed(underway)
                finally:
                    lab.set_isolated(["A", "B"], isolated=False)
            assert (told.host, told.phase, told.container) == ("B", phase, "runs on A")
            assert told.remedy
            lab.set_rate("A", FAST)
            assert_undone(under)
