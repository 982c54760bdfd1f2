"""Rounds as a sender would report them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from migrate.core.convergence import Limits
from migrate.core.rounds_seen import PAGE_BYTES, History

MIB = 1 << 20
LIMITS = Limits(max_downtime_ms=300.0, max_rounds=30)


@dataclass(frozen=True)
class Round:
    """What a sender would report."""

    pages: int
    duration_ms: float
    zero_pages: int = 0
    unchanged_pages: int = 0
    vanished_pages: int = 0


def pages(size_bytes: float) -> int:
    """Of so many bytes."""
    return int(size_bytes / PAGE_BYTES)


def history(*rounds: tuple[float, float]) -> History:
    """From (MiB, milliseconds)."""
    return History([Round(pages(mib * MIB), ms) for mib, ms in rounds])


histories = st.lists(
    st.builds(
        Round,
        st.integers(0, 1 << 20),
        st.floats(0, 1e6),
        st.integers(0, 1 << 20),
        st.integers(0, 1 << 20),
        st.integers(0, 100),
    ),
    min_size=1,
    max_size=8,
).map(lambda rounds: History(list(rounds)))
memories = st.integers(MIB, 64 << 30)
