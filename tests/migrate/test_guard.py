"""The guard as a process, with a real journal and real FIFOs; a shell plays CRIU's hook."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrate import guard
from migrate.guard import GuardPlan
from migrate.journal import Journal, Migration
from tests.lab.waiting import wait_until

DEADLINE_S = 20.0
# As the hook of criu_glue/hooks.py waits; its code says what it was told.
HOLD = 'until read -r verdict < "$1/verdict"; do :; done; [ "$verdict" = abort ]'


class Scene:
    """A frozen container: a journal, a cgroup's files, and a runtime that is held at its FIFO."""

    def __init__(self, base: Path) -> None:
        self.journal = base / "journal.sqlite"
        self.hold = base / "hold"
        self.cgroup = base / "cgroup"
        self.hold.mkdir()
        self.cgroup.mkdir()
        for fifo in ("gate", "verdict"):
            os.mkfifo(self.hold / fifo)
        (self.cgroup / "cgroup.freeze").write_text("1")
        with Journal.open(self.journal) as journal:
            journal.begin(Migration("m-1", "source", 1, "web", "runc", "b", time.time()))
        self.runtime = subprocess.Popen(["sh", "-c", HOLD, "hold", str(self.hold)])
        self.processes: list[subprocess.Popen[bytes]] = [self.runtime]

    def enter(self, *states: str) -> None:
        with Journal.open(self.journal) as journal:
            for state in states:
                journal.append("m-1", "source", state, "test", at_wall_s=time.time())

    @property
    def plan(self) -> GuardPlan:
        return GuardPlan(
            migration_id="m-1",
            journal=str(self.journal),
            hold_directory=str(self.hold),
            runtime_pid=self.runtime.pid,
            cgroup=str(self.cgroup),
            ports=(("no-such-port", "no-such-bridge"),),
            run=str(self.hold.parent),
        )

    def start(self, **streams: Any) -> subprocess.Popen[bytes]:
        given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **streams}
        process = subprocess.Popen([sys.executable, "-m", "migrate.guard"], bufsize=0, **given)
        self.processes.append(process)
        return process

    def arm(self) -> subprocess.Popen[bytes]:
        """A guard that watches."""
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(self.plan) + b"\n")
        assert process.stdout.readline() == b"armed\n"
        return process

    @property
    def is_frozen(self) -> bool:
        return (self.cgroup / "cgroup.freeze").read_text() == "1"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    for process in scene.processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def end_of_coordinator(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def test_disarmed_it_touches_nothing(scene: Scene) -> None:
    scene.enter("precopy", "frozen")
    process = scene.arm()
    assert process.stdin is not None
    process.stdin.write(b"disarm\n")
    assert process.wait(DEADLINE_S) == 0
    assert scene.is_frozen
    assert scene.runtime.poll() is None


@pytest.mark.parametrize(
    "states",
    [(), ("precopy",), ("precopy", "frozen"), ("precopy", "frozen", "rolling_back")],
)
def test_an_uncommitted_container_is_given_back(scene: Scene, states: tuple[str, ...]) -> None:
    scene.enter(*states)
    process = scene.arm()
    assert process.poll() is None
    end_of_coordinator(process)
    # CRIU is told to abort, and only then is the container thawed.
    assert scene.runtime.wait(DEADLINE_S) == 0
    assert process.wait(DEADLINE_S) == 0
    assert not scene.is_frozen


@pytest.mark.parametrize("last", ["committed", "releasing"])
def test_a_committed_container_is_held(scene: Scene, last: str) -> None:
    scene.enter("precopy", "frozen", "committed")
    if last == "releasing":
        scene.enter("releasing")
    process = scene.arm()
    end_of_coordinator(process)
    assert process.wait(DEADLINE_S) == 0
    assert scene.is_frozen
    assert scene.runtime.poll() is None


def test_a_coordinator_that_died_before_it_said_anything(scene: Scene) -> None:
    process = scene.start()
    end_of_coordinator(process)
    assert process.wait(DEADLINE_S) == 0
    assert scene.is_frozen


def test_a_coordinator_that_died_before_it_was_answered(scene: Scene) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    process = scene.start(stdout=write_fd)
    os.close(write_fd)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(scene.plan) + b"\n")
    end_of_coordinator(process)
    assert process.wait(DEADLINE_S) == 0
    assert scene.runtime.wait(DEADLINE_S) == 0
    assert not scene.is_frozen


def test_it_waits_for_a_journal_that_can_not_be_read(scene: Scene) -> None:
    """Nobody may thaw what may be the target's."""
    scene.enter("precopy", "frozen")
    process = scene.arm()
    hidden = scene.journal.with_name("hidden")
    scene.journal.rename(hidden)
    end_of_coordinator(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * guard.JOURNAL_PAUSE_S)
    assert scene.is_frozen
    assert scene.runtime.poll() is None
    hidden.rename(scene.journal)
    assert process.wait(DEADLINE_S) == 0
    assert not scene.is_frozen


def test_a_runtime_that_nobody_waited_for_is_dead(scene: Scene) -> None:
    """A zombie, as the coordinator's death makes one where nothing inherits it."""
    scene.enter("precopy")
    scene.runtime.kill()
    os.waitid(os.P_PID, scene.runtime.pid, os.WEXITED | os.WNOWAIT)
    guard.give_back(scene.plan)
    assert not scene.is_frozen


def test_a_hold_without_its_runtime_is_ended(scene: Scene) -> None:
    """CRIU is held still, while the runtime that started it was killed."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    plan = msgspec.structs.replace(scene.plan, runtime_pid=gone.pid)

    def turn() -> bool:
        # The shell may not have come to its FIFO yet.
        guard.give_back(plan)
        return scene.runtime.poll() is not None

    wait_until("the hold ends", turn)
    assert scene.runtime.returncode == 0
    assert not scene.is_frozen


def test_tasks_are_not_kept_for_a_criu_that_has_ended(scene: Scene) -> None:
    """It says so, and goes on watching its coordinator."""
    process = scene.arm()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"keep\n")
    assert process.stdout.readline() == b"CRIU has ended\n"
    process.stdin.write(b"disarm\n")
    assert process.wait(DEADLINE_S) == 0


def test_a_container_that_is_gone_is_no_failure(scene: Scene) -> None:
    scene.runtime.kill()
    scene.runtime.wait()
    (scene.cgroup / "cgroup.freeze").unlink()
    scene.cgroup.rmdir()
    guard.give_back(scene.plan)
