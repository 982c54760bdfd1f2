"""What a pager keeps outside of itself: a journal in the page store, descriptors at the keeper.

A worker that dies must not take the memory of the tasks with it: when the last descriptor of a
userfaultfd closes, what is missing becomes zeros. So the keeper (pager_keeper.py) holds a copy of
each, and gives them to the next worker. Knows files and sockets, not what is done with the memory.

    keeper socket (UNIX, SOCK_SEQPACKET), one JSON object a packet; the keeper begins
        keeper -> worker  {"hold": number, "task": task}  + descriptor (SCM_RIGHTS), for each
        keeper -> worker  {"begin": true}
        worker -> keeper  {"hold": number, "task": task}  + descriptor
        worker -> keeper  {"release": number}
    STORE/pager.journal   see core/fill_journal.py; on the tmpfs of the store: it lives as long

What is lost: the kernel lets a task go on as soon as an event is read, so an event that a worker
has read when it is killed, and not written yet, some microseconds later, is known to nobody.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_journal import RECORD_BYTES, Kind, encode
from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL_NAME: Final = "pager.journal"
# No program gives memory up or moves it a million times while its memory comes in, and a reader
# must not be made to read without end.
JOURNAL_BYTES_MAX: Final = RECORD_BYTES << 20
PACKET_BYTES_MAX: Final = 256
# How a worker exits that failed and holds nobody's memory. Not 1: that is any Python program that
# dies of an exception, which this one does with the memory in its hands.
FAILED_EXIT: Final = 3
# The number under which the keeper has the connection from CRIU: a worker's death must not let
# CRIU's last word fail, for then CRIU kills what it restored.
CONNECTION_NUMBER: Final = 0


class KeeperError(CriuGlueError):
    """The keeper and the worker of a pager do not understand each other."""


@dataclass(slots=True)
class Counters:
    """What was done so far; bytes of memory."""

    faults: int = 0
    filled_bytes: int = 0
    # Content of zeros: left to the kernel, which gives zeros by itself.
    zero_bytes: int = 0
    # There already when the fill came: never overwritten.
    present_bytes: int = 0
    # In no mapping when the fill came, though no event said so.
    unplaced_bytes: int = 0


class Journal:
    """Gives every address space a number, and writes down what becomes of it."""

    def __init__(self, path: Path, *, number_max: int = CONNECTION_NUMBER) -> None:
        """`number_max`: the largest number that the journal at `path` knows. Raises OSError."""
        self.counters = Counters()
        self._path = path
        self._number = number_max
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd: int | None = os.open(path, flags, 0o600)

    def opened(self, task: int) -> int:
        """A restored task; returns its number."""
        return self._new(Kind.OPENED, task)

    def forked(self, parent: int) -> int:
        """A child of address space `parent`; returns its number."""
        return self._new(Kind.FORKED, parent)

    def removed(self, number: int, start: int, end: int) -> None:
        """[start, end) is unmapped or given up."""
        self._write(encode(Kind.REMOVED, number, start, end))

    def moved(self, number: int, start: int, to: int, bytes_: int) -> None:
        """[start, start + bytes_) is now at `to`."""
        self._write(encode(Kind.MOVED, number, start, to, bytes_))

    def closed(self, number: int) -> None:
        """Nothing more will be filled there."""
        self._write(encode(Kind.CLOSED, number))

    def finished(self) -> None:
        """CRIU has finished the restore."""
        self._write(encode(Kind.FINISHED, CONNECTION_NUMBER))

    def _new(self, kind: Kind, first: int) -> int:
        self._number += 1
        self._write(encode(kind, self._number, first))
        return self._number

    def _write(self, record: bytes) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, record)
        except OSError:
            # No room on the tmpfs. This worker needs no journal, and the next one must not go by
            # one that is not complete: without any it only holds what there is.
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


@dataclass(frozen=True, slots=True)
class Held:
    """A descriptor that the keeper gave back; it belongs to the receiver now."""

    number: int
    task: int
    fd: int


class Keeper:
    """The worker's side of the keeper's socket. Owns it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection

    def receive_held(self) -> list[Held]:
        """What the keeper held while there was no worker. Waits for it. Raises KeeperError."""
        found: list[Held] = []
        while self._connection is not None:
            data, descriptors, _, _ = socket.recv_fds(self._connection, PACKET_BYTES_MAX, 1)
            try:
                message = json.loads(data)
                if message.get("begin"):
                    return found
                (fd,) = descriptors
                found.append(Held(int(message["hold"]), int(message["task"]), fd))
            except (ValueError, KeyError, AttributeError) as error:
                raise KeeperError(f"the keeper sent {data!r}") from error
        raise KeeperError("the keeper is gone")

    def hold(self, number: int, task: int, fd: int) -> bool:
        """Give the keeper a copy; False when it can't have one. Never blocks."""
        return self._send({"hold": number, "task": task}, [fd])

    def release(self, number: int) -> None:
        """The keeper may close its copy."""
        self._send({"release": number}, [])

    def _send(self, message: dict[str, int], descriptors: list[int]) -> bool:
        if self._connection is None:
            return False
        data = json.dumps(message).encode()
        try:
            socket.send_fds(self._connection, [data], descriptors, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            # The keeper is gone, and with it all its copies.
            self._connection.close()
            self._connection = None
            return False
        return True
