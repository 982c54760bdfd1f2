"""Does to a process what CRIU's dump does, and does not put it back: for tests that kill it then.

    python3 -m tests.criu_glue.vandal PID stop|trap

Seizes all threads and writes "held"; at a line of input it alters the process and writes "done".
Then it waits for its end. The main thread is left in front of a system call and a trap: `stop`
holds it there; `trap` lets it run into the trap and does not wait for that, as CRIU just before
wait4(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from criu_glue import custody
from criu_glue import ptrace_requests as request
from criu_glue.mappings import Task
from criu_glue.ptrace import TracedThread

SYS_MMAP, SYS_MPROTECT, SYS_GETPID, SYS_DUP, SYS_UMASK = 9, 10, 39, 32, 95
READ, WRITE, EXECUTE = 1, 2, 4
PRIVATE_ANONYMOUS = 0x22
INJECTED = b"\x0f\x05" + b"\xcc" * 6  # syscall, int3


def main() -> None:
    pid, how = int(sys.argv[1]), sys.argv[2]
    task = Task(pid)
    threads = [TracedThread(task, tid) for tid in task.threads()]
    for thread in threads:
        thread.attach()
    print("held", flush=True)
    sys.stdin.readline()
    for thread in threads:
        alter_registers(thread.tid)
    first = threads[0]
    first.borrow()
    assert first.call(SYS_MMAP, 0, 8192, READ | EXECUTE, PRIVATE_ANONYMOUS, (1 << 64) - 1, 0) > 0
    start, end, _ = next(one for one in custody.mappings(task) if one[2] == "r--")
    assert first.call(SYS_MPROTECT, start, end - start, READ | WRITE) == 0
    assert first.call(SYS_DUP, 0) > 0
    first.call(SYS_UMASK, 0)
    code = next(start for start, _, how in custody.mappings(task) if "x" in how)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(code)
        memory.write(INJECTED)
    registers = request.Registers()
    request.ptrace(request.GETREGS, pid, 0, ctypes.addressof(registers))
    registers.rip, registers.rax, registers.orig_rax = code, SYS_GETPID, (1 << 64) - 1
    request.ptrace(request.SETREGS, pid, 0, ctypes.addressof(registers))
    request.set_signal_mask(pid, ~(1 << (signal.SIGTRAP - 1)) & (1 << 64) - 1)
    if how == "trap":
        request.ptrace(request.CONT, pid)
    print("done", flush=True)
    signal.pause()
    os._exit(0)


def alter_registers(tid: int) -> None:
    """General and vector registers."""
    registers = bytearray(request.register_set(tid, request.NT_PRSTATUS))
    registers[:80] = bytes(80)
    request.set_register_set(tid, request.NT_PRSTATUS, bytes(registers))
    extended = bytearray(request.register_set(tid, request.NT_X86_XSTATE))
    # xmm0 to xmm15 (fxsave: 160 to 416)
    extended[160:416] = bytes(256)
    request.set_register_set(tid, request.NT_X86_XSTATE, bytes(extended))


if __name__ == "__main__":
    main()
