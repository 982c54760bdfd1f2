"""Runs one program in a copy that is held, held back as the copy's first task is to be:

    python3 -m migrate.agent.in_copy DESCRIPTOR NAME      what to enter, as JSON, on standard input

    this process ── setns(pid) ── fork: waits for all that the program starts ── fork: the program

    cgroup        joined first, so that the copy's limits are the program's too
    namespaces    of the first task: user, IPC, host name, network, pid, cgroup, mounts; its root
                  is the copy's
    user          the copy's root, with the capabilities that the first task can ever have
    label         the first task's, where a security module gives some
    system calls  if the first task has a filter, those of `lockdown.py` are forbidden

The program is read by its descriptor into memory of its own, so that nothing in the copy comes to
the host's file. It has no other descriptor. What it starts has to end as well: who is left would be
the child of the copy's first task, which knows nothing of it. The exit code is the program's.

For a process with one thread, as setns(2) demands of users and mounts. Nothing in the copy can look
into this process meanwhile: CRIU holds all of its tasks.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.agent import lockdown

if TYPE_CHECKING:
    from collections.abc import Callable

HOOK_BYTES_MAX: Final = 16 << 20
_PLAN_BYTES_MAX: Final = 64 << 10
_FAILED: Final = 125
"""The exit code when the program could not be run, as env(1) has it."""
# Of namespaces(7). Mounts last, since the tree is the host's until then; users first, since the
# others are theirs.
_NAMESPACES: Final = ("user", "ipc", "uts", "net", "cgroup", "mnt")
_MEMORY_AT: Final = 3

_libc = ctypes.CDLL(None, use_errno=True)


class InCopy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is entered. task: the first one's pid here. bounding: capabilities. is_filtered: whether
    it has a filter of system calls. label: "" for none."""

    task: int
    cgroup: str
    bounding: int
    is_filtered: bool
    label: str
    environment: dict[str, str]


def main() -> int:
    """See the module."""
    descriptor, name = int(sys.argv[1]), sys.argv[2]
    plan = msgspec.json.decode(sys.stdin.buffer.read(_PLAN_BYTES_MAX), type=InCopy)
    with os.fdopen(descriptor, "rb") as file:
        program = file.read(HOOK_BYTES_MAX)
    lockdown.end_with_parent()
    os.setgroups([])
    directory = Path("/proc", str(plan.task), "ns")
    _setns(os.open(directory / "pid", os.O_RDONLY | os.O_CLOEXEC))
    return _forked(lambda: _supervise(program, name, plan))


def _supervise(program: bytes, name: str, plan: InCopy) -> int:
    """In the copy's pid namespace: the program's code, when all that it has started has ended."""
    lockdown.end_with_parent()
    lockdown.adopt_orphans()
    code = _forked(lambda: _execute(program, name, plan))
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return code


def _forked(work: Callable[[], int]) -> int:
    """The code of a child that does `work`."""
    child = os.fork()
    if child == 0:
        code = _FAILED
        try:
            code = work()
        except BaseException as error:  # noqa: BLE001  it must not go on as a copy of its parent
            os.write(1, f"it can't be run: {error}".encode())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _execute(program: bytes, name: str, plan: InCopy) -> int:
    """Does not return unless it fails."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    directory = Path("/proc", str(plan.task), "ns")
    own = Path("/proc/self/ns")
    entered = [
        os.open(directory / kind, os.O_RDONLY | os.O_CLOEXEC)
        for kind in _NAMESPACES
        if (directory / kind).readlink() != (own / kind).readlink()
    ]
    if (directory / "mnt").readlink() == (own / "mnt").readlink():
        raise OSError("the copy has no mounts of its own")
    Path(plan.cgroup, "cgroup.procs").write_text("0")
    if plan.label:
        Path("/proc/self/attr/exec").write_text(f"exec {plan.label.partition(' (')[0]}")
    for descriptor in entered:
        _setns(descriptor)
    os.chdir("/")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # The kernel forgets it when the user changes.
    lockdown.end_with_parent()
    memory = os.memfd_create(name, 0)
    with open(memory, "wb", closefd=False) as file:
        file.write(program)
    # Not closed by the exec: an interpreter reads its script there (/dev/fd).
    os.dup2(memory, _MEMORY_AT)
    os.closerange(_MEMORY_AT + 1, os.sysconf("SC_OPEN_MAX"))
    lockdown.confine_like(plan.bounding, is_filtered=plan.is_filtered)
    os.execve(_MEMORY_AT, [name], plan.environment)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main())
