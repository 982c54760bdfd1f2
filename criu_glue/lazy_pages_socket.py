"""The socket over which `criu restore --lazy-pages` hands out its tasks' userfaultfds.

    CRIU                                    pager
      | connect WORK/lazy-pages.socket        |  listens before CRIU starts
      | i32 task, then 1 byte + descriptor  ->|  once per task, as each of them gets that far
      | i32 -task                           ->|  a zombie: no memory, no descriptor
      | u32 0x52535446                      ->|  restore finished, tasks are about to run
      | end of file                           |

CRIU connects to the name relative to its working directory, which is its work directory, or the
image directory if it was given none. A task faults as soon as its first mapping is registered,
long before the last task has been announced. Source: criu/uffd.c (send_uffd,
lazy_pages_finish_restore, prepare_lazy_pages_socket), criu/crtools.c (chdir).

A number is received into memory that outlives the receiver, and stays there until what it says has
been taken account of: whoever goes on in the place of a receiver that died goes on behind it.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criu_glue.errors import CriuGlueError

SOCKET_NAME: Final = "lazy-pages.socket"
RESTORE_FINISHED: Final = 0x52535446

_NUMBER_BYTES: Final = 4
# Linux: PID_MAX_LIMIT. The mark for the end is above it, so the two can't be confused.
_TASK_MAX: Final = 4 << 20
_USERFAULTFD_LINK: Final = "anon_inode:[userfaultfd]"


class LazyPagesProtocolError(CriuGlueError):
    """Whoever connected does not speak CRIU's lazy-pages protocol."""


@dataclass(frozen=True, slots=True)
class TaskAnnounced:
    """A task and its userfaultfd, which now belongs to the receiver."""

    task: int
    uffd: int


@dataclass(frozen=True, slots=True)
class Zombie:
    """A task that has no memory."""

    task: int


@dataclass(frozen=True, slots=True)
class RestoreFinished:
    """All mappings are registered, and the tasks are about to run."""


@dataclass(frozen=True, slots=True)
class Ended:
    """CRIU closed the connection."""


Message = TaskAnnounced | Zombie | RestoreFinished | Ended


def listen(directory: Path) -> socket.socket:
    """Listen in CRIU's work directory; replaces what an earlier pager left. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (directory / SOCKET_NAME).unlink(missing_ok=True)
        # unix(7): a path has 107 bytes at most, which a deep directory exceeds.
        listener.bind(f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}")
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(directory_fd)
    return listener


class Received:
    """The number that is being taken account of, in memory that outlives who does so."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: four bytes, 0 at first."""
        self.memory = memory

    @property
    def number(self) -> int:
        """A task, a negated one, the mark for the end; 0 when there is none."""
        (number,) = struct.unpack("<i", self.memory)
        return int(number)

    @property
    def is_finished(self) -> bool:
        """Whether it is the mark for the end."""
        return self.number == RESTORE_FINISHED

    def settle(self) -> None:
        """It has been taken account of."""
        self.memory[:] = bytes(_NUMBER_BYTES)


class LazyPagesPeer:
    """The connection from CRIU; its descriptor is non-blocking."""

    def __init__(self, connection: socket.socket, received: Received) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._received = received

    def fileno(self) -> int:
        """For select and its like."""
        return self._connection.fileno()

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def detach(self) -> None:
        """Leave the descriptor open, and to somebody else."""
        self._connection.detach()

    def receive(self) -> Message | None:
        """The next message, or None when it is not all there yet; to be settled before the next."""
        try:
            number = self._received.number or self._receive_number()
            if not number:
                return Ended()
            if self._received.is_finished:
                return RestoreFinished()
            if not -_TASK_MAX <= number <= _TASK_MAX:
                raise LazyPagesProtocolError(f"{number} is not the number of a task")
            if number < 0:
                return Zombie(-number)
            return self._receive_descriptor(number)
        except BlockingIOError:
            return None
        except ConnectionError:
            return Ended()

    def settle(self) -> None:
        """The message has been taken account of."""
        self._received.settle()

    def _receive_number(self) -> int:
        """0 at the end of file."""
        waiting = self._connection.recv(_NUMBER_BYTES, socket.MSG_PEEK)
        if not waiting:
            return 0
        # CRIU sends it in one piece, and it arrives as one.
        if len(waiting) < _NUMBER_BYTES or waiting == bytes(_NUMBER_BYTES):
            raise LazyPagesProtocolError(f"{waiting!r} is not the number of a task")
        self._connection.recv_into(self._received.memory)
        return self._received.number

    def _receive_descriptor(self, task: int) -> Message:
        data, descriptors, _, _ = socket.recv_fds(self._connection, 1, 1)
        if not data:
            return Ended()
        if len(descriptors) != 1:
            raise LazyPagesProtocolError(f"task {task} came without a descriptor")
        uffd = descriptors[0]
        os.set_inheritable(uffd, False)
        link = str(Path(f"/proc/self/fd/{uffd}").readlink())
        if link != _USERFAULTFD_LINK:
            os.close(uffd)
            raise LazyPagesProtocolError(f"task {task} came with {link}, not a userfaultfd")
        # Reading it must never block; CRIU opens it so, and this costs a microsecond.
        os.set_blocking(uffd, False)
        return TaskAnnounced(task, uffd)
