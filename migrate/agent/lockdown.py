"""A process gives up what it does not need, for good; it has to be root when it begins.

    namespaces    mounts, network, IPC, host name: of its own. No network: what it accepts on a
                  socket that it was given works on, but it can't call anybody
    root          one directory, mounted read-only without devices, programs and symlinks; the rest
                  of the host's tree is not mounted in its namespace at all
    capabilities  none, and none to be had: bounding set empty, no_new_privs
    user          one of its own; not dumpable, so that no other process of that user can look in
    limits        no core file, few descriptors and threads
    system calls  those that only an intruder would make end it (seccomp)

unshare(2), pivot_root(2), capabilities(7), prctl(2), seccomp(2). Everything that is imported has to
be imported before, since no file of Python can be found afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from typing import TYPE_CHECKING, Final

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from pathlib import Path

DESCRIPTORS_MAX: Final = 4096
"""Connections of both ports and, of each session, a file for each task that memory arrives of."""
PROCESSES_MAX: Final = 1024
"""Threads count; so do those of the same user in other containers (of a lab) on this kernel."""

# sched.h
_NEW_NAMESPACES: Final = 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000
# sys/mount.h
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MNT_DETACH: Final = 2
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2

# What a process that serves sockets and writes files never does: start programs, look into other
# processes, load code into the kernel, make namespaces, mounts, devices and keys, or sockets of
# other kinds than it has. Numbers of asm/unistd_64.h; the project knows x86_64 alone.
_FORBIDDEN: Final = (
    59,  # execve
    101,  # ptrace
    133,  # mknod
    155,  # pivot_root
    161,  # chroot
    165,  # mount
    166,  # umount2
    175,  # init_module
    248,  # add_key
    249,  # request_key
    250,  # keyctl
    259,  # mknodat
    272,  # unshare
    298,  # perf_event_open
    304,  # open_by_handle_at
    308,  # setns
    310,  # process_vm_readv
    311,  # process_vm_writev
    313,  # finit_module
    321,  # bpf
    322,  # execveat
    323,  # userfaultfd
    425,  # io_uring_setup
    428,  # open_tree
    438,  # pidfd_getfd
)
_PIVOT_ROOT, _CLONE, _CLONE3 = 155, 56, 435
# sched.h: every CLONE_NEW flag that clone(2) takes.
_NEW_OF_CLONE: Final = 0x7E020000
# linux/audit.h: AUDIT_ARCH_X86_64
_ARCHITECTURE: Final = 0xC000003E
# The same calls have a second number each, with this bit (x32).
_X32_BIT: Final = 0x40000000

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _NOT_THERE, _ALLOW = 0x80000000, 0x00050000 | errno.ENOSYS, 0x7FFF0000
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_FIRST_ARGUMENT = 0, 4, 16

_libc = ctypes.CDLL(None, use_errno=True)


class LockdownError(MigrateError):
    """A process could not give up something, so it must not go on."""


def lock_down(root: Path, user: int) -> None:
    """See the module. `root` becomes "/", `user` is uid and gid. For a process with one thread.

    Raises LockdownError.
    """
    try:
        _enter(root)
        _limit()
        _drop_capabilities()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # Both are forgotten when the user changes, so they come after it.
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _forbid_calls()
    except OSError as error:
        raise LockdownError(f"the agent's front can't give up its rights: {error}") from error


def _enter(root: Path) -> None:
    path = os.fsencode(root)
    _checked(_libc.unshare(_NEW_NAMESPACES))
    _mount(None, b"/", _MS_REC | _MS_PRIVATE)
    _mount(path, path, _MS_BIND)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount(None, path, _MS_REMOUNT | _MS_BIND | flags)
    os.chdir(root)
    # The old root is mounted over the new one, and taken away from there (pivot_root(2), NOTES).
    _checked(_libc.syscall(_PIVOT_ROOT, b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS_MAX, DESCRIPTORS_MAX))
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES_MAX, PROCESSES_MAX))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


def _drop_capabilities() -> None:
    """Out of the bounding set; those that it has go with the user."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the last one that this kernel knows was before
                return
            raise


def _forbid_calls() -> None:
    if platform.machine() != "x86_64":
        raise LockdownError(f"the agent's front knows no system calls of {platform.machine()}")
    program = call_filter()
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    head = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(head))


def call_filter() -> bytes:
    """A program for seccomp(2): `struct sock_filter` {code u16, then u8, else u8, operand u32}, the
    two being how many instructions to skip.

    Ends the process on a forbidden call, or one of another architecture, or a clone(2) with new
    namespaces. clone3(2) is said not to exist, since its flags can't be seen; the C library uses
    clone(2) then.
    """
    calls = len(_FORBIDDEN)
    # Of the last lines, seen from the line behind the calls: kill is 6 further, not there 5.
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _ARCHITECTURE),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_IF_AT_LEAST, calls + 6, 0, _X32_BIT),
        *((_IF_EQUAL, calls - 1 - at + 6, 0, call) for at, call in enumerate(_FORBIDDEN)),
        (_IF_EQUAL, 4, 0, _CLONE3),
        (_IF_EQUAL, 0, 2, _CLONE),
        (_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT),
        (_IF_ANY_BIT, 2, 0, _NEW_OF_CLONE),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOT_THERE),
        (_RETURN, 0, 0, _KILL),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _mount(source: bytes | None, target: bytes, flags: int) -> None:
    _checked(_libc.mount(source, target, None, ctypes.c_ulong(flags), None))


def _prctl(option: int, value: int, more: ctypes.c_char_p | None = None) -> None:
    nothing = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), more or nothing, nothing, nothing))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
