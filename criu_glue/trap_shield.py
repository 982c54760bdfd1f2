"""A handler for SIGTRAP in tasks that have none, so that a trap of CRIU's can't kill them.

What CRIU runs in a thread ends with a trap (int3), which stops it for CRIU. If CRIU is killed after
the thread has stopped and before CRIU has heard of it, the kernel goes on with the signal: it kills
a process that has no handler (`kernel/signal.c: ptrace_signal`, `get_signal`), before the freezer
is looked for. With a handler it prepares its call, on the thread's stack, and then comes to the
freezer; `mending.py` puts the registers back and the handler is never executed. A pid namespace's
init needs none: signals without a handler do nothing to it.

`compel/src/lib/infect.c: parasite_run` leaves SIGTRAP unblocked, which is why this works.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from criu_glue.core.sigaction import ACTION
from criu_glue.errors import InjectionError

if TYPE_CHECKING:
    from criu_glue.mappings import Task
    from criu_glue.ptrace import TracedThread

_SYS_RT_SIGACTION: Final = 13
_SIGTRAP: Final = 5
_SIGTRAP_BIT: Final = 1 << (_SIGTRAP - 1)
# asm-generic/signal-defs.h; on x86-64 the kernel calls no handler without a restorer. On an
# alternative stack if there is one: a thread that has one may have a small one else.
_SA_RESTORER: Final = 0x0400_0000
_SA_ONSTACK: Final = 0x0800_0000
_ALL_SIGNALS: Final = (1 << 64) - 1
# Below the stack pointer the ABI of x86-64 leaves 128 bytes to the function; whatever is below them
# may be overwritten by a signal at any time.
_RED_ZONE_BYTES: Final = 128


def is_needed(task: Task) -> bool:
    """Whether a SIGTRAP would kill the process."""
    return task.vpid() != 1 and not int(task.status("SigCgt"), 16) & _SIGTRAP_BIT


def raise_shield(task: Task, thread: TracedThread, address: int) -> bytes:
    """Give a process a handler, at any address of it; what it had (`ACTION`). `thread` is borrowed.
    Raises InjectionError."""
    shield = ACTION.pack(address, _SA_RESTORER | _SA_ONSTACK, address, _ALL_SIGNALS)
    return set_action(task, thread, shield)


def set_action(task: Task, thread: TracedThread, action: bytes) -> bytes:
    """Set what a process does on SIGTRAP; what it did before. As `raise_shield`."""
    place = (thread.stack_pointer - _RED_ZONE_BYTES - 2 * ACTION.size) & ~0xF
    fd = os.open(f"/proc/{task.pid}/task/{thread.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, action, place)
        result = thread.call(_SYS_RT_SIGACTION, _SIGTRAP, place, place + ACTION.size, 8)
        if result:
            raise InjectionError(f"task {task.pid}: rt_sigaction: {os.strerror(-result)}")
        return os.pread(fd, ACTION.size, place + ACTION.size)
    except OSError as error:
        raise InjectionError(f"task {task.pid}: the stack can't be written: {error}") from error
    finally:
        os.close(fd)
