"""What all streams of a transfer may send together, by the clock (`core/bucket.py` has the sum)."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from transport.core.bucket import Bucket
from transport.errors import AbortedError

if TYPE_CHECKING:
    from collections.abc import Callable


def unlimited() -> float:
    """A rate."""
    return float("inf")


class Pace:
    """From any thread. rate: bytes a second, asked before each piece, one question at a time.
    `stopped` ends every wait."""

    def __init__(
        self,
        rate: Callable[[], float],
        stopped: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = Bucket()
        self._rate = rate
        self._stopped = stopped
        self._clock = clock
        self._lock = threading.Lock()

    def wait_for(self, count: int) -> float:
        """Returns when so many bytes may leave: how many seconds that was to be. Raises
        AbortedError."""
        with self._lock:
            wait_s = self._bucket.take(count, self._clock(), self._rate())
        if wait_s and self._stopped.wait(wait_s):
            raise AbortedError("the transfer was aborted")
        return wait_s
