"""A source that says COMMIT twice, too early, or never: its container runs once all the same, and
the target serves others meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from bench.lab.host_files import SOURCE_INSIDE
from bench.lab.lab import Lab
from tests.lab.invariants import failure_lab, is_held, session_states, threatened
from tests.lab.migrating import Underway, migrate, running_on, wait_clean
from tests.lab.waiting import wait_until

PROGRAM: Final = ("env", f"PYTHONPATH={SOURCE_INSIDE}", "python3", "-m", "tests.lab.lying")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


def lying(lab: Lab, lie: str, name: str) -> Underway:
    return Underway(lab.host("A"), name, [lie, name, "--to", "B"], env=None, program=PROGRAM)


def test_twice(lab: Lab) -> None:
    with threatened(lab, "twice") as under:
        assert lying(lab, "commit-twice", "twice").finish().done
        assert running_on(lab, "twice") == ["B"]
        wait_clean(lab.host("B"), "twice")
        under.guest.wait_answers()
        under.guest.verify()


def test_another_restore_meanwhile(lab: Lab) -> None:
    """What was judged counts, not what is said while that goes on."""
    with threatened(lab, "again") as under:
        assert lying(lab, "restore-twice", "again").finish().done
        assert running_on(lab, "again") == ["B"]
        wait_clean(lab.host("B"), "again")
        under.guest.wait_answers()
        under.guest.verify()


def test_too_early(lab: Lab) -> None:
    """It is no word for a session that holds nothing: nothing runs before it was held."""
    with threatened(lab, "early") as under:
        moved = lying(lab, "commit-early", "early").finish().done
        assert running_on(lab, "early") == ["B"]
        wait_clean(lab.host("B"), "early")
        states = session_states(lab.host("B"), moved["migration_id"])
        assert states.count("committed") == 1
        assert states.index("held") < states.index("committed") < states.index("running")
        under.guest.wait_answers()
        under.guest.verify()


def test_never(lab: Lab) -> None:
    """The copy is held for as long as its source says nothing. When that has died, the agent of its
    host says what its journal says."""
    with threatened(lab, "never") as under, threatened(lab, "other") as other:
        silent = lying(lab, "commit-never", "never")
        wait_until("it is held", lambda: is_held(lab.host("B"), "never"))
        assert migrate(lab.host("A"), "other", "B").done
        assert running_on(lab, "other") == ["B"]
        other.guest.wait_answers()
        silent.kill()
        silent.finish()
        wait_until("it runs", lambda: running_on(lab, "never") == ["B"])
        under.guest.wait_answers()
        under.guest.verify()
