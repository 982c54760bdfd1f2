"""What a soak has shown: its moves, and both hosts before the first and after each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bench import soak_trend

if TYPE_CHECKING:
    from bench.probe import Report
    from bench.soak_samples import Sample
    from bench.soak_trend import Trend

HOSTS: Final = ("A", "B")


@dataclass(frozen=True, slots=True)
class Move:
    """One migration that succeeded, and both hosts after it. begun_s: on CLOCK_MONOTONIC."""

    number: int
    source: str
    target: str
    begun_s: float
    ended_s: float
    report: dict[str, Any]
    samples: dict[str, Sample]

    def as_json(self) -> dict[str, Any]:
        """A line of --out."""
        wanted = ("downtime_ms", "predicted_downtime_ms", "total_ms", "bytes_sent", "migration_id")
        return {
            "move": self.number,
            "source": self.source,
            "target": self.target,
            **{name: self.report[name] for name in wanted},
            "rounds": len(self.report["rounds"]),
            "warnings": self.report["warnings"],
            "samples": {host: asdict(one) for host, one in self.samples.items()},
        }


@dataclass(slots=True)
class Outcome:
    """What a run has shown. `failure`: why it ended before its last move, "" if it did not."""

    before: dict[str, Sample] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    client: Report | None = None
    failure: str = ""

    @property
    def trends(self) -> list[Trend]:
        """Every judged quantity of both hosts."""
        return [
            soak_trend.trend(host, name, self.series(host, name))
            for name in soak_trend.LIMITS
            for host in HOSTS
            if self.series(host, name)
        ]

    def series(self, host: str, name: str) -> list[tuple[int, float]]:
        """A quantity of a host whenever the container was on the other one, by moves so far."""
        taken = [(0, "A", self.before)] if self.before else []
        taken += [(move.number, move.target, move.samples) for move in self.moves]
        return [
            (number, getattr(samples[host], name))
            for number, runs_on, samples in taken
            if runs_on != host
        ]

    @property
    def grown(self) -> list[Trend]:
        return [trend for trend in self.trends if trend.has_grown]

    @property
    def is_well(self) -> bool:
        """Every move succeeded, nothing was lost, nothing has grown."""
        return (
            not self.failure
            and self.client is not None
            and self.client.clean
            and not self.grown
            and bool(self.moves)
        )

    def client_gaps_ms(self) -> list[float | None]:
        """The longest silence that the client heard in each move; None: none above 100 ms."""
        if self.client is None:
            return [None] * len(self.moves)
        since_s = self.client.started_monotonic_s
        gaps = [(since_s + at_ms / 1e3, gap_ms) for at_ms, gap_ms in self.client.gaps_over_100_ms]
        return [
            max((gap for at_s, gap in gaps if move.begun_s <= at_s < move.ended_s), default=None)
            for move in self.moves
        ]
