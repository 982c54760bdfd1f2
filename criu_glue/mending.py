"""Makes tasks equal to what `custody.py` has written down of them, when CRIU died in its dump.

For tasks in a frozen cgroup that have executed nothing of their own since the record:

    hold every thread        SEIZE, INTERRUPT: they stop in the freezer
    code, registers, masks   put back where they differ
    mappings, descriptors,   by system calls in a thread of the process, which runs for them alone:
    umask, SIGTRAP's action  the cgroup is thawed meanwhile, and all the others are held by ptrace
    let go                   back into the freezer

A parasite that runs as a daemon needs no other treatment: its thread was about to receive, and goes
on with the thread's own registers. Knows neither CRIU's addresses nor its state: what differs from
the record is put back, what does not is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from criu_glue import custody, trap_shield
from criu_glue import ptrace_requests as request
from criu_glue.errors import InjectionError, TaskGoneError
from criu_glue.mappings import Task
from criu_glue.ptrace import TracedThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from criu_glue.custody import TaskRecord, ThreadRecord

_SYS_CLOSE: Final = 3
_SYS_MPROTECT: Final = 10
_SYS_MUNMAP: Final = 11
_SYS_UMASK: Final = 95
_PROTECTION: Final = {"r": 1, "w": 2, "x": 4}


@dataclass(slots=True)
class Mended:
    """What was put back. threads: how many had other registers or signal masks; code: how many
    processes had other code. calls: what was undone by system calls. failed: what was not."""

    threads: int = 0
    code: int = 0
    calls: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Held:
    record: TaskRecord
    task: Task
    threads: list[tuple[ThreadRecord, TracedThread]]


def mend(records: list[TaskRecord], thawed: Callable[[], AbstractContextManager[None]]) -> Mended:
    """Put back whatever differs. `thawed` lets the cgroup of the tasks run, and freezes it again.

    Processes that are gone are left out. Raises InjectionError when a thread can't be stopped, and
    OSError; it can be called again.
    """
    mended = Mended()
    held: list[_Held] = []
    try:
        for record in records:
            with contextlib.suppress(TaskGoneError):
                _hold(record, held)
        for one in held:
            mended.code += _put_code_back(one)
            mended.threads += sum(_put_registers_back(*thread) for thread in one.threads)
        living = [one for one in held if one.threads]
        calls = [
            (one, work)
            for one in living
            if (work := list(_differences(one))) or one.record.trap_action
        ]
        if calls:
            with thawed():
                for one, work in calls:
                    _call(one, work, mended)
    finally:
        for one in held:
            _let_go(one)
    return mended


def permission_changes(
    before: tuple[tuple[int, int, str], ...], now: tuple[tuple[int, int, str], ...]
) -> list[tuple[int, int, str | None, str | None]]:
    """[start, end) that differ, with permissions before and now; None: nothing was mapped there.

    Both are sorted and do not overlap. Neighbours that are told apart for other reasons, or are
    joined in one of them only, do not differ.
    """
    edges = sorted({edge for row in (*before, *now) for edge in row[:2]})
    changes: list[tuple[int, int, str | None, str | None]] = []
    rows = [list(reversed(before)), list(reversed(now))]
    for start, end in itertools.pairwise(edges):
        was, is_now = (_permissions_at(table, start) for table in rows)
        if was == is_now:
            continue
        goes_on = changes and changes[-1][1:] == (start, was, is_now)
        changes.append((changes.pop()[0] if goes_on else start, end, was, is_now))
    return changes


def _permissions_at(rows: list[tuple[int, int, str]], address: int) -> str | None:
    """Of the rows, the lowest last; those below the address are dropped."""
    while rows and rows[-1][1] <= address:
        rows.pop()
    return rows[-1][2] if rows and rows[-1][0] <= address else None


def _hold(record: TaskRecord, held: list[_Held]) -> None:
    """Stop every thread of a process; it is added to `held` before. Raises TaskGoneError."""
    one = _Held(record, Task(record.pid), [])
    held.append(one)
    if custody.started(one.task) != record.started:
        raise TaskGoneError(f"task {record.pid} is another one")
    # A zombie has nothing to be mended.
    one.task.living_thread()
    for thread in record.threads:
        traced = TracedThread(one.task, thread.tid)
        with contextlib.suppress(TaskGoneError):
            traced.attach()
            one.threads.append((thread, traced))


def _let_go(held: _Held) -> None:
    for _, thread in held.threads:
        with contextlib.suppress(TaskGoneError):
            thread.release()
    held.task.close()


def _put_code_back(held: _Held) -> bool:
    record = held.record
    if not held.threads or not record.code:
        return False
    memory = f"/proc/{record.pid}/task/{held.threads[0][1].tid}/mem"
    fd = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(fd, len(record.code), record.code_address) == record.code:
            return False
        # The kernel lets a tracer write what the mapping does not (proc_pid_mem(5)).
        return os.pwrite(fd, record.code, record.code_address) == len(record.code)
    finally:
        os.close(fd)


def _put_registers_back(record: ThreadRecord, thread: TracedThread) -> bool:
    tid = thread.tid
    # CRIU stops the parasite at a breakpoint of the processor, which would stay.
    with contextlib.suppress(OSError, TaskGoneError):
        request.ptrace(request.POKEUSER, tid, request.DEBUG_CONTROL, 0)
    try:
        now = request.register_set(tid, request.NT_PRSTATUS)
        others = request.register_set(tid, request.NT_X86_XSTATE), request.signal_mask(tid)
        registers = request.with_rip(record.registers, record.resume_rip)
        if now in (record.registers, registers) and others == (record.extended, record.mask):
            return False
        request.set_register_set(tid, request.NT_PRSTATUS, registers)
        request.set_register_set(tid, request.NT_X86_XSTATE, record.extended)
        request.set_signal_mask(tid, record.mask)
    except TaskGoneError:
        return False
    return True


_Work = tuple[str, int, tuple[int, ...]]


def _differences(held: _Held) -> Iterator[_Work]:
    """What is to be undone by system calls: in words, the call's number, its arguments."""
    record, task = held.record, held.task
    try:
        mapped, open_now = custody.mappings(task), custody.descriptors(task)
        mask = custody.umask(task)
    except TaskGoneError:
        return
    for start, end, was, is_now in permission_changes(record.mappings, mapped):
        where = f"{start:x}-{end:x}"
        if was is None:
            yield f"unmapped {where}", _SYS_MUNMAP, (start, end - start)
        elif is_now is not None:
            protection = sum(_PROTECTION.get(letter, 0) for letter in was)
            yield f"{where} is {was} again", _SYS_MPROTECT, (start, end - start, protection)
    for fd in sorted(set(open_now) - set(record.descriptors)):
        yield f"closed {fd}", _SYS_CLOSE, (fd,)
    if mask != record.umask:
        yield f"umask {record.umask:o}", _SYS_UMASK, (stat.S_IMODE(record.umask),)


def _call(held: _Held, work: list[_Work], mended: Mended) -> None:
    thread = held.threads[0][1]
    try:
        try:
            thread.borrow()
            if held.record.trap_action:
                trap_shield.set_action(held.task, thread, held.record.trap_action)
            for words, number, arguments in work:
                result = thread.call(number, *arguments)
                done = mended.calls if result >= 0 else mended.failed
                done.append(f"task {held.record.pid}: {words}")
        finally:
            # Here, while it can run.
            thread.put_back()
    except (InjectionError, TaskGoneError) as error:
        mended.failed.append(f"task {held.record.pid}: {error}")
