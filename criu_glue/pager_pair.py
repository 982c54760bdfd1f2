"""What the two processes of a pager share, and how each of them makes the other.

    keeper                    worker
       \\__ one table of descriptors (CLONE_FILES), the journal, the page of the state __/

A table of descriptors closes when its last process has ended. So whatever one of the two opens,
the other has from that instant on: a userfaultfd that CRIU sends, the one of a child that was
forked, the connection. There is nothing to hand over, and no moment in which only one of them holds
a task's memory. Each notices at once when the other has died, and makes another one by clone(2)
without execve(2), which would take the table apart; that takes 2 ms.

Rule of a shared table: a process closes what it has opened itself, and what the journal gives it.
Objects that close a descriptor when they are forgotten are never forgotten (`NewRole`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.pager_watch import start_ticks

if TYPE_CHECKING:
    import socket

    from criu_glue.pager_journal import Journal
    from criu_glue.pager_state import PagerState

_SYS_CLONE: Final = 56
_CLONE_FILES: Final = 0x400
_CLONE_PIDFD: Final = 0x1000
_PR_SET_NAME: Final = 15
_USERFAULTFD: Final = "anon_inode:[userfaultfd]"
_SOCKET: Final = "socket:"

# Holds Python's lock during the call, as fork has to.
_python = ctypes.PyDLL(None, use_errno=True)
_python.syscall.restype = ctypes.c_long
_python.syscall.argtypes = (*[ctypes.c_long] * 3, ctypes.c_void_p, *[ctypes.c_long] * 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """What both processes of a pager have, whichever was there first.

    alive: the FIFO (pager_watch.py). signals: what signals of either process are written to.
    common: the descriptors of all this, and those that were there before. users: that this pager
    needs the store (store_users.py). on_demand: nothing is filled that was not asked for."""

    images: Path
    store: Path
    state: PagerState
    journal: Journal
    listener: socket.socket
    alive: int
    signals: int
    common: frozenset[int]
    users: int
    on_demand: bool


class NewRole(BaseException):
    """Raised in a process that was just forked, up to where it takes on its role.

    Not an Exception: nothing on the way may take it for a failure."""


class Companion:
    """The other process of the pair."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """`pidfd`: -1 for a process that has ended."""
        self.pid = pid
        self.pidfd = pidfd
        self._poll = select.poll()
        if pidfd >= 0:
            self._poll.register(pidfd, select.POLLIN)

    @classmethod
    def parent(cls, pid: int) -> Companion:
        """The process that forked this one; `pid` is what it was then."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return cls(pid, -1)
        if os.getppid() != pid:
            # It has ended, and perhaps another one has its number.
            os.close(pidfd)
            return cls(pid, -1)
        return cls(pid, pidfd)

    def is_gone(self, wait_s: float = 0.0) -> bool:
        """Whether it has ended; waits for that at most so long."""
        return self.pidfd < 0 or bool(self._poll.poll(wait_s * 1000))

    def kill(self) -> None:
        """SIGKILL, to it and no later process."""
        if not self.is_gone():
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Forget it."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def fork() -> Companion | None:
    """fork(2) with one table of descriptors for both; None in the new process. Raises OSError.

    Only for a process with one thread. SIGCHLD has to be ignored: nobody waits for the child.
    """
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_FILES | _CLONE_PIDFD | signal.SIGCHLD
    # What os.fork does around the system call (CPython: Modules/posixmodule.c, os_fork_impl).
    _python.PyOS_BeforeFork()
    pid: int = _python.syscall(_SYS_CLONE, flags, 0, ctypes.byref(pidfd), 0, 0)
    if pid == 0:
        _python.PyOS_AfterFork_Child()
        return None
    _python.PyOS_AfterFork_Parent()
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"clone: {os.strerror(number)}")
    return Companion(pid, pidfd.value)


def enter_role(state: PagerState, role: str) -> None:
    """Tell everybody that this process is the keeper, or the worker."""
    pid = os.getpid()
    ticks = start_ticks(pid) or 0
    if role == "keeper":
        state.keeper, state.keeper_ticks = pid, ticks
    else:
        state.worker, state.worker_ticks = pid, ticks
    # proc_pid_comm(5): "pager-keeper", "pager-worker".
    _python.prctl(_PR_SET_NAME, f"pager-{role}".encode(), 0, 0, 0)


def descriptors() -> dict[int, str]:
    """What every descriptor of the table is."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            # The descriptor of this listing.
            continue
    return found


def open_userfaultfds() -> list[int]:
    """Every userfaultfd in the table."""
    return sorted(fd for fd, link in descriptors().items() if link == _USERFAULTFD)


def open_connections(common: frozenset[int]) -> list[int]:
    """Sockets in the table besides those in `common`: CRIU's connection, or none."""
    links = descriptors().items()
    return [fd for fd, link in links if link.startswith(_SOCKET) and fd not in common]


def sweep(common: frozenset[int]) -> None:
    """Close what a dead companion had open for itself. Never a userfaultfd, never a connection;
    only to be called by the one process that is left."""
    for fd, link in descriptors().items():
        if fd in common or link == _USERFAULTFD or link.startswith(_SOCKET):
            continue
        try:
            os.close(fd)
        except OSError:
            # The descriptor of the listing.
            continue
