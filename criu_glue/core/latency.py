"""How long page faults wait, counted in buckets. Pure.

    µs      0 1 2 3 4 5 6 7  8-9  10-11 12-13 14-15  16-19 …
    bucket  0 1 2 3 4 5 6 7   8     9    10    11     12   …

Four buckets for each power of two: what is said of a percentile is too much by a quarter at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

BUCKETS: Final = 92
"""Up to 16 s; whatever is longer is in the last."""


def bucket_of(us: int) -> int:
    """Where a wait of so many microseconds is counted."""
    if us < 4:
        return us
    bits = us.bit_length()
    return min((bits - 2) * 4 + (us >> (bits - 3) & 3), BUCKETS - 1)


def percentile_us(counts: Sequence[int], share: float) -> int:
    """What that share (0..1) of the waits did not exceed, by nearest rank; 0 without any."""
    wanted = math.ceil(sum(counts) * share)
    reached = 0
    for bucket, count in enumerate(counts):
        reached += count
        if count and reached >= wanted:
            return _last_us(bucket)
    return 0


def _last_us(bucket: int) -> int:
    """The longest wait of a bucket."""
    if bucket < 4:
        return bucket
    bits = bucket // 4 + 2
    return ((bucket % 4 + 5) << (bits - 3)) - 1
