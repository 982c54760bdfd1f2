"""The holder as a process, with a real journal and real FIFOs; a shell plays CRIU's hook."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import holder
from migrate.claim import Claim
from migrate.config import HostPaths
from migrate.journal import Journal, Migration, Role
from tests.lab.waiting import wait_until

DEADLINE_S = 30.0
# As the hook of criu_glue/hooks.py waits.
HOOK = 'read -r verdict <> "$1/verdict"; echo "$verdict"'

COPIED = ("precopy", "frozen")
GIVEN = (*COPIED, "committed")
RECEIVED = ("receiving", "prepared")
TAKEN = (*RECEIVED, "committed")
DECISIONS: list[tuple[Role, tuple[str, ...], str | None]] = [
    ("source", (), "abort"),
    ("source", ("precopy",), "abort"),
    ("source", COPIED, "abort"),
    ("source", (*COPIED, "rolling_back"), "abort"),
    ("source", (*COPIED, "rolling_back", "aborted"), "abort"),
    ("source", GIVEN, None),
    ("source", (*GIVEN, "rolling_back"), "abort"),
    ("source", (*GIVEN, "releasing"), "commit"),
    ("source", (*GIVEN, "releasing", "done"), "commit"),
    ("target", (), None),
    ("target", ("receiving",), None),
    ("target", RECEIVED, None),
    ("target", (*RECEIVED, "aborted"), "abort"),
    ("target", TAKEN, "commit"),
    ("target", (*TAKEN, "running"), "commit"),
    ("target", (*TAKEN, "running", "done"), "commit"),
    ("target", (*TAKEN, "aborted"), "abort"),
]


class Scene:
    """One CRIU that is held, on one side of a migration."""

    def __init__(self, base: Path) -> None:
        self.paths = HostPaths(run=base / "run", state=base / "state")
        self.hold = base / "hold"
        self.hold.mkdir()
        os.mkfifo(self.hold / "verdict")
        self._processes: list[subprocess.Popen[str]] = []

    def enter(self, role: Role, *states: str) -> None:
        with Journal.open(self.paths.journal) as journal:
            journal.begin(Migration("m-1", role, 1, "web", "runc", "b", time.time()))
        self.append(role, *states)

    def append(self, role: Role, *states: str) -> None:
        with Journal.open(self.paths.journal) as journal:
            for state in states:
                journal.append("m-1", role, state, "test", at_wall_s=time.time())

    def decision(self, role: Role) -> str | None:
        return holder.decision(self.paths.journal, self.paths.claim("m-1", role), "m-1", role)

    def held(self) -> subprocess.Popen[str]:
        """A hook that waits; its output is the word that it got."""
        return self._start("sh", "-c", HOOK, "hook", str(self.hold))

    def start(self, role: Role) -> subprocess.Popen[str]:
        claim = str(self.paths.claim("m-1", role))
        arguments = (str(self.paths.journal), claim, "m-1", role, str(self.hold))
        return self._start(sys.executable, "-m", "migrate.holder", *arguments)

    def _start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@pytest.mark.parametrize(("role", "states", "word"), DECISIONS)
def test_what_the_journal_decides(
    scene: Scene, role: Role, states: tuple[str, ...], word: str | None
) -> None:
    scene.enter(role, *states)
    assert scene.decision(role) == word


@pytest.mark.parametrize(("role", "states", "word"), [one for one in DECISIONS if one[2]])
def test_it_decides_nothing_while_somebody_is_in_charge(
    scene: Scene, role: Role, states: tuple[str, ...], word: str
) -> None:
    scene.enter(role, *states)
    with Claim.take(scene.paths.claim("m-1", role), "agent"):
        assert scene.decision(role) is None
    assert scene.decision(role) == word


def test_the_other_side_of_the_same_migration_is_another_matter(scene: Scene) -> None:
    """On one machine a migration may be known as both."""
    scene.enter("source", *GIVEN)
    scene.enter("target", *TAKEN)
    with Claim.take(scene.paths.claim("m-1", "source"), "agent"):
        assert scene.decision("target") == "commit"
    assert scene.decision("source") is None


def test_without_a_journal_nothing_is_decided(scene: Scene) -> None:
    assert scene.decision("source") is None


def test_a_damaged_journal_decides_nothing(scene: Scene) -> None:
    scene.enter("source", *COPIED)
    scene.paths.journal.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    assert scene.decision("source") is None


@pytest.mark.parametrize(
    ("role", "states", "word"),
    [("source", COPIED, "abort"), ("source", (*GIVEN, "releasing"), "commit")],
)
def test_the_hook_is_told(scene: Scene, role: Role, states: tuple[str, ...], word: str) -> None:
    scene.enter(role, *states)
    hook, process = scene.held(), scene.start(role)
    assert process.wait(DEADLINE_S) == 0
    assert hook.communicate(timeout=DEADLINE_S)[0] == f"{word}\n"


def test_it_waits_until_the_journal_says_more(scene: Scene) -> None:
    scene.enter("source", *GIVEN)
    hook, process = scene.held(), scene.start("source")
    wait_until("it has looked", lambda: has_looked(process), deadline_s=DEADLINE_S)
    assert hook.poll() is None
    assert process.poll() is None
    scene.append("source", "releasing")
    assert process.wait(DEADLINE_S) == 0
    assert hook.communicate(timeout=DEADLINE_S)[0] == "commit\n"


def test_it_waits_until_nobody_is_in_charge(scene: Scene) -> None:
    scene.enter("source", *COPIED)
    claim = Claim.take(scene.paths.claim("m-1", "source"), "coordinator")
    hook, process = scene.held(), scene.start("source")
    wait_until("it has looked", lambda: has_looked(process), deadline_s=DEADLINE_S)
    assert hook.poll() is None
    claim.release()
    assert process.wait(DEADLINE_S) == 0
    assert hook.communicate(timeout=DEADLINE_S)[0] == "abort\n"


def test_it_ends_when_nobody_waits_any_more(scene: Scene) -> None:
    scene.enter("source", *GIVEN)
    hook, process = scene.held(), scene.start("source")
    wait_until("it has looked", lambda: has_looked(process), deadline_s=DEADLINE_S)
    hook.kill()
    hook.wait()
    assert process.wait(DEADLINE_S) == 1


def has_looked(process: subprocess.Popen[str]) -> bool:
    """Whether it sleeps between two looks: in the only call of its that has the kernel wait so."""
    return "nanosleep" in Path(f"/proc/{process.pid}/wchan").read_text()
