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
CONT: Final = 7
GETREGS: Final = 12
SETREGS: Final = 13
DETACH: Final = 17
SYSCALL: Final = 24
SEIZE: Final = 0x4206
INTERRUPT: Final = 0x4207
GETSIGMASK: Final = 0x420A
SETSIGMASK: Final = 0x420B
GET_RSEQ_CONFIGURATION: Final = 0x420F

# -- options of SEIZE --
O_TRACESYSGOOD: Final = 1
O_SUSPEND_SECCOMP: Final = 1 << 21

# -- statuses of a stop, see `stop_status` --
EVENT_STOP: Final = 128  # status >> 8 after INTERRUPT, and of a stopped (SIGSTOP) task
SYSCALL_STOP: Final = signal.SIGTRAP | 0x80  # with O_TRACESYSGOOD: system call entry or exit

# The code segment of 64-bit programs: Registers.cs (arch/x86/include/asm/segment.h, __USER_CS).
USER_CODE_64: Final = 0x33

_WALL: Final = 0x4000_0000  # waitid(2): threads too

# The GIL is kept on purpose (PyDLL): none of these calls blocks, and giving the GIL away could
# cost 5 ms each time while a thread of the container stands still.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.waitid.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int)


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
