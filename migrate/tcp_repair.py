"""Takes TCP connections of frozen tasks out of the repair mode that a killed CRIU leaves them in.

CRIU puts established connections into repair mode to read their queues (`criu/sk-tcp.c`,
`soccr/soccr.c`) and takes them out when it undoes a dump. Killed, it leaves them so: the tasks run
on, nothing that they write is sent, and their peers give up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/tcp.h
_TCP_REPAIR = 19
_TCP_REPAIR_QUEUE = 20
_TCP_NO_QUEUE = 0
_TCP_REPAIR_OFF = 0
# The same number on every architecture (asm-generic/unistd.h).
_SYS_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


def leave(cgroup: Path) -> int:
    """Take every connection of the tasks below `cgroup` out of repair mode; how many there were.

    For tasks that do not run. One that can't be looked into is left out, as is a socket that says
    no: the container goes on in any case.
    """
    return sum(_leave(pid) for pid in _tasks(cgroup))


def _tasks(cgroup: Path) -> Iterator[int]:
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):
            yield from map(int, Path(directory, "cgroup.procs").read_text().split())


def _leave(pid: int) -> int:
    count = 0
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            for fd in _sockets(pid):
                count += _repaired(pidfd, fd)
        finally:
            os.close(pidfd)
    return count


def _sockets(pid: int) -> list[int]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(entry.stat().st_mode):
                found.append(int(entry.name))
    return found


def _repaired(pidfd: int, fd: int) -> bool:
    """Whether the socket behind a task's descriptor was in repair mode; it is not any more."""
    copy = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        return False
    with socket.socket(fileno=copy) as connection, contextlib.suppress(OSError):
        if connection.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == _TCP_REPAIR_OFF:
            return False
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _TCP_NO_QUEUE)
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF)
        return True
    return False
