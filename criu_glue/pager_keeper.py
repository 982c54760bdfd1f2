"""Holds the userfaultfds of a pager's worker, and starts another worker when it dies.

The keeper does nothing else, so it dies of nothing that the worker dies of, and takes a release
note at once: a userfaultfd is only gone, and its task free of it, when both have closed it. Closing
a descriptor whose worker is dead would turn what is missing into zeros. The protocol is in
pager_journal.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Final

from criu_glue.pager_journal import FAILED_EXIT, PACKET_BYTES_MAX, KeeperError

if TYPE_CHECKING:
    from collections.abc import Callable

# Restored tasks and the children that they fork while their memory comes in.
_DESCRIPTORS_MAX: Final = 1 << 16
# A worker that dies again and again dies of something in the memory or the images.
_WORKERS_MAX: Final = 10


class PagerKeeper:
    """Runs workers until one of them ends by itself.

    `start(connection descriptor)` starts a worker that has that descriptor; `restarting(count)`
    is called before each worker but the first.
    """

    def __init__(
        self,
        start: Callable[[int], subprocess.Popen[bytes]],
        restarting: Callable[[int], None],
    ) -> None:
        self._start = start
        self._restarting = restarting
        self._worker: subprocess.Popen[bytes] | None = None
        # Number -> (task, descriptor)
        self._held: dict[int, tuple[int, int]] = {}

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the worker."""
        if self._worker is not None:
            self._worker.send_signal(number)

    def run(self) -> int:
        """Returns 0 when all is filled, 1 when a worker failed and nobody is left. Raises
        KeeperError when too many died; whatever is missing then hangs on this process."""
        for count in range(_WORKERS_MAX):
            if count:
                self._restarting(count)
            code = self._run_worker()
            if code in (0, FAILED_EXIT):
                return int(code != 0)
        raise KeeperError(f"{_WORKERS_MAX} workers died, the last one with {code}")

    def _run_worker(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                self._worker = self._start(theirs.fileno())
            try:
                for number, (task, descriptor) in self._held.items():
                    data = json.dumps({"hold": number, "task": task}).encode()
                    socket.send_fds(ours, [data], [descriptor])
                ours.send(json.dumps({"begin": True}).encode())
                while self._receive(ours):
                    pass
            except OSError:
                # It died before it had read all.
                pass
            return self._worker.wait()

    def _receive(self, connection: socket.socket) -> bool:
        """Take one note from the worker; False when there will be none."""
        data, descriptors, _, _ = socket.recv_fds(connection, PACKET_BYTES_MAX, 1)
        if not data:
            return False
        try:
            message = json.loads(data)
            if "release" in message:
                _, descriptor = self._held.pop(message["release"])
                os.close(descriptor)
                return True
            (descriptor,) = descriptors
            number, task = message["hold"], message["task"]
        except (ValueError, KeyError, TypeError) as error:
            raise KeeperError(f"the worker sent {data!r}") from error
        os.set_inheritable(descriptor, False)
        if len(self._held) >= _DESCRIPTORS_MAX:
            os.close(descriptor)
        else:
            self._held[number] = task, descriptor
        return True
