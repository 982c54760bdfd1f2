"""How many bytes may leave, and when, so that together they keep to a rate. Pure: no clock.

    wait_s = bucket.take(131072, now_s, bytes_s)     before they are written; then wait so long

Who takes is let through at once while nobody else has taken ahead of it, and the next one waits as
long as that takes at this rate. An idle time is made up for by BURST_S of the rate at most, so in
any T seconds no more leaves than in T + BURST_S at that rate, and one piece. Each piece may have a
rate of its own.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.05


class Bucket:
    """See the module."""

    def __init__(self) -> None:
        self._free_s = float("-inf")

    def take(self, count: int, now_s: float, bytes_s: float) -> float:
        """The seconds to wait until these may leave. `now_s` never falls. bytes_s: the rate now,
        infinite for none."""
        if not bytes_s > 0:
            raise ValueError(f"{bytes_s} bytes a second are no rate")
        begin_s = max(self._free_s, now_s - BURST_S)
        self._free_s = begin_s + count / bytes_s
        return max(begin_s - now_s, 0.0)
