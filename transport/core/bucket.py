"""How many bytes may leave, and when, so that together they keep to a rate. Pure: no clock.

    wait_s = bucket.take(131072, now_s)     before they are written; then wait so long

Who takes is let through at once while nobody else has taken ahead of it, and the next one waits as
long as that takes at this rate. An idle time is made up for by BURST_S of the rate at most, so in
any T seconds no more leaves than in T + BURST_S at that rate, and one piece.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.05


class Bucket:
    """bytes_s: the rate; infinite for none."""

    def __init__(self, bytes_s: float) -> None:
        if not bytes_s > 0:
            raise ValueError(f"{bytes_s} bytes a second are no rate")
        self._bytes_s = bytes_s
        self._free_s = float("-inf")

    def take(self, count: int, now_s: float) -> float:
        """The seconds to wait until these may leave. `now_s` never falls."""
        begin_s = max(self._free_s, now_s - BURST_S)
        self._free_s = begin_s + count / self._bytes_s
        return max(begin_s - now_s, 0.0)
