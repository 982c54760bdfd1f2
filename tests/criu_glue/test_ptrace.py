"""Running system calls inside other programs without their noticing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from criu_glue import ptrace
from criu_glue.errors import InjectionError, TaskBusyError, TaskGoneError
from criu_glue.mappings import Task
from tests.criu_glue.puppets import (
    Puppet,
    Stage,
    blocked_in,
    descriptors,
    proc,
    state,
    status,
    traced_by_another,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SYS_GETPID = 39
SYS_DUP = 32
SYS_NANOSLEEP = 35


def inject(pid: int, times: int = 1, tid: int | None = None) -> None:
    """Run getpid in a process; its answer proves that the call was run."""
    task = Task(pid)
    own = task.vpid()
    for _ in range(times):
        assert ptrace.run_in_thread(task, tid or pid, lambda thread: thread.call(SYS_GETPID)) == own
    task.close()


@contextmanager
def running(programs: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [programs / command[0], *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


CALLS = {
    "nanosleep": 230,  # glibc: clock_nanosleep
    "clock_nanosleep": 230,
    "poll": 7,
    "ppoll": 271,
    "select": 270,
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "futex": 202,
    "read": 0,
    "sigwaitinfo": 128,
    "sigtimedwait": 128,
    "pause": 34,
    "sigsuspend": 130,
    "semop": 65,
    "semtimedop": 220,
}
EINTR, EAGAIN, ETIMEDOUT = 4, 11, 110


def outcome_of(child: subprocess.Popen[str]) -> tuple[int, int, int]:
    assert child.stdout is not None
    result, number, elapsed_us = map(int, child.stdout.readline().split())
    return result, number, elapsed_us


def wait_begun(child: subprocess.Popen[str], call: str) -> None:
    # SYS_restart_syscall (219) continues an interrupted sleep.
    until(lambda: blocked_in(child.pid) in (CALLS[call], 219) and state(child.pid) == "S")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("nanosleep", (0, 0)),
        ("clock_nanosleep", (0, 0)),
        ("poll", (0, 0)),
        ("ppoll", (0, 0)),
        ("select", (0, 0)),
        ("epoll_wait", (0, 0)),
        ("epoll_pwait", (0, 0)),
        ("futex", (-1, ETIMEDOUT)),
    ],
)
def test_a_wait_with_a_limit_ends_by_its_limit(
    programs: Path, call: str, expected: tuple[int, int]
) -> None:
    with running(programs, "waiter", call, "400") as child:
        for _ in range(3):
            wait_begun(child, call)
            inject(child.pid)
        result, number, elapsed_us = outcome_of(child)
    assert (result, number) == expected
    assert elapsed_us >= 400_000


@pytest.mark.parametrize("call", ["poll", "ppoll", "select", "epoll_wait", "epoll_pwait", "read"])
def test_a_wait_without_a_limit_ends_by_its_event(programs: Path, call: str) -> None:
    with running(programs, "waiter", call, "0") as child:
        for _ in range(5):
            wait_begun(child, call)
            inject(child.pid)
        wait_begun(child, call)
        assert child.stdin is not None
        child.stdin.write("x")
        child.stdin.flush()
        assert outcome_of(child)[:2] == (1, 0)


@pytest.mark.parametrize(
    "call", ["epoll_wait", "read", "futex", "semop", "semtimedop", "pause", "sigsuspend"]
)
def test_a_wait_that_a_handler_interrupts_ends_with_eintr(programs: Path, call: str) -> None:
    with running(programs, "waiter", call, "0") as child:
        for _ in range(5):
            wait_begun(child, call)
            inject(child.pid)
        wait_begun(child, call)
        os.kill(child.pid, signal.SIGUSR1)
        assert outcome_of(child)[:2] == (-1, EINTR)


def test_waiting_for_a_signal(programs: Path) -> None:
    with running(programs, "waiter", "sigwaitinfo", "0") as child:
        for _ in range(5):
            wait_begun(child, "sigwaitinfo")
            inject(child.pid)
        os.kill(child.pid, signal.SIGUSR2)
        assert outcome_of(child)[:2] == (signal.SIGUSR2, 0)


@pytest.mark.parametrize(("call", "limit_ms"), [("epoll_wait", 60_000), ("sigtimedwait", 60_000)])
def test_a_long_wait_ends_with_eintr_as_after_any_stop(
    programs: Path, call: str, limit_ms: int
) -> None:
    """signal(7): the kernel offers no way to wait on for the rest of the time."""
    with running(programs, "waiter", call, str(limit_ms)) as child:
        wait_begun(child, call)
        inject(child.pid)
        assert outcome_of(child)[:2] == (-1, EINTR)


@pytest.mark.parametrize("call", ["sigsuspend", "ppoll", "epoll_pwait"])
def test_a_temporary_signal_mask_is_still_in_force(programs: Path, call: str) -> None:
    """SIGUSR2 is blocked, except during this call: it must end it (and the program)."""
    with running(programs, "waiter", call, "0") as child:
        blocked = status(child.pid)["SigBlk"]
        for _ in range(5):
            wait_begun(child, call)
            inject(child.pid)
        wait_begun(child, call)
        assert status(child.pid)["SigBlk"] == blocked or blocked != f"{0:016x}"
        os.kill(child.pid, signal.SIGUSR2)
        assert child.wait(10) == -signal.SIGUSR2


def test_registers_are_left_alone(programs: Path) -> None:
    with running(programs, "steady", "registers") as child:
        inject(child.pid, 300)
        assert child.stdin is not None
        child.stdin.write("x")
        child.stdin.flush()
        assert child.wait(10) == 0


def test_restartable_sequences_are_aborted_or_finished_never_forgotten(programs: Path) -> None:
    with running(programs, "steady", "rseq") as child:
        inject(child.pid, 300)
        assert child.stdin is not None
        child.stdin.write("x")
        child.stdin.flush()
        assert child.wait(10) == 0
        assert child.stdout is not None
        aborted, finished = map(int, child.stdout.read().split())
    assert aborted > 100
    assert finished > 0


def signals_pending(pid: int) -> bool:
    return bool(int(status(pid)["ShdPnd"], 16) >> signal.SIGRTMIN - 1 & 1)


@pytest.mark.parametrize("where", ["in user space", "in a system call"])
def test_no_signal_and_no_timer_is_lost(programs: Path, where: str) -> None:
    with running(programs, "steady", "signals") as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if where == "in a system call":
            until(lambda: blocked_in(child.pid) == 0, 30)
        before = status(child.pid)
        sent = 0
        ended = threading.Event()

        def storm() -> None:
            nonlocal sent
            while not ended.is_set():
                os.kill(child.pid, signal.SIGRTMIN)
                sent += 1
                # The queue of real-time signals is finite (RLIMIT_SIGPENDING).
                if sent % 100 == 0:
                    until(lambda: not signals_pending(child.pid))

        stormer = threading.Thread(target=storm)
        stormer.start()
        inject(child.pid, 200)
        ended.set()
        stormer.join()
        until(lambda: not signals_pending(child.pid))
        after = status(child.pid)
        for field in ("SigBlk", "SigIgn", "SigCgt"):
            assert after[field] == before[field]
        child.stdin.write("x")
        child.stdin.flush()
        seen, ticks = map(int, child.stdout.readline().split())
        assert child.wait(30) == 0
    assert seen == sent
    assert sent > 200
    assert ticks > 0


def test_a_stopped_task_stays_stopped(puppet: Puppet) -> None:
    os.kill(puppet.pid, signal.SIGSTOP)
    until(lambda: state(puppet.pid) == "T")
    inject(puppet.pid, 5)
    until(lambda: state(puppet.pid) == "T")
    puppet.send("brk", 0)
    os.kill(puppet.pid, signal.SIGCONT)
    assert puppet.answer() > 0


def test_stop_signals_while_injecting(puppet: Puppet) -> None:
    """SIGSTOP can't be blocked: it must neither be lost nor stop the injected call for good."""
    ended = threading.Event()

    def storm() -> None:
        while not ended.is_set():
            os.kill(puppet.pid, signal.SIGSTOP)
            os.kill(puppet.pid, signal.SIGCONT)

    stormer = threading.Thread(target=storm)
    stormer.start()
    try:
        inject(puppet.pid, 50)
    finally:
        ended.set()
        stormer.join()
    os.kill(puppet.pid, signal.SIGCONT)
    assert puppet.do("brk", 0) > 0
    os.kill(puppet.pid, signal.SIGSTOP)
    until(lambda: state(puppet.pid) == "T")
    os.kill(puppet.pid, signal.SIGCONT)
    assert puppet.do("brk", 0) > 0


def test_a_stop_signal_in_the_middle_takes_effect_afterwards(puppet: Puppet) -> None:
    def work(thread: ptrace.TracedThread) -> int:
        os.kill(puppet.pid, signal.SIGSTOP)
        return thread.call(SYS_GETPID)

    task = Task(puppet.pid)
    assert ptrace.run_in_thread(task, puppet.pid, work) == puppet.pid
    until(lambda: state(puppet.pid) == "T")
    os.kill(puppet.pid, signal.SIGCONT)
    assert puppet.do("brk", 0) > 0
    task.close()


def test_several_calls_in_one_stop(puppet: Puppet) -> None:
    def work(thread: ptrace.TracedThread) -> list[int]:
        return [thread.call(SYS_DUP, 0), thread.call(SYS_DUP, 1000), thread.call(SYS_GETPID)]

    task = Task(puppet.pid)
    made, failed, own = ptrace.run_in_thread(task, puppet.pid, work)
    assert made > 2
    assert failed == -9  # EBADF
    assert own == puppet.pid
    assert str(made) in descriptors(puppet.pid)
    assert puppet.do("brk", 0) > 0
    task.close()


def test_a_failure_in_between_leaves_the_task_running(puppet: Puppet) -> None:
    def work(thread: ptrace.TracedThread) -> None:
        thread.call(SYS_GETPID)
        raise ZeroDivisionError

    task = Task(puppet.pid)
    with pytest.raises(ZeroDivisionError):
        ptrace.run_in_thread(task, puppet.pid, work)
    assert status(puppet.pid)["TracerPid"] == "0"
    assert puppet.do("brk", 0) > 0
    task.close()


def test_a_call_that_does_not_return_is_broken_off(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the task is frozen in the middle: the registers are put back all the same."""
    monkeypatch.setattr(ptrace, "CALL_DEADLINE_S", 0.1)
    puppet.do("map", 0x1000_0000_0000, 1, 3)
    puppet.do("write", 0x1000_0000_0000, 1, 1000)

    def work(thread: ptrace.TracedThread) -> int:
        return thread.call(SYS_NANOSLEEP, 0x1000_0000_0000, 0)

    task = Task(puppet.pid)
    with pytest.raises(InjectionError, match="does not stop"):
        ptrace.run_in_thread(task, puppet.pid, work)
    until(lambda: status(puppet.pid)["TracerPid"] == "0")
    assert puppet.do("brk", 0) > 0
    task.close()


def test_a_task_that_is_traced_already(puppet: Puppet) -> None:
    with (
        traced_by_another(puppet.pid),
        pytest.raises(TaskBusyError, match="is traced by python"),
    ):
        inject(puppet.pid)
    inject(puppet.pid)
    assert puppet.do("brk", 0) > 0


def test_a_task_that_has_exited(puppet: Puppet) -> None:
    task = Task(puppet.pid)
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    with pytest.raises((TaskGoneError, InjectionError)):
        ptrace.run_in_thread(task, puppet.pid, lambda thread: thread.call(SYS_GETPID))
    task.close()


def test_a_task_that_is_killed_in_the_middle(puppet: Puppet) -> None:
    def work(thread: ptrace.TracedThread) -> int:
        os.kill(puppet.pid, signal.SIGKILL)
        until(lambda: state(puppet.pid) == "Z")
        return thread.call(SYS_GETPID)

    task = Task(puppet.pid)
    with pytest.raises(TaskGoneError):
        ptrace.run_in_thread(task, puppet.pid, work)
    task.close()


def test_every_thread_serves(puppet: Puppet) -> None:
    puppet.do("map", 0x1000_0000_0000, 4, 3)
    for i in range(3):
        puppet.do("writer", 0x1000_0000_0000 + i * 4096, 1)
    task = Task(puppet.pid)
    threads = task.threads()
    assert threads[0] == puppet.pid
    assert len(threads) == 4
    for thread in threads:
        inject(puppet.pid, 20, thread)
    puppet.do("still")
    task.close()


def test_a_thread_that_can_not_be_stopped_is_let_go(puppet: Puppet) -> None:
    """In vfork a parent can't be stopped. Nothing must be left behind when the deadline is over."""
    puppet.send("vfork")
    until(lambda: state(puppet.pid) == "D")
    with pytest.raises(InjectionError, match="does not stop"):
        inject(puppet.pid)
    until(lambda: status(puppet.pid)["TracerPid"] == "0")
    os.kill(int(proc(puppet.pid, f"task/{puppet.pid}/children")), signal.SIGKILL)
    assert puppet.answer() > 0
    assert puppet.do("brk", 0) > 0


def test_the_program_is_replaced_between_searching_and_stopping(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ptrace._find_syscall_instruction
    found: list[int] = []

    def find(task: Task, tid: int) -> int:
        address = real(task, tid)
        if not found:
            puppet.exec()
        found.append(address)
        return address

    monkeypatch.setattr(ptrace, "_find_syscall_instruction", find)
    inject(puppet.pid)
    # A second search, unless address space randomisation hit the same address twice.
    assert len(found) == 2 or found[0] == real(Task(puppet.pid), puppet.pid)
    assert puppet.do("brk", 0) > 0


def test_a_program_of_32_bits_is_refused_and_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "loop.s"
    source.write_text(".globl _start\n_start: mov $20, %eax\n int $0x80\n jmp _start\n")
    program = tmp_path / "loop"
    subprocess.run(["gcc", "-m32", "-nostdlib", "-static", "-o", program, source], check=True)
    with subprocess.Popen([program]) as child:
        try:
            with pytest.raises(InjectionError, match="32-bit"):
                inject(child.pid)
            assert state(child.pid) in "RS"
            assert status(child.pid)["TracerPid"] == "0"
        finally:
            child.kill()


def test_a_task_without_executable_memory_to_run_a_call_in(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptrace, "parse_maps", lambda _: [])
    with pytest.raises(InjectionError, match="no syscall instruction"):
        inject(puppet.pid)
    assert puppet.do("brk", 0) > 0


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of version 2 of our own."""
    mounts = [line.split() for line in proc(os.getpid(), "mounts").splitlines()]
    root = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")
    group = root / f"dolly-test-{os.getpid()}"
    group.mkdir()
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_frozen_task_is_left_as_it_was(
    stage: Stage, control_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup freezer catches the thread instead of letting it run the call."""
    monkeypatch.setattr(ptrace, "CALL_DEADLINE_S", 0.1)
    puppet = stage.start()
    (control_group / "cgroup.procs").write_text(str(puppet.pid))
    (control_group / "cgroup.freeze").write_text("1")
    until(lambda: "frozen 1" in (control_group / "cgroup.events").read_text())
    with pytest.raises(InjectionError):
        inject(puppet.pid)
    until(lambda: status(puppet.pid)["TracerPid"] == "0")
    puppet.send("brk", 0)
    (control_group / "cgroup.freeze").write_text("0")
    assert puppet.answer() > 0
    inject(puppet.pid)
    os.kill(puppet.pid, signal.SIGKILL)
