"""What the pager tells the agent: JSON lines on a descriptor that it inherited.

    {"event": "listening"}                                   CRIU may be started
    {"event": "tasks", "count": n}                           userfaultfds held so far
    {"event": "restored"}                                    tasks are about to run, fill begins
    {"event": "fault_stats", "faults": n, "filled_bytes": n, "missing_bytes": n}   twice a second
    {"event": "done", "faults": n, "filled_bytes": n, "fill_ms": x, ...}           last line
    {"event": "error", "reason": "..."}                      of one task, or of the pager
    {"event": "holding", "count": n}                         failed; stays until n tasks are gone
    {"event": "restarted", "count": n}                       a worker died, here is another one
    {"event": "unkept", "task": n}                           the keeper has no copy of this one

The pager outlives the agent: a reader that is gone or does not read must never stop or slow it.
"""

from __future__ import annotations

import json
import os
from typing import Final

# What an agent that does not read may miss is kept up to here, then the oldest goes. A pipe
# holds another 64 KiB.
_WAITING_BYTES_MAX: Final = 1 << 20


class Progress:
    """Writes events without ever blocking; owns the descriptor."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._waiting = b""
        if fd is not None:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    def report(self, event: str, **values: int | float | str) -> None:
        """Send one event, now or with a later one."""
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        if len(self._waiting) + len(line) > _WAITING_BYTES_MAX:
            self._waiting = self._waiting[self._waiting.find(b"\n", len(line)) + 1 :]
        self._waiting += line
        self.flush()

    def flush(self) -> bool:
        """Send what waits; True when nothing does any more."""
        while self._fd is not None and self._waiting:
            try:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
            except BlockingIOError:
                return False
            except OSError:
                # The agent is gone (EPIPE). SIGPIPE is ignored by Python and by main().
                os.close(self._fd)
                self._fd = None
        return True
