"""Something hangs: it is ended within its deadline, and the container runs on where it was.

Each hang is a process that is stopped (SIGSTOP) and never answers again. Deadlines are half a
minute, so the migrations of several containers hang side by side.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import pytest

from bench.containers import ContainerSpec
from bench.lab import agents
from bench.lab.host import Host
from tests.faults import processes
from tests.faults.evidence import journal_of, unfinished
from tests.faults.points import Victim, moment
from tests.faults.scene import ENVIRONMENT, Scene
from tests.lab.migrating import (
    Migration,
    Resident,
    Underway,
    begin,
    remains,
    resident,
    wait_clean,
)
from tests.lab.waiting import wait_until

REACHED_DEADLINE_S: Final = 60.0
# Of `migrate/config.py`: the longest deadline of a phase that stands still, and an undoing.
ENDED_DEADLINE_S: Final = 120.0
CLEAN_DEADLINE_S: Final = 90.0
# Both sides are prepared, and nothing stands still yet.
PREPARED: Final = "source.prepare_target.after"
FREEZING: Final = "source.freeze_and_dump.before"


@dataclass
class Case:
    """One container, what of its migration hangs, and what its user has to be told."""

    name: str
    victim: Victim | str
    phase: str
    says: str
    address: str = ""
    stopped: int = 0
    migration: str = ""
    underway: Underway | None = field(default=None, repr=False)


CASES = [
    Case("h-rsync", "rsync", "rootfs", "rsync of the root file system did not end"),
    Case("h-dump", Victim.SOURCE_CRIU, "dump", "the runtime or CRIU hangs"),
    Case("h-runc-a", Victim.SOURCE_RUNC, "dump", "the runtime or CRIU hangs"),
    Case("h-restore", Victim.TARGET_CRIU, "restore", "the runtime or CRIU hangs"),
    Case("h-runc-b", Victim.TARGET_RUNC, "restore", "the runtime or CRIU hangs"),
]
for number, one in enumerate(CASES):
    one.address = f"10.77.0.{120 + number}/24"


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


def guest_of(stack: contextlib.ExitStack, scene: Scene, name: str, address: str) -> Resident:
    spec = ContainerSpec(name, "memory", args=("8",), address=address, address6=None)
    return stack.enter_context(resident(scene.lab, spec, rate_per_s=100.0))


def begin_until_freezing(scene: Scene, name: str) -> tuple[Underway, str]:
    """A migration of this container from A to B that is about to freeze it, and its id."""
    here = scene.lab.host("A")
    for at in (PREPARED, FREEZING):
        scene.arm(moment(at))
    underway = begin(here, name, "B", "--json", env=ENVIRONMENT)
    for at in (PREPARED, FREEZING):
        scene.wait_reached(moment(at), REACHED_DEADLINE_S)
    scene.let_go(moment(PREPARED))
    found: list[str] = []

    def is_known() -> bool:
        with journal_of(here) as journal:
            found[:] = [
                one.migration_id for one, _ in journal.unfinished() if one.container == name
            ]
        return bool(found)

    wait_until("its journal knows it", is_known)
    return underway, found[0]


def rsync_of(host: Host, migration: str) -> int | None:
    """The sending rsync of a migration, which is about to start its last pass."""
    for process in processes.processes(host):
        is_rsync = process.name == "rsync"
        if is_rsync and any(migration in word for word in process.words):
            return process.pid
    return None


def find(scene: Scene, case: Case) -> int:
    """Waits for it: the two sides prepare beside each other."""
    found: list[int] = []

    def is_there() -> bool:
        for host in (scene.lab.host("A"), scene.lab.host("B")):
            if isinstance(case.victim, Victim):
                pid = processes.find(host, case.victim, case.migration)
            else:
                pid = rsync_of(host, case.migration)
            found.extend([pid] if pid else [])
        return bool(found)

    wait_until(f"there is a {case.victim}", is_there)
    return found[0]


def test_whatever_hangs_while_it_stands_still_is_ended(scene: Scene) -> None:
    here, there = scene.lab.host("A"), scene.lab.host("B")
    with contextlib.ExitStack() as stack:
        guests = [guest_of(stack, scene, case.name, case.address) for case in CASES]
        for case in CASES:
            case.underway, case.migration = begin_until_freezing(scene, case.name)
            processes.send(find(scene, case), signal.SIGSTOP)
            scene.let_go(moment(FREEZING))
        ended: list[Migration] = []
        for case in CASES:
            assert case.underway is not None
            ended.append(case.underway.finish(ENDED_DEADLINE_S))
        names = [case.name for case in CASES]
        wait_clean(here, *names, "guest")
        # The target gives a CRIU that hangs the time to undo what it did before it is killed.
        wait_until("B is clean", lambda: not remains(there), deadline_s=CLEAN_DEADLINE_S)
        wait_clean(there)
        for case, guest, command in zip(CASES, guests, ended, strict=True):
            assert command.code == 1, command
            assert "Traceback" not in command.stderr
            assert f"  phase:     {case.phase}\n" in command.stderr, (case, command.stderr)
            assert "  container: runs on A\n" in command.stderr, (case, command.stderr)
            assert case.says in command.stderr, (case, command.stderr)
            guest.wait_answers()
            guest.verify()
            assert guest.stop_probe().clean
        assert unfinished(here) == []
        assert unfinished(there) == []


@pytest.mark.parametrize("is_committed", [False, True], ids=["frozen", "committed"])
def test_the_agent_of_the_target_hangs(scene: Scene, is_committed: bool) -> None:
    """Before the commit the source does not wait for it for long. After it nobody but the target
    can say where the container is, and does so when it is back."""
    here, there = scene.lab.host("A"), scene.lab.host("B")
    at = "source.send_commit.before" if is_committed else "source.send_final.before"
    name = f"h-agent-{is_committed:d}"
    with contextlib.ExitStack() as stack:
        guest = guest_of(stack, scene, name, f"10.77.0.{130 + is_committed}/24")
        scene.arm(moment(at))
        # A target that was not told that all is undone waits as long as its source would.
        underway = begin(here, name, "B", "--json", "--link-patience", "1", env=ENVIRONMENT)
        scene.wait_reached(moment(at), REACHED_DEADLINE_S)
        agent = there.read_text(agents.PID_FILE).strip()
        there.run(["kill", "-STOP", agent])
        scene.let_go(moment(at))
        if is_committed:
            told = here.run(["migrate", "status"], env=ENVIRONMENT).stdout
            assert "is held on A" in told
            there.run(["kill", "-CONT", agent])
            assert underway.finish().done
        else:
            command = underway.finish(ENDED_DEADLINE_S)
            there.run(["kill", "-CONT", agent])
            assert command.code == 1, command
            assert "  host:      B\n" in command.stderr
            assert "  container: runs on A\n" in command.stderr
        on, other = (there, here) if is_committed else (here, there)
        wait_clean(on, name, *(["guest"] if on is here else []))
        wait_clean(other, *(["guest"] if other is here else []))
        guest.wait_answers()
        guest.verify()
        assert guest.stop_probe().clean
    for host in (here, there):
        assert unfinished(host) == []
