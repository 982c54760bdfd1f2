"""ptrace(2) itself: its requests, its structures, and taking a tracee's stop. No policy.

Numbers are from the kernel's uapi headers `linux/ptrace.h` and `asm/ptrace-abi.h`; x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import Final

from criu_glue.errors import TaskGoneError

# -- requests --
POKEUSER: Final = 6
CONT: Final = 7
GETREGS: Final = 12
SETREGS: Final = 13
DETACH: Final = 17
SYSCALL: Final = 24
SETOPTIONS: Final = 0x4200
GETREGSET: Final = 0x4204
SETREGSET: Final = 0x4205
SEIZE: Final = 0x4206
INTERRUPT: Final = 0x4207
LISTEN: Final = 0x4208
GETSIGMASK: Final = 0x420A
SETSIGMASK: Final = 0x420B
GET_RSEQ_CONFIGURATION: Final = 0x420F

# -- options of SEIZE --
O_TRACESYSGOOD: Final = 1
O_TRACEEXIT: Final = 1 << 6
O_SUSPEND_SECCOMP: Final = 1 << 21

# -- sets of registers for GETREGSET (linux/elf.h) --
NT_PRSTATUS: Final = 1
NT_X86_XSTATE: Final = 0x202

# -- statuses of a stop, see `stop_status` --
EVENT_EXIT: Final = 6  # status >> 8 with O_TRACEEXIT: about to exit, whatever for
EVENT_STOP: Final = 128  # status >> 8 after INTERRUPT, and of a stopped (SIGSTOP) task
SYSCALL_STOP: Final = signal.SIGTRAP | 0x80  # with O_TRACESYSGOOD: system call entry or exit

# The code segment of 64-bit programs: Registers.cs (arch/x86/include/asm/segment.h, __USER_CS).
USER_CODE_64: Final = 0x33

# Signals whose stop is announced as EVENT_STOP, and lasts until SIGCONT if LISTEN answers it.
STOPPING: Final = frozenset((signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU))

# struct user: where a debug register is for POKEUSER (sys/user.h, offsetof u_debugreg).
DEBUG_CONTROL: Final = 848 + 7 * 8

_WALL: Final = 0x4000_0000  # waitid(2): threads too
# siginfo_t.si_code of waitid(2) (bits/siginfo-consts.h): whatever is greater is no end.
_CLD_DUMPED: Final = 3
# AVX-512 and AMX take 11 KiB; the kernel tells how much it has filled.
_REGISTER_SET_BYTES_MAX: Final = 32 << 10

# The GIL is kept on purpose (PyDLL): none of these calls blocks, and giving the GIL away could
# cost 5 ms each time while a thread of the container stands still.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.waitid.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int)
# And one that blocks, without the GIL.
_blocking: Final = ctypes.CDLL(None, use_errno=True)
_blocking.waitid.argtypes = _libc.waitid.argtypes


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64 (sys/user.h)"""

    # fmt: off
    _fields_ = tuple((name, ctypes.c_uint64) for name in (
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8",
        "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs",
        "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
    ))
    # fmt: on


class RseqConfiguration(ctypes.Structure):
    """struct ptrace_rseq_configuration (linux/ptrace.h)"""

    _fields_ = (
        ("abi_pointer", ctypes.c_uint64),
        ("abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """ptrace(2). Raises TaskGoneError for ESRCH (the thread has exited, or is not stopped),
    OSError otherwise."""
    ctypes.set_errno(0)
    result = int(_libc.ptrace(request, tid, address, data))
    if result < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise TaskGoneError(f"thread {tid} has exited")
        raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")
    return result


def stop_status(tid: int) -> int | None:
    """Take one stop of a tracee: its status as in waitpid(2), shifted right by 8. Never takes an
    exit, which may be somebody else's to wait for."""
    info = (ctypes.c_int * 32)()
    options = os.WSTOPPED | os.WNOHANG | _WALL
    if _libc.waitid(os.P_PID, tid, ctypes.byref(info), options) < 0:
        raise TaskGoneError(f"thread {tid} has exited")
    # siginfo_t: si_pid is word 4 (0: nothing to report), si_status word 6
    return int(info[6]) if info[4] else None


def wait_stop(pid: int) -> int | None:
    """Block until a tracee of this thread stops: as `stop_status`. None when it has ended; that end
    is its parent's to wait for from then on (ptrace(2), "Death under ptrace")."""
    info = (ctypes.c_int * 32)()
    while True:
        options = os.WSTOPPED | os.WEXITED | _WALL
        if _blocking.waitid(os.P_PID, pid, ctypes.byref(info), options) == 0:
            # si_code is word 2
            return None if info[2] <= _CLD_DUMPED else int(info[6])
        if ctypes.get_errno() != errno.EINTR:
            return None


def register_set(tid: int, kind: int) -> bytes:
    """All registers of a kind (NT_PRSTATUS, NT_X86_XSTATE) of a stopped thread, as `core(5)` has
    them; a 32-bit thread's are fewer."""
    buffer = ctypes.create_string_buffer(_REGISTER_SET_BYTES_MAX)
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(buffer))
    ptrace(GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector[1]]


def set_register_set(tid: int, kind: int, values: bytes) -> None:
    """The opposite of `register_set`."""
    buffer = ctypes.create_string_buffer(values, len(values))
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(buffer))
    ptrace(SETREGSET, tid, kind, ctypes.addressof(vector))


def rip_of(registers: bytes) -> int:
    """The instruction pointer in a set NT_PRSTATUS; 0 of a 32-bit thread."""
    if len(registers) != ctypes.sizeof(Registers):
        return 0
    return int(Registers.from_buffer_copy(registers).rip)


def with_rip(registers: bytes, rip: int) -> bytes:
    """The same set with another instruction pointer; as it is for a 32-bit thread."""
    if len(registers) != ctypes.sizeof(Registers):
        return registers
    changed = Registers.from_buffer_copy(registers)
    changed.rip = rip
    return bytes(changed)


def signal_mask(tid: int) -> int:
    """Which signals a stopped thread blocks, one bit each."""
    mask = ctypes.c_uint64()
    ptrace(GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """The opposite of `signal_mask`."""
    bits = ctypes.c_uint64(mask)
    ptrace(SETSIGMASK, tid, 8, ctypes.addressof(bits))


def rseq_area(tid: int) -> int:
    """The address of a stopped thread's `struct rseq` (rseq(2)); 0 when it has none."""
    configuration = RseqConfiguration()
    try:
        ptrace(
            GET_RSEQ_CONFIGURATION,
            tid,
            ctypes.sizeof(configuration),
            ctypes.addressof(configuration),
        )
    except OSError:
        return 0
    return int(configuration.abi_pointer)
