"""Real CRIU: a process tree is dumped without its memory, the memory goes through the page store,
and the same images restore eagerly and lazily, proved by the processes themselves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from tests.lab.compiling import compiled
from tests.lab.waiting import wait_until

PROGRAM = "forked_memory"
MIB = 48
PAGES = MIB * 256
WORK = "/run/bare-restore"
REPORT = "/run/forked-memory"
INSIDE = ["python3", "-m", "tests.lab.bare_restore"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> Iterator[Path]:
    yield compiled(PROGRAM, tmp_path_factory.mktemp("programs"))
    # The hosts are others' as well, who look for what is left in /run.
    for host in lab.hosts:
        host.run(["sh", "-c", f"rm -f /run/{PROGRAM} {REPORT}.*"])


@dataclass
class Tree:
    """The parent and the child inside the host, their pids as the host knows them."""

    host: Host
    pids: list[str]

    def _reports(self) -> list[Path]:
        return [self.host.path(f"{REPORT}.{who}") for who in ("parent", "child")]

    def start(self) -> None:
        self._forget()
        script = f"exec setsid /run/{PROGRAM} {MIB} {REPORT} </dev/null >/dev/null 2>&1 &"
        self.host.run(["sh", "-c", script])
        assert self._answers() == ["ok", "ok"]
        self.pids = self.host.run(["pgrep", "-x", PROGRAM]).stdout.split()
        assert len(self.pids) == 2
        if self._has_page_aligned_stack():
            # CRIU takes every page of such a task for its stack (criu/mem.c: is_stack) and leaves
            # nothing out of its images. The next one has its stack elsewhere.
            self.kill()
            self.start()

    def _has_page_aligned_stack(self) -> bool:
        """Whether a thread of the tree, which all wait, has its stack pointer at a page's begin."""
        script = "cat $(printf '/proc/%s/task/*/syscall ' \"$@\")"
        lines: list[str] = []

        def all_wait() -> bool:
            lines[:] = self.host.run(["sh", "-c", script, "sh", *self.pids]).stdout.splitlines()
            return "running" not in lines

        wait_until("every thread waits again", all_wait)
        # proc_pid_syscall(5): the last two are the stack pointer and the program counter.
        return any(int(line.split()[-2], 16) % 4096 == 0 for line in lines)

    def proves(self, number: signal.Signals) -> list[str]:
        """What both say after a signal: SIGUSR1 look at all memory, SIGUSR2 go on changing it."""
        self._forget()
        self.host.run(["kill", f"-{number.name[3:]}", *self.pids])
        return self._answers()

    def kill(self) -> None:
        self.host.run(["kill", "-KILL", *self.pids], check=False)
        gone = [self.host.path(f"/proc/{pid}") for pid in self.pids]
        wait_until("the tree is gone", lambda: not any(path.exists() for path in gone))

    def _forget(self) -> None:
        for path in self._reports():
            path.unlink(missing_ok=True)

    def _answers(self) -> list[str]:
        paths = self._reports()
        wait_until("both have answered", lambda: all(path.exists() for path in paths))
        return [path.read_text().strip() for path in paths]


@pytest.fixture(scope="module")
def dumped(lab: Lab, program: Path) -> Iterator[tuple[Tree, dict[str, Any]]]:
    """A tree that exists only as images and page store, and what the dump reported."""
    host = lab.host("A")
    shutil.copy(program, host.path(f"/run/{PROGRAM}"))
    tree = Tree(host, [])
    tree.start()
    found = host.run([*INSIDE, "dump", tree.pids[0], WORK], env=PYTHON_INSIDE).stdout
    yield tree, json.loads(found)
    tree.kill()
    host.run(["rm", "-r", WORK])


def test_the_dump_leaves_private_memory_out(dumped: tuple[Tree, dict[str, Any]]) -> None:
    tree, report = dumped
    assert report["tasks"] == sorted(map(int, tree.pids))
    # Of the pages of both, those that were never touched and those given up are nowhere.
    assert 1.2 * PAGES < report["lazy_pages"] < 2 * PAGES


def test_criu_reads_the_page_store_as_a_parent_image(dumped: tuple[Tree, dict[str, Any]]) -> None:
    """Eager: one entry for the whole address space, offset == address."""
    tree, _ = dumped
    tree.host.run([*INSIDE, "restore", WORK, "eager"], env=PYTHON_INSIDE)
    assert tree.proves(signal.SIGUSR1) == ["ok", "ok"]
    assert tree.proves(signal.SIGUSR2) == ["ok", "ok"]
    tree.kill()


def test_the_pager_fills_what_criu_leaves_out(dumped: tuple[Tree, dict[str, Any]]) -> None:
    """Lazy, after the eager one from the same images. The tree looks at all of its memory and
    then moves it, gives it up and forks while it is being filled."""
    tree, _ = dumped
    pages_file = tree.host.path(f"{WORK}/mem/pages-{tree.pids[0]}.img")
    assert pages_file.stat().st_blocks
    command = [*INSIDE, "restore", WORK, "lazy"]
    with tree.host.popen(command, env=PYTHON_INSIDE, stdout=subprocess.PIPE) as restore:
        assert restore.stdout
        print(restore.stdout.readline())
        assert tree.proves(signal.SIGUSR2) == ["ok", "ok"]
        done = json.loads(restore.stdout.readline())
    print(done)
    assert (done["phase"], done["error"]) == ("DONE", "")
    assert done["tasks"] == 2
    assert done["unplaced_bytes"] == 0
    assert done["faults"] > 0
    tree.kill()


def test_processes_of_the_pager_die_while_the_tree_runs(lab: Lab, program: Path) -> None:
    """Worker and keeper in turn, as soon as something more was filled, while the tree looks at its
    memory, moves it, gives it up and forks."""
    host = lab.host("A")
    shutil.copy(program, host.path(f"/run/{PROGRAM}"))
    tree = Tree(host, [])
    tree.start()
    work = f"{WORK}-killed"
    host.run([*INSIDE, "dump", tree.pids[0], work], env=PYTHON_INSIDE)
    command = [*INSIDE, "restore", work, "lazy-killed"]
    try:
        with host.popen(command, env=PYTHON_INSIDE, stdout=subprocess.PIPE) as restore:
            assert restore.stdout
            restore.stdout.readline()
            assert tree.proves(signal.SIGUSR2) == ["ok", "ok"]
            done = json.loads(restore.stdout.readline())
        print(done)
        assert (done["phase"], done["error"], done["unplaced_bytes"]) == ("DONE", "", 0)
        assert done["workers"] > 1
        assert done["keepers"] > 1
    finally:
        tree.kill()
        host.run(["rm", "-r", work])


def test_a_pager_that_is_dead_as_a_whole_says_how_much_is_lost(lab: Lab, program: Path) -> None:
    host = lab.host("A")
    shutil.copy(program, host.path(f"/run/{PROGRAM}"))
    tree = Tree(host, [])
    tree.start()
    work = f"{WORK}-lost"
    host.run([*INSIDE, "dump", tree.pids[0], work], env=PYTHON_INSIDE)
    try:
        command = [*INSIDE, "restore", work, "lazy-lost"]
        lost = json.loads(host.run(command, env=PYTHON_INSIDE).stdout.splitlines()[-1])
        print(lost)
        assert lost["phase"] != "DONE"
        assert 0 < lost["missing_bytes"] < 2 * PAGES * 4096
    finally:
        tree.kill()
        host.run(["rm", "-r", work])


def test_a_lazy_restore_that_is_looked_at_later(lab: Lab, program: Path) -> None:
    """Nobody touches anything until all is filled; then all of it is right, and only once in
    memory."""
    host = lab.host("A")
    shutil.copy(program, host.path(f"/run/{PROGRAM}"))
    tree = Tree(host, [])
    tree.start()
    work = f"{WORK}-later"
    host.run([*INSIDE, "dump", tree.pids[0], work], env=PYTHON_INSIDE)
    try:
        lines = host.run([*INSIDE, "restore", work, "lazy"], env=PYTHON_INSIDE).stdout.split("\n")
        assert json.loads(lines[1])["phase"] == "DONE"
        stored = [host.path(f"{work}/mem/pages-{pid}.img").stat().st_blocks for pid in tree.pids]
        # The page that is wiped in a fork was read by CRIU, before the processes ran.
        assert stored == [8, 8]
        assert tree.proves(signal.SIGUSR1) == ["ok", "ok"]
    finally:
        tree.kill()
        host.run(["rm", "-r", work])
