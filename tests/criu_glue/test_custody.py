"""A process that is altered like CRIU does it, by one that is killed then, and is mended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from criu_glue import custody, deathwatch, trap_shield
from criu_glue import ptrace_requests as request
from criu_glue.core.sigaction import ACTION
from criu_glue.errors import TaskBusyError, TaskGoneError
from criu_glue.mappings import Task
from criu_glue.mending import Mended, mend, permission_changes
from migrate import cgroup as freezer
from tests.criu_glue.puppets import state, status, traced_by_another, until
from tests.freezer import cgroup_of_its_own

DEADLINE_S = 20.0
SIGTRAP_BIT = 1 << (signal.SIGTRAP - 1)


class Victim:
    """A program of tests/criu_glue/programs in a cgroup of its own."""

    def __init__(self, programs: Path, cgroup: Path, kind: str) -> None:
        self.cgroup = cgroup
        self.process = subprocess.Popen(
            [programs / "steady", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        (cgroup / "cgroup.procs").write_text(str(self.pid))
        until(lambda: int(proc_stat(self.pid)[11]) > 0)

    def freeze(self) -> None:
        freezer.freeze(self.cgroup, DEADLINE_S)

    def thawed(self):  # type: ignore[no-untyped-def]
        return freezer.thawed(self.cgroup)

    def record(self, into: Path) -> list[custody.TaskRecord]:
        custody.record([self.pid], into, self.thawed)
        return custody.read(into)

    def mend(self, records: list[custody.TaskRecord]) -> Mended:
        return mend(records, self.thawed)

    def end(self) -> int:
        """Its exit code: 0 if everything was as it should be until its end."""
        freezer.thaw(self.cgroup)
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")
        self.process.stdin.close()
        return self.process.wait(DEADLINE_S)


def proc_stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def looks(pid: int) -> tuple[object, ...]:
    """What the vandal alters, as /proc shows it."""
    task = Task(pid)
    seen = (
        custody.mappings(task),
        custody.descriptors(task),
        custody.umask(task),
        [status(pid)[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
    )
    task.close()
    return seen


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with cgroup_of_its_own() as path:
        yield path


@pytest.fixture(params=["registers", "rseq", "signals"])
def victim(request: pytest.FixtureRequest, programs: Path, cgroup: Path) -> Iterator[Victim]:
    victim = Victim(programs, cgroup, request.param)
    yield victim
    victim.process.kill()
    freezer.thaw(cgroup)
    victim.process.wait()
    for pipe in (victim.process.stdin, victim.process.stdout):
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize("how", ["stop", "trap"])
def test_what_a_killed_tracer_left_is_put_back(victim: Victim, tmp_path: Path, how: str) -> None:
    before = looks(victim.pid)
    victim.freeze()
    records = victim.record(tmp_path / "record")
    command = [sys.executable, "-m", "tests.criu_glue.vandal", str(victim.pid), how]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as vandal,
        contextlib.ExitStack() as ending,
    ):
        # Whatever fails: it waits for its end.
        ending.callback(vandal.kill)
        assert vandal.stdin is not None
        assert vandal.stdout is not None
        assert vandal.stdout.readline() == "held\n"
        watch = deathwatch.watch(vandal.pid, lambda: freezer.refreeze(victim.cgroup))
        freezer.thaw(victim.cgroup)
        vandal.stdin.write("go\n")
        assert vandal.stdout.readline() == "done\n"
        if how == "trap":
            # It has come to its trap, and its tracer has not asked.
            until(lambda: state(victim.pid) == "t")
        vandal.kill()
        # First: wait4(2) in any thread of this process would take the tracer's stops from it. And
        # how it ended may have been told to the tracer, whose child CRIU is nowhere else.
        watch.join(DEADLINE_S)
        assert not watch.is_alive()
        vandal.wait(DEADLINE_S)
    assert looks(victim.pid) != before
    mended = victim.mend(records)
    assert (mended.threads, mended.code, mended.failed) == (1, 1, [])
    assert looks(victim.pid) == before
    assert freezer.is_frozen(victim.cgroup)
    # Twice is as good as once.
    again = victim.mend(records)
    assert (again.threads, again.code, again.calls, again.failed) == (0, 0, [], [])
    assert victim.end() == 0


def test_a_record_alone_changes_nothing_that_lasts(victim: Victim, tmp_path: Path) -> None:
    before = looks(victim.pid)
    caught = int(status(victim.pid)["SigCgt"], 16) & SIGTRAP_BIT
    victim.freeze()
    (record,) = records = victim.record(tmp_path / "record")
    assert int(status(victim.pid)["SigCgt"], 16) & SIGTRAP_BIT, "it is not shielded"
    if caught:
        assert not record.trap_action
    else:
        assert ACTION.unpack(record.trap_action) == (0, 0, 0, 0)
    mended = victim.mend(records)
    assert (mended.code, mended.calls, mended.failed) == (0, [], [])
    assert looks(victim.pid) == before
    assert victim.end() == 0


@pytest.mark.parametrize("victim", ["registers"], indirect=True)
def test_somebody_elses_tracee_is_busy(victim: Victim, tmp_path: Path) -> None:
    with traced_by_another(victim.pid), pytest.raises(TaskBusyError):
        victim.record(tmp_path / "record")
    assert not (tmp_path / "record").exists()
    assert victim.end() == 0


@pytest.mark.parametrize("victim", ["registers"], indirect=True)
def test_another_process_of_the_same_number_is_left_alone(victim: Victim, tmp_path: Path) -> None:
    victim.freeze()
    (record,) = victim.record(tmp_path / "record")
    shielded = looks(victim.pid)
    older = msgspec.structs.replace(record, started=record.started - 1)
    assert victim.mend([older]) == Mended()
    assert looks(victim.pid) == shielded


def test_an_init_needs_no_shield_and_a_handler_is_one() -> None:
    own = Task(os.getpid())
    previous = signal.signal(signal.SIGTRAP, lambda *_: None)
    try:
        assert not trap_shield.is_needed(own)
        signal.signal(signal.SIGTRAP, signal.SIG_DFL)
        assert trap_shield.is_needed(own)
    finally:
        signal.signal(signal.SIGTRAP, previous)
        own.close()
    command = ["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"]
    with subprocess.Popen(command) as outer:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        until(lambda: children.read_text().split())
        init = Task(int(children.read_text().split()[0]))
        assert not trap_shield.is_needed(init)
        init.close()
        outer.kill()


def test_which_mappings_differ() -> None:
    before = ((0, 10, "r--"), (10, 20, "rw-"), (30, 40, "---"), (50, 60, "r-x"))
    assert permission_changes(before, before) == []
    # Joined, split, and told apart for another reason.
    assert permission_changes(((0, 10, "r--"), (10, 20, "r--")), ((0, 20, "r--"),)) == []
    now = ((0, 5, "r--"), (5, 20, "rw-"), (22, 25, "r-x"), (25, 40, "r--"), (52, 60, "r-x"))
    assert permission_changes(before, now) == [
        (5, 10, "r--", "rw-"),
        (22, 25, None, "r-x"),
        (25, 30, None, "r--"),
        (30, 40, "---", "r--"),
        (50, 52, "r-x", None),
    ]


# ---- the watch ----

TELLS = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""


PF_SIGNALED = 0x400  # include/linux/sched.h: killed by a signal


def flags(pid: int) -> int:
    """The kernel's flags of a process (proc_pid_stat(5), the ninth field)."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[6])


@dataclass
class Watched:
    """A process that is watched, and how often its end was told."""

    process: subprocess.Popen[str]
    thread: threading.Thread
    ends: list[str]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait(self) -> int:
        """Its exit code. wait4(2) of its parent would take its stops from its tracer, which is of
        the same process here: the watch ends first."""
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def watched() -> Iterator[Watched]:
    ends: list[str] = []
    with subprocess.Popen([sys.executable, "-c", TELLS], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        thread = deathwatch.watch(one.pid, lambda: ends.append(state(one.pid)))
        watched = Watched(one, thread, ends)
        yield watched
        one.kill()
        watched.wait()


def test_a_watched_process_gets_its_signals(watched: Watched) -> None:
    process = watched.process
    for _ in range(50):
        process.send_signal(signal.SIGUSR1)
        assert watched.line() == "heard\n"
    process.send_signal(signal.SIGSTOP)
    until(lambda: state(process.pid) in "tT")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    assert watched.line() == "heard\n"
    assert watched.ends == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_its_end_is_told_before_it_comes_and_its_parent_hears_of_it(
    watched: Watched, number: signal.Signals
) -> None:
    watched.process.send_signal(number)
    assert watched.wait() == -number
    # In a stop, and no zombie.
    assert watched.ends == ["t"]


def test_one_killed_while_it_is_stopped(watched: Watched) -> None:
    watched.process.send_signal(signal.SIGSTOP)
    until(lambda: state(watched.process.pid) in "tT")
    watched.process.kill()
    assert watched.wait() == -signal.SIGKILL
    assert watched.ends == ["t"]


def killed(pid: int) -> None:
    """In a stop: it has come to its last one when this returns."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: state(pid) == "t" and bool(flags(pid) & PF_SIGNALED))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGUSR1])
def test_one_killed_before_its_stop_is_answered(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    wait_stop = request.wait_stop

    def late(pid: int) -> int | None:
        status = wait_stop(pid)
        if status is not None and status >> 8 != request.EVENT_EXIT:
            killed(pid)
        return status

    monkeypatch.setattr(request, "wait_stop", late)
    # The watch waits by the real one already.
    watched.process.send_signal(signal.SIGUSR1)
    assert watched.line() == "heard\n"
    watched.process.send_signal(number)
    assert watched.wait() == -signal.SIGKILL
    assert watched.ends == ["t"]


def test_one_killed_while_its_stop_is_answered(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptrace = request.ptrace

    def late(what: int, pid: int, *arguments: int) -> int:
        if what == request.LISTEN:
            killed(pid)
        return ptrace(what, pid, *arguments)

    monkeypatch.setattr(request, "ptrace", late)
    watched.process.send_signal(signal.SIGSTOP)
    assert watched.wait() == -signal.SIGKILL
    assert watched.ends == ["t"]


def test_only_one_can_watch(watched: Watched) -> None:
    with pytest.raises(TaskBusyError):
        deathwatch.watch(watched.process.pid, lambda: watched.ends.append("no"))
    assert state(watched.process.pid) != "Z"


def test_one_that_is_gone() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(TaskGoneError):
        deathwatch.watch(gone.pid, lambda: None)
