"""Gives up its rights and attempts one thing: locked_down.py ROOT USER WHAT [MORE]

Says "done", or the name of the error that it met.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from migrate.agent.lockdown import lock_down

_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int) -> None:
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")


def status() -> None:
    uids = " ".join(map(str, os.getresuid()))
    gids = " ".join(map(str, os.getresgid()))
    print(f"uid {uids} gid {gids} groups {os.getgroups()}")
    no_new_privs, seccomp, dumpable = (_libc.prctl(each, 0, 0, 0, 0) for each in (39, 21, 3))
    core = resource.getrlimit(resource.RLIMIT_CORE)
    print(f"no_new_privs {no_new_privs} seccomp {seccomp} dumpable {dumpable} core {core}")


def in_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def connect(port: str) -> None:
    # An address needs the codec "idna" otherwise, which can't be found any more.
    with socket.socket() as end:
        end.connect((b"127.0.0.1", int(port)))


ATTEMPTS: dict[str, Callable[..., object]] = {
    "status": status,
    "read": lambda path: Path(path).read_bytes(),
    "write": lambda path: Path(path).write_bytes(b"x"),
    "raise-user": lambda: os.setresuid(0, 0, 0),
    "connect": connect,
    "thread": in_thread,
    "execute": lambda: os.execv("/given", ["given"]),
    "trace": lambda: call(101, 16, os.getppid(), 0, 0),
    "mount": lambda: call(165, 0, 0, 0, 0, 0),
    "unshare": lambda: call(272, _CLONE_NEWUSER),
    "new-user-namespace": lambda: call(56, _CLONE_NEWUSER | 17, 0, 0, 0, 0),
    "keys": lambda: call(250, 0, 0, 0, 0, 0),
    "x32": lambda: call(0x40000000 | 39),
}

lock_down(Path(sys.argv[1]), int(sys.argv[2]))
try:
    ATTEMPTS[sys.argv[3]](*sys.argv[4:])
    print("done")
except OSError as error:
    print(errno.errorcode[error.errno or 0])
