"""Whether something grows over many migrations. Pure.

The first quarter of a run is not judged: modules are imported, pools fill up, the journal reaches
its bound. Memory takes longer: the HTTP library keeps the last 128 addresses in each of its caches
(yarl), an agent is asked for two new ones in a session, and has a session in every second move, so
they are full after 128 moves. A run that ends before is judged by a higher limit. Over the rest the
slope is that of Theil and Sen, the median of the slopes between all
pairs of samples, which a few odd samples cannot bend. A quantity has grown when the slope is
above its limit *and* what that makes over the judged part is more than what one step of it is; the
second condition keeps a short run from being condemned by one page of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_SHARE: Final = 0.25
# Fewer moves say nothing about a slope.
JUDGED_MOVES: Final = 50
# Of a step: the judged part of a run may be shorter than a hundred moves.
JUDGED_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Limit:
    """What a quantity may grow by. `per_100`: in 100 migrations; `step`: of one sample's noise.
    `warm_moves`: how many it takes to fill up, 0 for a quarter of the run, and `warming_per_100`
    what it may grow by until then."""

    per_100: float
    step: float
    warm_moves: int = 0
    warming_per_100: float = 0.0


MEMORY_KIB: Final = Limit(per_100=1024, step=1024, warm_moves=130, warming_per_100=4096)
DISK_KIB: Final = Limit(per_100=64, step=64)
COUNT: Final = Limit(per_100=0.5, step=0.5)

LIMITS: Final[dict[str, Limit]] = {
    "agent_rss_kib": MEMORY_KIB,
    "agent_uss_kib": MEMORY_KIB,
    "agent_threads": COUNT,
    "agent_descriptors": COUNT,
    "journal_kib": DISK_KIB,
    "state_kib": DISK_KIB,
    "run_kib": DISK_KIB,
    "processes": COUNT,
    "mounts": COUNT,
    "netns": COUNT,
    "cgroups": COUNT,
}
"""By the names of `soak_samples.Sample`. The agent's log is not judged: it is standard error, and
belongs to whoever started the agent."""


@dataclass(frozen=True, slots=True)
class Trend:
    """One quantity of one host over a run."""

    host: str
    name: str
    first: float
    median: float
    last: float
    per_100: float
    has_grown: bool


def trend(host: str, name: str, series: Sequence[tuple[int, float]]) -> Trend:
    """Judge a series of (migrations so far, value), in their order; at least one.

    A series with fewer than three samples after the warm part is too short to have grown.
    """
    values = [value for _, value in series]
    limit = LIMITS[name]
    warm, per_100 = series[int(len(series) * WARM_SHARE) :], limit.per_100
    if limit.warm_moves and series[-1][0] >= limit.warm_moves + JUDGED_MOVES:
        warm = [point for point in series if point[0] >= limit.warm_moves]
    elif limit.warm_moves:
        per_100 = limit.warming_per_100
    slope = slope_of(warm) if len(warm) >= 3 else 0.0
    rise = slope * (warm[-1][0] - warm[0][0]) if warm else 0.0
    return Trend(
        host=host,
        name=name,
        first=values[0],
        median=median(values),
        last=values[-1],
        per_100=slope * 100,
        has_grown=slope * 100 > per_100 and rise > limit.step * JUDGED_SHARE,
    )


def slope_of(series: Sequence[tuple[int, float]]) -> float:
    """The median of the slopes between all pairs of points with different abscissae."""
    slopes = [
        (later - earlier) / (at - since)
        for (since, earlier), (at, later) in combinations(series, 2)
        if at != since
    ]
    return median(slopes) if slopes else 0.0
