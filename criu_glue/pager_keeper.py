"""Holds a pager's userfaultfds for it, in another process.

For the agent's supervisor: start a pager with one end of `new_connection`, call `receive` whenever
the keeper is readable, and when the pager died before "done", start one with `--resume` and a new
connection. The protocol is in pager_journal.py. Closing a keeper whose pager is dead turns what is
missing into zeros.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Final

from criu_glue.pager_journal import PACKET_BYTES_MAX, KeeperError

# Restored tasks and the children that they fork while their memory comes in.
_DESCRIPTORS_MAX: Final = 1 << 16


class PagerKeeper:
    """The keeper's side; owns the descriptors and its end of the connection."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        # Number -> (task, descriptor)
        self._held: dict[int, tuple[int, int]] = {}

    def new_connection(self, *, resume: bool = False) -> socket.socket:
        """A connection for a pager that is about to start: pass its descriptor as --keeper-fd and
        close it here. With `resume` it brings the pager everything that is held."""
        if self._connection is not None:
            self._connection.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if resume:
            for number, (task, descriptor) in self._held.items():
                data = json.dumps({"hold": number, "task": task}).encode()
                socket.send_fds(ours, [data], [descriptor])
            ours.send(json.dumps({"resume": True}).encode())
        ours.setblocking(False)
        self._connection = ours
        return theirs

    def fileno(self) -> int:
        """For select and its like; -1 without a connection."""
        return -1 if self._connection is None else self._connection.fileno()

    def held(self) -> dict[int, int]:
        """Number -> task of every address space that is held, CRIU's connection (0) included."""
        return {number: task for number, (task, _) in self._held.items()}

    def receive(self) -> bool:
        """Take what the pager sent; False when it closed the connection. Raises KeeperError."""
        while self._connection is not None:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, PACKET_BYTES_MAX, 1)
            except BlockingIOError:
                return True
            except ConnectionError:
                data = b""
            if not data:
                return False
            try:
                self._apply(json.loads(data), descriptors)
            except (ValueError, KeyError, TypeError) as error:
                raise KeeperError(f"the pager sent {data!r}") from error
        return False

    def _apply(self, message: dict[str, int], descriptors: list[int]) -> None:
        if "release" in message:
            _, descriptor = self._held.pop(message["release"])
            os.close(descriptor)
            return
        (descriptor,) = descriptors
        os.set_inheritable(descriptor, False)
        if len(self._held) >= _DESCRIPTORS_MAX:
            os.close(descriptor)
            raise KeeperError(f"the pager has more than {_DESCRIPTORS_MAX} descriptors")
        self._held[message["hold"]] = message["task"], descriptor

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for _, descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
