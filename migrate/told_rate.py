"""How much a migration may send each second, where another process says so while it goes on: the
drain that it belongs to, whose moves share what one of them leaves.

    RUN/rates/ID     MiB a second, as a number
"""

from __future__ import annotations

import contextlib
import math
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
    there what it said before, at first `bytes_s`. One call at a time."""

    def __init__(
        self, path: Path, bytes_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._bytes_s = bytes_s
        self._clock = clock
        self._next_s = -math.inf

    def __call__(self) -> float:
        now_s = self._clock()
        if now_s >= self._next_s:
            self._next_s = now_s + LOOK_S
            with contextlib.suppress(OSError, ValueError):
                mib_s = float(sealed_files.read(self._path))
                if BANDWIDTH_MIB_S_MIN <= mib_s < math.inf:
                    self._bytes_s = mib_s * (1 << 20)
        return self._bytes_s
