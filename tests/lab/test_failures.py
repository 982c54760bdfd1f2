"""Migrations that fail on the target, in CRIU or by the user's will: the container runs on, and the
target keeps nothing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from bench.lab import agents
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.faults import processes
from tests.faults.points import Victim
from tests.lab.brake import Brake
from tests.lab.invariants import (
    AGENT_LOG,
    SLOW,
    assert_gave_back,
    assert_moves,
    assert_runs_once,
    assert_survives_a_failed_restore,
    assert_undone,
    attempt,
    explained,
    failure_lab,
    held_unheard,
    is_held,
    migration_id,
    threatened,
    wait_round,
    wait_session,
)
from tests.lab.migrating import migrate, running_on, wait_clean
from tests.lab.waiting import wait_until

# $1 a session's directory, $2 a bundle: what may go wrong with the files of a restore.
SPOIL_IMAGE: Final = "dd if=/dev/zero of=$1/img/pstree.img bs=8 count=1 conv=notrunc status=none"
LOSE_IMAGE: Final = "rm $1/img/core-1.img"
GROW_PROGRAM: Final = "echo >>$2/rootfs/bin/memory"
# A task that CRIU has made opens this one, and waits there for somebody who writes.
STALL_IMAGE: Final = "rm $1/img/fs-1.img && mkfifo $1/img/fs-1.img"
LOSE_PROGRAM: Final = "rm $2/rootfs/bin/memory"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


# ---- the target's agent dies ----


def test_the_agent_dies_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "f-copy") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            lab.kill_agent("B")
            told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "precopy", "runs on A")
        # What the dead agent has left goes when the next one starts.
        lab.start_agent("B", env=Brake.env)
        assert_undone(under)
        assert_moves(under)


def test_the_agent_dies_when_the_restore_is_prepared(lab: Lab) -> None:
    with threatened(lab, "f-prep", args=("50",)) as under:
        with attempt(under) as underway:
            underway.wait_phase("prepare")
            # The last round is long then, with the target's runtime at its gate.
            lab.set_rate("A", SLOW)
            wait_session(lab.host("B"), migration_id(underway), "prepared")
            lab.kill_agent("B")
            told = explained(underway.finish())
        assert (told.host, told.container) == ("B", "runs on A")
        lab.start_agent("B", env=Brake.env)
        assert_undone(under)
        assert_moves(under)


def test_the_agent_dies_while_the_container_is_frozen(lab: Lab) -> None:
    brake = Brake(lab.host("A"))
    with threatened(lab, "f-frozen") as under:
        with brake.on("dump"), attempt(under, env=brake.env) as underway:
            brake.wait_reached(underway)
            lab.kill_agent("B")
            brake.release()
            told = explained(underway.finish())
        # An agent that comes back is waited for, and the dump goes on meanwhile.
        assert (told.host, told.container) == ("B", "runs on A")
        assert told.phase in ("frozen", "sending_final")
        lab.start_agent("B", env=Brake.env)
        assert_undone(under)
        assert_moves(under)


def test_the_agent_dies_in_the_restore(lab: Lab) -> None:
    brake = Brake(lab.host("B"))
    with threatened(lab, "f-in-restore") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            lab.kill_agent("B")
            told = explained(underway.finish())
            assert (told.host, told.phase, told.container) == ("B", "restoring", "runs on A")
            brake.release()
            wait_until("the copy is held", lambda: is_held(lab.host("B"), under.name))
        assert_runs_once(under)
        # The next agent can't know what the source has decided, and asks.
        lab.start_agent("B", env=Brake.env)
        wait_until("it is adopted", lambda: "session adopted" in lab.host("B").read_text(AGENT_LOG))
        assert_undone(under)
        assert_moves(under)


def test_the_agent_is_stopped_while_it_holds_a_copy(lab: Lab) -> None:
    """The copy does not die with the agent, whose children it and its runtime are."""
    target = lab.host("B")
    with threatened(lab, "f-stop") as under:
        with held_unheard(under):
            runtimes = target.run(["pgrep", "-x", "runc"]).stdout
            stop_agent(target)
        assert_gave_back(under)
        assert is_held(target, under.name)
        assert target.run(["pgrep", "-x", "runc"]).stdout == runtimes
        lab.start_agent("B", env=Brake.env)
        assert_undone(under)
        assert_moves(under)


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "stopped"])
def test_the_agent_ends_while_memory_is_filled_in(lab: Lab, is_killed: bool) -> None:
    """The container runs on B by then, and gets the rest of its memory all the same."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, f"f-fill-{is_killed:d}", memory_mib=256) as under:
        with attempt(under) as underway:
            with brake.on("restore"):
                brake.wait_reached(underway)
                session = migration_id(underway)
                # No commit, and so no fill, before its worker is suspended: then the fill lasts.
                underway.interrupt(signal.SIGSTOP)
                brake.release()
                wait_session(target, session, "held")
            worker = processes.find(target, Victim.PAGER_WORKER, session)
            assert worker is not None
            processes.send(worker, signal.SIGSTOP)
            underway.go_on()
            wait_until("it has moved", lambda: underway.events("moved"))
            if is_killed:
                lab.kill_agent("B")
            else:
                stop_agent(target)
            done = underway.finish()
        assert done.code == 0, done
        assert done.report is not None
        assert "was not heard of" in done.report["warnings"][-1]
        processes.send(worker, signal.SIGCONT)
        under.guest.wait_answers()
        under.guest.verify()
        wait_until("the pager ends", lambda: not pagers(target))
        lab.start_agent("B", env=Brake.env)
        assert running_on(lab, under.name) == ["B"]
        wait_clean(lab.host("A"))
        wait_clean(target, under.name)


def stop_agent(host: Host) -> None:
    """SIGTERM; returns when it has ended."""
    pid = host.read_text(agents.PID_FILE).strip()
    host.run(["kill", "-TERM", pid])
    wait_until("the agent has ended", lambda: not host.path(f"/proc/{pid}").exists())


def pagers(host: Host) -> str:
    """The pids of the pagers' processes."""
    return host.run(["pgrep", "-f", "criu_glue.pager"], check=False).stdout


# ---- CRIU fails ----


@pytest.mark.parametrize("fault", ["1", "5"], ids=["dump-early", "parasite-connect"])
def test_the_dump_fails(lab: Lab, fault: str) -> None:
    """By CRIU's own fault injection (criu/include/fault-injection.h)."""
    with threatened(lab, f"f-dump-{fault}") as under:
        failed = migrate(lab.host("A"), under.name, "B", "--json", env={"CRIU_FAULT": fault})
        told = explained(failed)
        assert (told.host, told.phase, told.container) == ("A", "dump", "runs on A")
        assert_undone(under)
        assert_moves(under)


def test_the_restore_fails(lab: Lab) -> None:
    with threatened(lab, "f-restore") as under:
        assert_survives_a_failed_restore(under)


@pytest.mark.parametrize(
    ("accident", "word"),
    [
        (SPOIL_IMAGE, "magic"),
        (LOSE_IMAGE, "image"),
        (GROW_PROGRAM, "bin/memory"),
        (LOSE_PROGRAM, "bin/memory"),
    ],
    ids=["image-spoilt", "image-lost", "program-grown", "program-lost"],
)
def test_files_of_the_restore_are_not_what_they_were(lab: Lab, accident: str, word: str) -> None:
    """After everything has arrived, before CRIU looks at it."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, f"f-{len(accident)}") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            session = f"/run/migrate/sessions/{migration_id(underway)}.target"
            bundle = f"/var/lib/migrate/containers/{under.name}"
            target.run(["sh", "-c", accident, "accident", session, bundle])
            brake.release()
            told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert word in told.error, told
        assert_undone(under)
        assert_moves(under)


def test_criu_is_killed_in_the_restore(lab: Lab) -> None:
    """Its runtime waits on, since tasks that are restored in half have its connection."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, "f-killed") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            session = migration_id(underway)
            directory = f"/run/migrate/sessions/{session}.target"
            target.run(["sh", "-c", STALL_IMAGE, "stall", directory])
            brake.release()
            wait_until("a task waits for its image", lambda: is_stalled(target, under.name))
            criu = processes.find(target, Victim.TARGET_CRIU, session)
            assert criu is not None
            processes.send(criu, signal.SIGKILL)
            # Seen, and not just the end of RESTORE_DEADLINE_S, which this wait does not reach.
            wait_session(target, session, "aborting")
            told = explained(underway.finish())
        assert told.error.endswith("CRIU ended without a word, and its runtime waits for it")
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert told.remedy
        assert_undone(under)
        assert_moves(under)


def is_stalled(host: Host, name: str) -> bool:
    """Whether a process in the container's cgroup waits for the other end of a FIFO."""
    waiting = []
    for task in host.read_text(f"/sys/fs/cgroup/dolly/{name}/cgroup.procs").split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            waiting.append(Path(f"/proc/{task}/wchan").read_text())
    return "wait_for_partner" in waiting  # fs/pipe.c


# ---- the user stops it ----


def test_ctrl_c_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "f-int-copy") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            underway.interrupt()
            told = explained(underway.finish())
        assert told.error == "the migration was cancelled"
        assert (told.host, told.phase, told.container) == ("A", "precopy", "runs on A")
        assert_undone(under)
        assert_moves(under)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_container_is_frozen(lab: Lab, number: signal.Signals) -> None:
    brake = Brake(lab.host("A"))
    with threatened(lab, f"f-{number.name.lower()}") as under:
        with brake.on("dump"), attempt(under, env=brake.env) as underway:
            brake.wait_reached(underway)
            underway.interrupt(number)
            brake.release()
            told = explained(underway.finish())
        assert told.error == "the migration was cancelled"
        assert (told.host, told.phase, told.container) == ("A", "frozen", "runs on A")
        assert_undone(under)
        assert_moves(under)


def test_a_signal_in_the_restore(lab: Lab) -> None:
    brake = Brake(lab.host("B"))
    with threatened(lab, "f-int-restore") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            underway.interrupt()
            brake.release()
            told = explained(underway.finish())
        assert told.error == "the migration was cancelled"
        assert (told.host, told.phase, told.container) == ("A", "restoring", "runs on A")
        assert_undone(under)
        assert_moves(under)
