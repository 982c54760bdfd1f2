"""A process gives up what it does not need, for good; it has to be root when it begins.

    namespaces    mounts, network, IPC, host name: of its own. No network: what it accepts on a
                  socket that it was given works on, but it can't call anybody
    root          one directory, mounted read-only without devices, programs and symlinks; the rest
                  of the host's tree is not mounted in its namespace at all
    capabilities  none, and none to be had: bounding set empty, no_new_privs
    user          one of its own; not dumpable, so that no other process of that user can look in
    limits        no core file, few descriptors and threads
    system calls  those that only an intruder would make end it (seccomp)

Everything that is imported has to be imported before, since no file of Python can be found
afterwards.

What has to be root all the same, because it makes files of any owner, is put into a *cell* before
its program is executed: namespaces as above; it finds the host's whole tree, but can write into a
few directories only, and use no devices; of the capabilities it has those for files; system calls
as above, but for those that start it, chroot and make nodes; and it can't call anybody on the host
either, through sockets that are files.

unshare(2), pivot_root(2), mount_setattr(2), capabilities(7), prctl(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import resource
import signal
import struct
from typing import TYPE_CHECKING, Final

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Sequence
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
# fcntl.h, linux/mount.h
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_RDONLY, _NOSUID, _NODEV = 1, 2, 4
# linux/capability.h: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID,
# SYS_CHROOT, MKNOD, SETFCAP; and SYS_ADMIN, which attributes of files need (xattr(7): trusted,
# security). Nothing else that it is good for is left: see _FORBIDDEN.
_FOR_FILES: Final = frozenset((0, 1, 2, 3, 4, 6, 7, 18, 27, 31, 21))
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER: Final = 2

# What a process that serves sockets and writes files never does: start programs, look into other
# processes, load code into the kernel, make namespaces, mounts, devices and keys, or sockets of
# other kinds than it has. Numbers of asm/unistd_64.h; the project knows x86_64 alone.
_FORBIDDEN: Final = (
    101,  # ptrace
    155,  # pivot_root
    165,  # mount
    166,  # umount2
    175,  # init_module
    248,  # add_key
    249,  # request_key
    250,  # keyctl
    272,  # unshare
    298,  # perf_event_open
    304,  # open_by_handle_at
    308,  # setns
    310,  # process_vm_readv
    311,  # process_vm_writev
    313,  # finit_module
    321,  # bpf
    323,  # userfaultfd
    425,  # io_uring_setup
    428,  # open_tree
    429,  # move_mount
    430,  # fsopen
    432,  # fsmount
    438,  # pidfd_getfd
    442,  # mount_setattr
)
_FORBIDDEN_TO_FRONT: Final = (
    *_FORBIDDEN,
    59,  # execve
    133,  # mknod
    161,  # chroot
    259,  # mknodat
    322,  # execveat
)
# What a program in a cell may try, and is refused: the C library asks a daemon for names with it.
_REFUSED_IN_CELL: Final = (42,)  # connect
_PIVOT_ROOT, _CLONE, _CLONE3, _MOUNT_SETATTR = 155, 56, 435, 442
# sched.h: every CLONE_NEW flag that clone(2) takes.
_NEW_OF_CLONE: Final = 0x7E020000
# linux/audit.h: AUDIT_ARCH_X86_64
_ARCHITECTURE: Final = 0xC000003E
# The same calls have a second number each, with this bit (x32).
_X32_BIT: Final = 0x40000000

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
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
        _drop_capabilities(frozenset())
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # Both are forgotten when the user changes, so they come after it.
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _forbid_calls(_FORBIDDEN_TO_FRONT, ())
    except OSError as error:
        raise LockdownError(f"the agent's front can't give up its rights: {error}") from error


def enter_cell(writable: Sequence[Path]) -> None:
    """See the module. For a process with one thread, which executes a program next. Raises
    LockdownError."""
    try:
        _checked(_libc.unshare(_NEW_NAMESPACES))
        _mount(None, b"/", _MS_REC | _MS_PRIVATE)
        _set_attributes(b"/", _AT_RECURSIVE, _RDONLY | _NOSUID | _NODEV, 0)
        for directory in writable:
            path = os.fsencode(directory)
            _mount(path, path, _MS_BIND)
            _set_attributes(path, 0, 0, _RDONLY)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _drop_capabilities(_FOR_FILES)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _forbid_calls(_FORBIDDEN, _REFUSED_IN_CELL)
    except OSError as error:
        raise LockdownError(f"a program can't be confined: {error}") from error


def end_with_parent() -> None:
    """This process is killed when the thread that started it ends. Raises OSError."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """What descendants of this process leave behind becomes its own. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def confine_like(bounding: int, *, is_filtered: bool) -> None:
    """Before a program is executed as root of a container: of capabilities it gets no more than
    these (capabilities(7): bit by number), and makes none of the calls that an intruder would, if
    the container's own tasks have a filter. Raises OSError, LockdownError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _drop_capabilities(frozenset(one for one in range(64) if bounding >> one & 1))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if is_filtered:
        _forbid_calls(_FORBIDDEN, ())


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


def _drop_capabilities(but: frozenset[int]) -> None:
    """Out of the bounding set; those that it has go with the user, or with the next program."""
    for capability in sorted(frozenset(range(64)) - but):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the last one that this kernel knows was before
                return
            raise


def _forbid_calls(forbidden: Sequence[int], refused: Sequence[int]) -> None:
    if platform.machine() != "x86_64":
        raise LockdownError(f"the agent's front knows no system calls of {platform.machine()}")
    program = call_filter(forbidden, refused)
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    head = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(instructions))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(head))


def call_filter(forbidden: Sequence[int], refused: Sequence[int]) -> bytes:
    """A program for seccomp(2): `struct sock_filter` {code u16, then u8, else u8, operand u32}, the
    two being how many instructions to skip.

    Ends the process on a forbidden call, or one of another architecture, or a clone(2) with new
    namespaces; a refused call fails (EPERM). clone3(2) is said not to exist, since its flags can't
    be seen; the C library uses clone(2) then.
    """
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _ARCHITECTURE),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        *_unless((_IF_AT_LEAST, _X32_BIT), _KILL),
        *itertools.chain.from_iterable(_unless((_IF_EQUAL, one), _KILL) for one in forbidden),
        *itertools.chain.from_iterable(
            _unless((_IF_EQUAL, one), _ERROR | errno.EPERM) for one in refused
        ),
        *_unless((_IF_EQUAL, _CLONE3), _ERROR | errno.ENOSYS),
        (_IF_EQUAL, 1, 0, _CLONE),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT),
        *_unless((_IF_ANY_BIT, _NEW_OF_CLONE), _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _unless(test: tuple[int, int], end: int) -> tuple[tuple[int, int, int, int], ...]:
    """Go on, unless the test is true."""
    code, operand = test
    return (code, 0, 1, operand), (_RETURN, 0, 0, end)


def _set_attributes(path: bytes, flags: int, set_: int, clear: int) -> None:
    # struct mount_attr: set, clear, propagation, user namespace
    attr = struct.pack("=QQQQ", set_, clear, 0, 0)
    number, size = ctypes.c_long(_MOUNT_SETATTR), ctypes.c_size_t(len(attr))
    at = ctypes.c_int(_AT_FDCWD)
    _checked(_libc.syscall(number, at, ctypes.c_char_p(path), ctypes.c_uint(flags), attr, size))


def _mount(source: bytes | None, target: bytes, flags: int) -> None:
    _checked(_libc.mount(source, target, None, ctypes.c_ulong(flags), None))


def _prctl(option: int, value: int, more: ctypes.c_char_p | None = None) -> None:
    nothing = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), more or nothing, nothing, nothing))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
