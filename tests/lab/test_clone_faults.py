"""Whatever happens while a copy is made: its original and the client of that notice nothing, and of
the copy nothing remains, or it runs whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from bench.containers import ContainerSpec, pid
from bench.lab import agents
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.faults import processes
from tests.faults.points import Victim
from tests.lab.brake import Brake
from tests.lab.cloning import COPY, IP, addresses, cloning, failed
from tests.lab.invariants import (
    FAST,
    SLOW,
    assert_undone,
    failure_lab,
    is_held,
    migration_id,
    threatened,
    wait_round,
    wait_session,
)
from tests.lab.migrating import (
    expel,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.waiting import wait_until

IP6 = "fd77::154"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


def start_agent(lab: Lab) -> None:
    """The target's, if it was killed."""
    if not agents.listens(lab.host("B")):
        lab.start_agent("B", env=Brake.env)


# ---- nothing of it remains ----


def fill_up(host: Host) -> None:
    """The target has no room left for memory."""
    (session,) = host.path("/run/migrate/sessions").glob("*.target")
    host.run(["mount", "-o", "remount,size=1m", f"/run/migrate/sessions/{session.name}"])


def test_it_is_given_up(lab: Lab) -> None:
    """While memory is copied the target's agent dies, or its room ends."""
    with threatened(lab, "c-gone") as under:
        for is_killed in (True, False):
            with cloning(lab, under.name) as underway:
                lab.set_rate("A", SLOW)
                wait_round(underway)
                if is_killed:
                    lab.kill_agent("B")
                else:
                    fill_up(lab.host("B"))
                told = failed(underway)
            assert (told.host, told.phase, told.container) == ("B", "precopy", "runs on A")
            assert told.remedy
            lab.set_rate("A", FAST)
            start_agent(lab)
            assert_undone(under)


def test_the_agent_dies_before_it_has_let_the_copy_run(lab: Lab) -> None:
    """It has told that it holds the copy, and does not hear that this may run."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, "c-held") as under, cloning(lab, under.name) as underway:
        with brake.on("restore"):
            brake.wait_reached(underway)
            underway.interrupt(signal.SIGSTOP)
            brake.release()
            wait_session(target, migration_id(underway), "held")
            assert is_held(target, COPY)
        lab.kill_agent("B")
        underway.go_on()
        told = failed(underway)
        assert told.error.startswith(f"it is not known whether {COPY} runs on B: ")
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert "migrate status" in told.remedy
        # The next agent learns that nobody waits for the copy any more.
        start_agent(lab)
        assert_undone(under)


def test_the_original_ends_meanwhile(lab: Lab) -> None:
    spec = ContainerSpec("c-ends", "memory", address="10.77.0.155/24", address6=None)
    source = lab.host("A")
    with resident(lab, spec, probe=False), cloning(lab, spec.name) as underway:
        lab.set_rate("A", SLOW)
        wait_round(underway)
        source.run(["kill", "-KILL", str(pid(source, spec.name))])
        lab.set_rate("A", FAST)
        told = failed(underway)
        assert told.error.startswith(f"{spec.name} has ended while it was copied: "), told
        assert (told.host, told.container) == ("A", "does not run"), told
        assert told.remedy
        wait_clean(lab.host("B"))
        assert running_on(lab, spec.name) == []


def test_somebody_has_the_address(lab: Lab) -> None:
    """Before the session, and found out only when the copy is about to come to the network."""
    spec = ContainerSpec(
        "c-taken", "memory", memory_mib=24, address="10.77.0.156/24", address6="fd77::156/112"
    )
    lab.set_rate("A", FAST)
    with resident(lab, spec) as guest:
        both = addresses(lab.client, f"{IP}/32", f"{IP6}/128")
        with both, cloning(lab, spec.name, "--ip", IP6) as underway:
            refused = underway.finish()
            assert refused.code == 2, refused
            assert refused.stderr.count("[address-taken]") == 2, refused.stderr
        with cloning(lab, spec.name, "--ip", IP6) as underway:
            lab.set_rate("A", SLOW)
            wait_round(underway)
            with addresses(lab.client, f"{IP6}/128"):
                lab.set_rate("A", FAST)
                told = failed(underway)
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert told.error.startswith(f"{IP6} is in use in the network that the copy comes to, by ")
        wait_clean(lab.host("B"))
        guest.wait_answers()
        assert guest.stop_probe().clean


# ---- it runs whole ----


def test_it_is_made_all_the_same(lab: Lab) -> None:
    """Connections break while memory is copied and in the restore, the source's agent is dead, and
    the target's dies when the copy runs and lacks memory."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, "c-whole", memory_mib=64) as under, cloning(lab, under.name) as underway:
        lab.kill_agent("A")
        lab.set_rate("A", SLOW)
        wait_round(underway)
        wait_until("it is reset", lambda: lab.reset_connections("A", "B"))
        lab.set_rate("A", FAST)
        with brake.on("restore"):
            brake.wait_reached(underway)
            wait_until("it is reset", lambda: lab.reset_connections("A", "B"))
            # No commit, and so no fill, before its worker is suspended: then the fill lasts.
            underway.interrupt(signal.SIGSTOP)
            brake.release()
            session = migration_id(underway)
            wait_session(target, session, "held")
        worker = processes.find(target, Victim.PAGER_WORKER, session)
        assert worker is not None
        processes.send(worker, signal.SIGSTOP)
        underway.go_on()
        underway.wait_phase("copied")
        lab.kill_agent("B")
        done = underway.finish()
        assert done.code == 0, done.stderr or done.stdout
        assert done.report is not None
        assert "was not heard of" in done.report["copying"]["warnings"][-1]
        processes.send(worker, signal.SIGCONT)
        for host in lab.hosts:
            lab.start_agent(host.name, env=Brake.env)
        assert running_on(lab, COPY) == ["B"]
        (answer,) = under.guest.ask("VERIFY", address=IP)
        assert answer.startswith("VERIFY ok "), answer
        assert " bad=0 " in answer
        # Its port has the name that the original's has on its host.
        wait_clean(target, COPY, under.name)
        expel(lab, COPY)
        assert_undone(under)
