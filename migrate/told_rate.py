"""How much a migration may send each second, where another process says so while it goes on: the
drain that it belongs to, whose moves share what one of them leaves.

    RUN/rates/ID     MiB a second, as a number
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import TYPE_CHECKING, Final

from migrate.config import BANDWIDTH_MIB_S_MIN
from transport import sealed_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Pieces are sent hundreds of times a second, shares change when a move begins or ends.
LOOK_S: Final = 0.2


def tell(path: Path, mib_s: float) -> None:
    """From now on. Raises OSError."""
    sealed_files.make_directory(path.parent)
    sealed_files.replace(path, f"{mib_s:g}".encode())


class ToldRate:
    """What the file at `path` says, in bytes a second, when it is called; while nothing useful is
    there what it said before, at first `bytes_s`. Without a path always that. From any thread."""

    def __init__(
        self, path: Path | None, bytes_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._bytes_s = bytes_s
        self._least_bytes_s = 0.0
        self._clock = clock
        self._next_s = -math.inf
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now_s = self._clock()
            if self._path is not None and now_s >= self._next_s:
                self._next_s = now_s + LOOK_S
                with contextlib.suppress(OSError, ValueError):
                    mib_s = float(sealed_files.read(self._path))
                    if BANDWIDTH_MIB_S_MIN <= mib_s < math.inf:
                        self._bytes_s = max(mib_s * (1 << 20), self._least_bytes_s)
            return self._bytes_s

    def hold(self) -> None:
        """From now on it does not fall: a downtime was predicted from it."""
        with self._lock:
            self._least_bytes_s = self._bytes_s
