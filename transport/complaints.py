"""How many lines about strangers go into the log: a flood must not fill a disk either.

One line for each refusal, up to so many of an address in a minute, and of all addresses together.
What was left out is counted, and the next line says how many. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from transport.door import site_of

if TYPE_CHECKING:
    from collections.abc import Callable

PERIOD_S = 60.0
OF_ONE_MAX = 20
"""A person who sets up a host wrongly sees each of his attempts."""
TOTAL_MAX = 200


class Complaints:
    """See the module. `clock`: monotonic seconds."""

    def __init__(
        self,
        *,
        of_one_max: int = OF_ONE_MAX,
        total_max: int = TOTAL_MAX,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._of_one_max = of_one_max
        self._total_max = total_max
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._begun_s = clock()
        self._said: Counter[str] = Counter()
        self._left_out = 0

    def allow(self, address: str) -> dict[str, int] | None:
        """Fields for a line about `address`; None when there is to be none."""
        site = site_of(address)
        with self._lock:
            now_s = self._clock()
            if now_s - self._begun_s >= self._period_s:
                self._begun_s = now_s
                self._said.clear()
            if self._said[site] >= self._of_one_max or self._said.total() >= self._total_max:
                self._left_out += 1
                return None
            self._said[site] += 1
            left_out, self._left_out = self._left_out, 0
        return {"left_out": left_out} if left_out else {}
