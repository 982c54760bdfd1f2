"""Running a few system calls inside a thread of another process, and leaving no trace of it.

    SEIZE, INTERRUPT      the thread stops on its way to user space, signals undelivered
    save                  registers, signal mask
    call, call, ...       rip at a `syscall` instruction; PTRACE_SYSCALL to its entry and its exit
    INTERRUPT             a stop at the same place of the kernel as the first
    restore, DETACH       the kernel goes on with what it was about to do

The first and the last stop are in the kernel's signal delivery (`get_signal`), where the kernel
decides, from rax and orig_rax, whether an interrupted system call is restarted. As both hold the
thread's own values again, it restarts nanosleep(2), poll(2), futex(2) with the rest of their time.
Stepping over system calls by PTRACE_SYSCALL rather than PTRACE_SINGLESTEP forces no SIGTRAP, which
would reset a handler that the program has for it.

The kernel binds a tracee to the thread that traces it, and lets go of it when that thread ends. So
each call of `run_in_thread` has a thread of its own: what never came to a stop is released by
that thread's end, there is no other way. Knows nothing of userfaultfd. x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from criu_glue import ptrace_requests as request
from criu_glue.errors import InjectionError, TaskBusyError, TaskGoneError
from criu_glue.mappings import Task, parse_maps

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# A runnable thread stops within a millisecond, one in uninterruptible sleep (NFS, or a parent in
# vfork) when that ends. Beyond this the caller is better off without.
STOP_DEADLINE_S: Final = 0.5
# What the two system calls may take on a loaded host before the caller is told. The thread's
# registers are put back all the same, whenever that becomes possible.
CALL_DEADLINE_S: Final = 1.0
# Signals that may be let through before the thread is seen at rest. A storm delivers one each turn.
SIGNALS_MAX: Final = 1000
# Busy waiting before sleeping: the stop usually comes within 50 microseconds.
_SPIN_S: Final = 0.0003
_NAP_S: Final = 0.0005
# Of an executable mapping that is searched for a `syscall` instruction.
_SEARCH_BYTES_MAX: Final = 4 << 20
_SYSCALL_INSTRUCTION: Final = b"\x0f\x05"

_ALL_SIGNALS: Final = (1 << 64) - 1
_NO_SYSCALL: Final = (1 << 64) - 1
# include/linux/errno.h, kernel-internal: restart unless a handler runs, then EINTR.
_ERESTARTNOHAND: Final = 514

# System calls that end with EINTR whenever their thread was stopped, although no handler ran
# (signal(7), "Interruption of system calls ... by stop signals"), with the argument that is their
# time limit: number -> register, or None when there is no limit ever.
_EINTR_AFTER_STOP: Final[dict[int, str | None]] = {
    65: None,  # semop
    128: "rdx",  # rt_sigtimedwait, a pointer
    208: "r8",  # io_getevents, a pointer
    220: "r10",  # semtimedop, a pointer
    232: "r10",  # epoll_wait, milliseconds
    281: "r10",  # epoll_pwait, milliseconds
    441: "r10",  # epoll_pwait2, a pointer
}
_IN_MILLISECONDS: Final = (232, 281)
# A wait that began again takes its whole limit once more. Up to this that is less harm than an
# error that many programs take for fatal; a longer one ends with EINTR as after SIGSTOP.
_EXTENDED_WAIT_MS_MAX: Final = 1000


class TracedThread:
    """A thread that is stopped and lets system calls be run in it. Made by `run_in_thread`."""

    def __init__(self, task: Task, tid: int) -> None:
        self.tid = tid
        self._task = task
        self._saved = request.Registers()
        self._saved_mask = 0
        self._instruction = 0
        self._stopped = False
        self._borrowed = False
        self._stop_again = False

    def attach(self) -> None:
        """Seize and stop the thread. Raises TaskGoneError, TaskBusyError, InjectionError."""
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        options = self._options()
        self._instruction = _find_syscall_instruction(self._task, self.tid)
        try:
            request.ptrace(request.SEIZE, self.tid, 0, options)
        except OSError as error:
            raise self._refused(error) from error
        request.ptrace(request.INTERRUPT, self.tid)
        for _ in range(SIGNALS_MAX):
            status = self._wait(deadline_s)
            if status >> 8 == request.EVENT_STOP:
                return
            # A signal is about to be delivered. Let it be, and stop again behind it: any stop
            # uses up the interrupt.
            request.ptrace(request.INTERRUPT, self.tid)
            self._resume(request.CONT, status & 0x7F)
        raise InjectionError(f"thread {self.tid} gets more than {SIGNALS_MAX} signals at a time")

    def adopt(self) -> None:
        """Take over a thread that this thread of ours has seized and stopped by itself."""
        request.ptrace(request.SETOPTIONS, self.tid, 0, self._options())
        self._instruction = _find_syscall_instruction(self._task, self.tid)
        self._stopped = True

    @property
    def stack_pointer(self) -> int:
        """Where the stack of the borrowed thread ends."""
        return int(self._saved.rsp)

    def _options(self) -> int:
        options = request.O_TRACESYSGOOD
        if int(self._task.status("Seccomp", thread=self.tid)):
            options |= request.O_SUSPEND_SECCOMP
        return options

    def borrow(self) -> None:
        """Save what `call` changes. The thread must be attached."""
        request.ptrace(request.GETREGS, self.tid, 0, ctypes.addressof(self._saved))
        if self._saved.cs != request.USER_CODE_64:
            raise InjectionError(f"thread {self.tid} runs 32-bit code")
        if self._task.open_and_read_at(f"task/{self.tid}/mem", self._instruction, 2) != (
            _SYSCALL_INSTRUCTION
        ):
            # The program was replaced (execve) since the search.
            self._instruction = _find_syscall_instruction(self._task, self.tid)
        _keep_waiting(self._saved)
        memory = f"task/{self.tid}/mem"
        self._saved.rip = outside_sequence(
            self.tid,
            self._saved.rip,
            lambda address, size: self._task.open_and_read_at(memory, address, size),
        )
        self._saved_mask = request.signal_mask(self.tid)
        self._borrowed = True
        request.set_signal_mask(self.tid, _ALL_SIGNALS)

    def call(self, number: int, *arguments: int) -> int:
        """Run one system call that does not block. Returns its result, which is a negative errno
        when it failed."""
        registers = request.Registers.from_buffer_copy(self._saved)
        registers.rip, registers.rax = self._instruction, number
        # Not in a system call: else the kernel might restart the interrupted one right here.
        registers.orig_rax = _NO_SYSCALL
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, value)
        request.ptrace(request.SETREGS, self.tid, 0, ctypes.addressof(registers))
        deadline_s = time.monotonic() + CALL_DEADLINE_S
        for _entry_and_exit in range(2):
            while True:
                self._resume(request.SYSCALL)
                if self._wait_unsignalled(deadline_s) == request.SYSCALL_STOP:
                    break
        request.ptrace(request.GETREGS, self.tid, 0, ctypes.addressof(registers))
        if registers.orig_rax != number or registers.rip != self._instruction + 2:
            raise InjectionError(f"thread {self.tid} did not run system call {number}")
        return ctypes.c_int64(registers.rax).value

    def put_back(self) -> None:
        """Undo `borrow`, also after a failure, however long it takes the thread to come to a stop:
        without its registers it could not go on. It stays stopped."""
        if self._borrowed:
            if not self._stopped:
                # `call` has failed while the thread was running.
                request.ptrace(request.INTERRUPT, self.tid)
                self._wait_unsignalled(None)
            while True:
                # In this order: any other stop uses up the interrupt.
                request.ptrace(request.INTERRUPT, self.tid)
                self._resume(request.CONT)
                if self._wait_unsignalled(None) >> 8 == request.EVENT_STOP:
                    break
            request.ptrace(request.SETREGS, self.tid, 0, ctypes.addressof(self._saved))
            request.set_signal_mask(self.tid, self._saved_mask)
            self._borrowed = False

    def release(self) -> None:
        """Put everything back and detach."""
        self.put_back()
        request.ptrace(request.DETACH, self.tid)
        if self._stop_again:
            os.kill(self._task.pid, signal.SIGSTOP)

    def _resume(self, how: int, signal_number: int = 0) -> None:
        request.ptrace(how, self.tid, 0, signal_number)
        self._stopped = False

    def _wait(self, deadline_s: float | None) -> int:
        """The next stop's status. Raises InjectionError at the deadline, TaskGoneError."""
        started_s = time.monotonic()
        while True:
            status = request.stop_status(self.tid)
            if status is not None:
                self._stopped = True
                return status
            now_s = time.monotonic()
            if now_s - started_s < _SPIN_S:
                continue
            if self._task.thread_state(self.tid) in "ZX":
                raise TaskGoneError(f"thread {self.tid} has exited")
            if deadline_s is not None and now_s > deadline_s:
                raise InjectionError(f"thread {self.tid} does not stop")
            time.sleep(_NAP_S)

    def _wait_unsignalled(self, deadline_s: float | None) -> int:
        """Like `_wait`, in a thread whose signals are blocked. Only SIGSTOP can't be: it is kept
        for later, as what it would stop now is not the program."""
        status = self._wait(deadline_s)
        if status == signal.SIGSTOP:
            self._stop_again = True
        return status

    def _refused(self, error: OSError) -> InjectionError:
        tracer = int(self._task.status("TracerPid", thread=self.tid))
        if tracer:
            return TaskBusyError(f"thread {self.tid} is traced by {_name(tracer)}")
        return InjectionError(f"thread {self.tid} can't be traced: {error}")


def outside_sequence(tid: int, rip: int, read: Callable[[int, int], bytes]) -> int:
    """Where a stopped thread is to resume: if it is inside a restartable sequence (rseq(2)), at the
    abort handler, as the kernel does after a preemption. The kernel forgets the sequence when it
    sees the thread run elsewhere, so that it must not resume in the middle.

    `read` gives so many bytes of the task's memory at an address.
    """
    area = request.rseq_area(tid)
    if not area:
        return rip
    # struct rseq: rseq_cs at 8. struct rseq_cs: start_ip, post_commit_offset, abort_ip at 8.
    address = int.from_bytes(read(area + 8, 8), "little")
    if not address:
        return rip
    words = memoryview(read(address + 8, 24)).cast("Q")
    if len(words) == 3 and words[0] <= rip < words[0] + words[1]:
        return words[2]
    return rip


def run_in_thread(task: Task, tid: int, work: Callable[[TracedThread], T]) -> T:
    """Stop one thread of a task, let `work` run system calls in it, and let it go on.

    The thread stands still for some 100 microseconds. Raises what `work` raises, TaskGoneError,
    TaskBusyError (it is traced already) or InjectionError; in each case it goes on untouched.
    """
    outcome: Future[T] = Future()

    def trace() -> None:
        try:
            outcome.set_result(_trace(task, tid, work))
        except BaseException as error:  # noqa: BLE001  handed to the caller
            outcome.set_exception(error)

    tracer = threading.Thread(target=trace, name=f"trace-{tid}", daemon=True)
    tracer.start()
    try:
        result = outcome.result(STOP_DEADLINE_S + 3 * CALL_DEADLINE_S)
    except TimeoutError as error:
        raise InjectionError(
            f"thread {tid} was frozen while borrowed; it is put back when it runs again"
        ) from error
    finally:
        tracer.join(0 if not outcome.done() else None)
    return result


def _trace(task: Task, tid: int, work: Callable[[TracedThread], T]) -> T:
    traced = TracedThread(task, tid)
    traced.attach()
    try:
        traced.borrow()
        return work(traced)
    finally:
        traced.release()


def _name(tid: int) -> str:
    try:
        name = Path(f"/proc/{tid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"process {tid}"
    return f"{name} ({tid})"


def _keep_waiting(registers: request.Registers) -> None:
    """Turn the EINTR of a wait that only our stop has interrupted into a restart, decided by the
    kernel: if a handler runs after all, the program gets its EINTR."""
    if ctypes.c_int64(registers.rax).value != -errno.EINTR:
        return
    number = int(registers.orig_rax)
    if number not in _EINTR_AFTER_STOP:
        return
    name = _EINTR_AFTER_STOP[number]
    if name is not None:
        limit = int(getattr(registers, name))
        if number in _IN_MILLISECONDS:
            if ctypes.c_int32(limit & 0xFFFF_FFFF).value > _EXTENDED_WAIT_MS_MAX:
                return
        elif limit:
            return
    registers.rax = ctypes.c_uint64(-_ERESTARTNOHAND).value


def _find_syscall_instruction(task: Task, tid: int) -> int:
    """The address of a `syscall` instruction in the thread's memory, in the vdso if it has one."""
    memory = f"task/{tid}/mem"
    mappings = [
        mapping
        for mapping in parse_maps(task.read(f"task/{tid}/maps"))
        if "x" in mapping.permissions and mapping.name != "[vsyscall]"
    ]
    mappings.sort(key=lambda mapping: mapping.name != "[vdso]")
    for mapping in mappings:
        size_bytes = min(mapping.end - mapping.start, _SEARCH_BYTES_MAX)
        offset = task.open_and_read_at(memory, mapping.start, size_bytes).find(_SYSCALL_INSTRUCTION)
        if offset >= 0:
            return mapping.start + offset
    raise InjectionError(f"thread {tid} has no syscall instruction")
