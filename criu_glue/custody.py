"""What CRIU's dump alters in tasks, written down before it begins, so that others can mend it.

CRIU runs code in the tasks that it dumps: it overwrites the begin of the first executable mapping
(`compel/src/lib/infect.c: compel_execute_syscall`), gives threads other registers and signal masks
(`parasite_run`), maps its parasite, opens a socket and a log in it, makes mappings readable for a
while (`criu/pie/parasite.c: mprotect_vmas`). It puts all of that back, also when the dump fails,
unless it dies. The tasks have executed nothing of their own from the freeze on, so that whatever
differs from this record afterwards is CRIU's: `mending.py` makes it equal again.

`record` is for tasks whose cgroup is frozen; a thread stops for it in the freezer and goes back.
x86-64 only.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from criu_glue import ptrace_requests as request
from criu_glue import trap_shield
from criu_glue.errors import CriuGlueError, InjectionError, TaskBusyError, TaskGoneError
from criu_glue.mappings import Task, parse_maps
from criu_glue.ptrace import TracedThread, outside_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

# CRIU overwrites 8 bytes for a system call and 8 behind them for a name (compel: infect-priv.h,
# BUILTIN_SYSCALL_SIZE, MEMFD_FNAME_SZ).
CODE_BYTES: Final = 64
# A frozen thread stops within microseconds; a vfork(2)'s parent when its child has executed.
STOP_DEADLINE_S: Final = 5.0
_SPIN_S: Final = 0.002
_NAP_S: Final = 0.0005
_USER_END: Final = 1 << 47


class ThreadRecord(msgspec.Struct, frozen=True, array_like=True):
    """One thread as it stood in the freezer.

    registers, extended: NT_PRSTATUS and NT_X86_XSTATE. mask: blocked signals. resume_rip: where it
    goes on if it was in a restartable sequence that the kernel has forgotten meanwhile, else its
    own rip.
    """

    tid: int
    registers: bytes
    extended: bytes
    mask: int
    resume_rip: int


class TaskRecord(msgspec.Struct, frozen=True, array_like=True):
    """One process. started: in clock ticks, as in proc_pid_stat(5); `pid` is somebody else without
    it. mappings: [start, end, permissions]. code: what was at code_address. trap_action: what it
    did on SIGTRAP before it was given a handler (`trap_shield.py`); nothing if it was not."""

    pid: int
    started: int
    umask: int
    mappings: tuple[tuple[int, int, str], ...]
    descriptors: tuple[int, ...]
    code_address: int
    code: bytes
    threads: tuple[ThreadRecord, ...]
    trap_action: bytes = b""


def record(
    pids: Iterable[int], into: Path, thawed: Callable[[], AbstractContextManager[None]]
) -> None:
    """Write down these processes, whose cgroup is frozen, and shield them against CRIU's traps.

    `thawed` lets the cgroup run, and freezes it again: every thread is held by ptrace meanwhile.
    Raises InjectionError (a thread does not stop), TaskBusyError (somebody traces it),
    CriuGlueError.
    """
    tasks: dict[int, Task] = {}
    held: list[tuple[int, int]] = []
    try:
        for pid in pids:
            with contextlib.suppress(TaskGoneError):
                task = tasks[pid] = Task(pid)
                held.extend((pid, tid) for tid in task.threads() if _seize(task, tid))
        limit_s = time.monotonic() + STOP_DEADLINE_S
        for _, tid in held:
            _wait_stopped(tid, limit_s)
        records = [
            _task_record(task, [tid for owner, tid in held if owner == pid])
            for pid, task in tasks.items()
            if any(owner == pid for owner, _ in held)
        ]
        bare = [one for one in records if trap_shield.is_needed(tasks[one.pid])]
        if bare:
            with thawed():
                actions = {one.pid: _shield(tasks[one.pid], one) for one in bare}
            records = [
                msgspec.structs.replace(one, trap_action=actions.get(one.pid, b""))
                for one in records
            ]
    finally:
        for _, tid in held:
            _detach(tid)
        for task in tasks.values():
            task.close()
    try:
        new = into.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.msgpack.encode(records))
        new.rename(into)
    except OSError as error:
        raise CriuGlueError(f"{into}: {error.strerror}") from error


def read(path: Path) -> list[TaskRecord]:
    """What `record` has written; nothing where there is no such file."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=list[TaskRecord])
    except FileNotFoundError:
        return []


def started(task: Task) -> int:
    """When a process began, in clock ticks since the boot."""
    # Behind the name in parentheses comes field 3 (proc_pid_stat(5)); this is field 22.
    return int(task.read("stat").rpartition(b")")[2].split()[19])


def umask(task: Task) -> int:
    """The file mode creation mask of a process."""
    return int(task.status("Umask"), 8)


def mappings(task: Task) -> tuple[tuple[int, int, str], ...]:
    """[start, end, permissions] of everything that a process can change of its memory."""
    return tuple(
        (one.start, one.end, one.permissions)
        for one in parse_maps(task.read("maps"))
        if one.start < _USER_END
    )


def descriptors(task: Task) -> tuple[int, ...]:
    """The numbers of the open files of a process."""
    return tuple(sorted(map(int, task.names("fd"))))


def _seize(task: Task, tid: int) -> bool:
    """Whether it is held now; a zombie can't be."""
    try:
        request.ptrace(request.SEIZE, tid)
        request.ptrace(request.INTERRUPT, tid)
    except TaskGoneError:
        return False
    except OSError as error:
        if task.thread_state(tid) in "ZX":
            return False
        raise TaskBusyError(f"thread {tid} can't be traced: {error}") from error
    return True


def _wait_stopped(tid: int, limit_s: float) -> None:
    begun_s = time.monotonic()
    while (status := request.stop_status(tid)) is None:
        now_s = time.monotonic()
        if now_s > limit_s:
            raise InjectionError(f"thread {tid} does not stop")
        if now_s - begun_s > _SPIN_S:
            time.sleep(_NAP_S)
    if status >> 8 != request.EVENT_STOP:
        raise InjectionError(f"thread {tid} was not frozen")


def _detach(tid: int) -> None:
    try:
        request.ptrace(request.DETACH, tid)
    except TaskGoneError:
        # It has exited, or was not stopped yet: the end of this thread lets go of it.
        return


def _task_record(task: Task, tids: list[int]) -> TaskRecord:
    mapped = mappings(task)
    # The first that is executable, as CRIU does (criu/parasite-syscall.c: get_exec_start).
    code_address = next((start for start, _, how in mapped if "x" in how), 0)
    memory = task.open(f"task/{tids[0]}/mem")

    def peek(address: int, size: int) -> bytes:
        try:
            return os.pread(memory, size, address)
        except OSError:
            return b""

    try:
        return TaskRecord(
            pid=task.pid,
            started=started(task),
            umask=umask(task),
            mappings=mapped,
            descriptors=descriptors(task),
            code_address=code_address,
            code=peek(code_address, CODE_BYTES),
            threads=tuple(_thread_record(tid, peek) for tid in tids),
        )
    finally:
        os.close(memory)


def _shield(task: Task, one: TaskRecord) -> bytes:
    """What the process did on SIGTRAP; nothing if it can't be given a handler."""
    thread = TracedThread(task, one.threads[0].tid)
    try:
        thread.adopt()
        thread.borrow()
        try:
            return trap_shield.raise_shield(task, thread, one.code_address)
        finally:
            # Here, while it can run.
            thread.put_back()
    except InjectionError:
        # A 32-bit program, a stack that can't be written: it goes without.
        return b""


def _thread_record(tid: int, peek: Callable[[int, int], bytes]) -> ThreadRecord:
    registers = request.register_set(tid, request.NT_PRSTATUS)
    rip = request.rip_of(registers)
    return ThreadRecord(
        tid=tid,
        registers=registers,
        extended=request.register_set(tid, request.NT_X86_XSTATE),
        mask=request.signal_mask(tid),
        resume_rip=outside_sequence(tid, rip, peek),
    )
