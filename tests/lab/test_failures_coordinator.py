"""The coordinator is killed: whoever has the container keeps it, and nobody runs it twice."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.brake import Brake
from tests.lab.invariants import (
    AGENT_LOG,
    SLOW,
    assert_gave_back,
    assert_moves,
    assert_runs_once,
    attempt,
    failure_lab,
    held_unheard,
    is_frozen,
    is_held,
    migration_id,
    threatened,
    wait_round,
    wait_session,
)
from tests.lab.migrating import running_on, wait_clean
from tests.lab.waiting import wait_until

# Holds the journal's lock until its input ends.
LOCK = """
import sqlite3, sys
journal = sqlite3.connect("/var/lib/migrate/journal.sqlite", isolation_level=None)
journal.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked_journal(host: Host) -> Iterator[None]:
    """Nobody can write the host's journal within the block."""
    locker = host.popen(["python3", "-c", LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with locker:
        assert locker.stdout is not None
        assert locker.stdout.readline() == "locked\n"
        yield
        locker.communicate("")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


def test_killed_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "c-copy") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            underway.kill()
        wait_clean(lab.host("B"))
        assert_gave_back(under)
        assert_moves(under)


def test_killed_when_both_sides_are_prepared(lab: Lab) -> None:
    with threatened(lab, "c-prep", args=("50",)) as under:
        with attempt(under) as underway:
            underway.wait_phase("prepare")
            # The last round is long then.
            lab.set_rate("A", SLOW)
            wait_session(lab.host("B"), migration_id(underway), "prepared")
            underway.kill()
        wait_clean(lab.host("B"))
        assert_gave_back(under)
        assert_moves(under)


def test_killed_while_the_container_is_frozen(lab: Lab) -> None:
    """The guard gives the container back."""
    brake = Brake(lab.host("A"))
    with threatened(lab, "c-frozen") as under:
        with brake.on("dump"), attempt(under, env=brake.env) as underway:
            brake.wait_reached(underway)
            underway.kill()
            assert running_on(lab, under.name) == []
        wait_clean(lab.host("B"))
        assert_gave_back(under)
        assert_moves(under)


def test_the_journal_can_not_be_written_when_it_is_time_to_commit(lab: Lab) -> None:
    """The container stands still as long as nobody can say whose it is, and then goes on here."""
    brake, source = Brake(lab.host("B")), lab.host("A")
    with threatened(lab, "c-journal") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            with locked_journal(source):
                brake.release()
                done = underway.finish()
        assert done.code in (1, 3), done
        assert "journal" in done.stderr
        assert "Traceback" not in done.stderr
        assert_gave_back(under)
        assert_moves(under)


def test_the_target_can_not_record_the_commit_for_a_while(lab: Lab) -> None:
    """It says so, both hold, and the source says COMMIT again until it is recorded."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, "c-t-journal") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            with locked_journal(target):
                brake.release()
                failed = "action=<TargetAction.RECORD_COMMIT"
                wait_until("it can't be recorded", lambda: failed in target.read_text(AGENT_LOG))
                assert is_held(target, under.name)
            done = underway.finish()
        assert done.code == 0, done
        assert running_on(lab, under.name) == ["B"]
        wait_clean(lab.host("A"))
        wait_clean(target, under.name)
        under.guest.wait_answers()
        under.guest.verify()


def test_killed_in_the_restore(lab: Lab) -> None:
    """The target has not told that it holds a copy, so it gives up by itself."""
    brake = Brake(lab.host("B"))
    with threatened(lab, "c-restore") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            underway.kill()
        wait_clean(lab.host("B"))
        assert_gave_back(under)
        assert_moves(under)


def test_killed_before_it_has_committed_what_the_target_holds(lab: Lab) -> None:
    """The target can't know whether it has: it holds the copy, and asks the agent of the source."""
    target = lab.host("B")
    with threatened(lab, "c-held") as under:
        with held_unheard(under) as session:
            assert is_frozen(lab.host("A"), under.name)
        assert_gave_back(under)
        wait_session(target, session, "in_doubt")
        wait_session(target, session, "aborted")
        wait_clean(target)
        assert_runs_once(under)
        assert_moves(under)
        assert running_on(lab, under.name) == ["B"]


def test_killed_when_nobody_can_tell_the_target(lab: Lab) -> None:
    """The source has no agent either: the copy is held until somebody starts one."""
    target = lab.host("B")
    with threatened(lab, "c-alone") as under:
        with held_unheard(under) as session:
            lab.kill_agent("A")
        assert_gave_back(under)
        wait_session(target, session, "in_doubt")
        told = f"the container is held and waits for its source' migration='{session}'"
        wait_until("it says so", lambda: told in target.read_text(AGENT_LOG))
        assert is_held(target, under.name)
        assert_runs_once(under)
        lab.start_agent("A", env=Brake.env)
        wait_session(target, session, "aborted")
        wait_clean(target)
        assert_moves(under)
