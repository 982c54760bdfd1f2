"""Medians and percentiles of what was measured, as Markdown. Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from bench.compare.run import Conditions, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DECODER: Final = msgspec.json.Decoder(Conditions | Row)


class ResultsError(Exception):
    """A file of results is not one."""


@dataclass(frozen=True, slots=True)
class Results:
    """The lines of one file."""

    conditions: Conditions
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of n values. p95 by nearest rank: of five, the greatest."""

    n: int
    median: float
    p95: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """At least one value."""
        ordered = sorted(values)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        return cls(len(ordered), statistics.median(ordered), p95, ordered[0], ordered[-1])


def read(lines: Iterable[bytes]) -> Results:
    """Raises ResultsError, with the line's number."""
    conditions, rows = None, []
    for number, line in enumerate(lines, 1):
        try:
            one = _DECODER.decode(line)
        except msgspec.DecodeError as error:
            raise ResultsError(f"line {number}: {error}") from error
        if isinstance(one, Row):
            rows.append(one)
        else:
            conditions = conditions or one
    if conditions is None or not rows:
        raise ResultsError("nothing was measured")
    return Results(conditions, tuple(rows))


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Case -> system -> its rows, in the order of the file."""
    cases: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cases[case_of(row)][row.system].append(row)
    return cases


def case_of(row: Row) -> str:
    """In words."""
    return f"{row.workload}, {row.memory_mib} MiB, {row.dirty_mib_s} MiB/s written, link {row.link}"


def downtimes_ms(rows: Iterable[Row]) -> list[float]:
    """What clients saw, of moves that were done."""
    return [
        row.client_gap_ms for row in rows if row.outcome == "done" and row.client_gap_ms is not None
    ]


def render(results: Results) -> str:
    """All tables."""
    now = results.conditions
    versions = ", ".join(f"{name} {version}" for name, version in now.versions.items())
    parts = [
        f"Linux {now.kernel}, {now.cores} cores for all hosts together, {now.memory_mib} MiB;"
        f" {versions}; measured on {now.at} at a load of {now.load_before:g} before.",
    ]
    for case, systems in by_case(results.rows).items():
        parts += [f"## {case}", _downtimes(systems)]
    parts += ["## What the downtime consists of", _breakdown(results.rows)]
    parts += ["## What a move takes of the hosts", _costs(results.rows)]
    parts += ["## How memory arrives after the resume", _fills(results.rows)]
    parts += ["## What had been predicted", _predictions(results.rows)]
    parts += ["## What loaded servers answer meanwhile", _throughputs(results.rows)]
    return "\n\n".join(parts) + "\n"


def _downtimes(systems: dict[str, list[Row]]) -> str:
    lines = [
        "| | n | client's gap, ms: median | p95 | min | max | by datagrams, ms |"
        " datagrams lost | late | container still, ms | whole move, s | sent, MiB | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for system, rows in systems.items():
        done = [row for row in rows if row.outcome == "done"]
        others = _others(rows)
        if not done:
            lines.append(f"| {system} | 0 | | | | | | | | | | | {others} |")
            continue
        gap = Spread.of(downtimes_ms(done))
        total_s = statistics.median(row.total_ms or 0.0 for row in done) / 1000
        wire_mib = statistics.median(row.wire_mib or 0.0 for row in done)
        lines.append(
            f"| {system} | {gap.n} | {gap.median:.0f} | {gap.p95:.0f} | {gap.least:.0f} |"
            f" {gap.greatest:.0f} | {_median(row.udp_gap_ms for row in done)} |"
            f" {_median(row.udp_lost for row in done)} | {_median(row.udp_late for row in done)} |"
            f" {_median(row.still_ms for row in done)} | {total_s:.1f} | {wire_mib:.0f} |"
            f" {others} |"
        )
    return "\n".join(lines)


def _median(values: Iterable[float | None]) -> str:
    """Of those that there are; nothing if there are none."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _others(rows: Sequence[Row]) -> str:
    """What did not come to a whole container, and why, once each."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row.outcome != "done":
            counts[row.outcome, " ".join(row.why.split()).replace("|", "/")] += 1
    return "; ".join(f"{count} {outcome}: {why}" for (outcome, why), count in counts.items())


def _breakdown(rows: Iterable[Row]) -> str:
    """Medians of the parts, of moves that say them."""
    lines = []
    for case, systems in by_case(rows).items():
        for system, of_system in systems.items():
            done = [row for row in of_system if row.outcome == "done" and row.parts_ms]
            if done:
                names = done[0].parts_ms
                said = ", ".join(
                    f"{name} {statistics.median(row.parts_ms[name] for row in done):.0f}"
                    for name in names
                )
                lines.append(f"- {case}: **{system}**: {said} ms")
    return "\n".join(lines)


def _costs(rows: Iterable[Row]) -> str:
    """Medians."""
    lines = [
        "What processes of the hosts other than the container used until the move was over:"
        " processor time, anonymous memory and files on tmpfs, the most beyond what was before.",
        "",
        "| | n | source: CPU, s | memory, MiB | files, MiB | target: CPU, s | memory, MiB |"
        " files, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, systems in by_case(rows).items():
        for system, of_system in systems.items():
            costs = [row.costs for row in of_system if row.outcome == "done" and row.costs]
            if not costs:
                continue
            cells = []
            for host in ("A", "B"):
                here = [one[host] for one in costs]
                cells += [
                    f"{statistics.median(one.cpu_s for one in here):.1f}",
                    _median(one.memory_mib for one in here),
                    _median(one.files_mib for one in here),
                ]
            lines.append(f"| {case}: {system} | {len(costs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fills(rows: Iterable[Row]) -> str:
    """Medians, of lazy restores that say how long page faults waited."""
    lines = [
        "| | n | all there after, ms | pages asked for | they waited, ms: median | p99 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case, systems in by_case(rows).items():
        for system, of_system in systems.items():
            said = [
                row.facts
                for row in of_system
                if row.outcome == "done" and row.facts.get("fault_p99_us")
            ]
            if said:
                names = ("fill_ms", "faults", "fault_p50_us", "fault_p99_us")
                fill_ms, faults, median_us, p99_us = (
                    statistics.median(one[name] for one in said) for name in names
                )
                lines.append(
                    f"| {case}: {system} | {len(said)} | {fill_ms:.0f} | {faults:.0f} |"
                    f" {median_us / 1000:.2f} | {p99_us / 1000:.2f} |"
                )
    return "\n".join(lines)


def _throughputs(rows: Iterable[Row]) -> str:
    """Medians, of moves under load."""
    lines = [
        "| | n | answers/s before | while copied | lost | 90 % again after, ms: median | p95 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    loaded = [row for row in rows if row.throughput is not None and row.outcome == "done"]
    for case, systems in by_case(loaded).items():
        for system, of_system in systems.items():
            seen = [row.throughput for row in of_system if row.throughput is not None]
            before = statistics.median(one.before_per_s for one in seen)
            during = statistics.median(one.during_per_s for one in seen)
            lost = statistics.median(1 - one.during_per_s / one.before_per_s for one in seen)
            again = Spread.of([math.inf if (x := one.recovered_ms) is None else x for one in seen])
            lines.append(
                f"| {case}: {system} | {len(seen)} | {before:.0f} | {during:.0f} | {lost:.0%} |"
                f" {again.median:.0f} | {again.p95:.0f} |"
            )
    return "\n".join(lines)


def _predictions(rows: Sequence[Row]) -> str:
    pairs = predictions(rows)
    if not pairs:
        return "No move had a prediction."
    errors = Spread.of([abs(said - was) / was * 100 for said, was in pairs])
    lines = [
        f"Of {len(pairs)} moves with pre-copy, the downtime of {_near(pairs)} was within 25 % of"
        f" what had been predicted; error: median {errors.median:.0f} %, p95 {errors.p95:.0f} %.",
        "",
        "| | n | within 25 % | predicted, ms: median | downtime, ms: median |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, systems in by_case(rows).items():
        for system, moves in systems.items():
            if of_it := predictions(moves):
                said, was = (statistics.median(each) for each in zip(*of_it, strict=True))
                lines.append(
                    f"| {case}: {system} | {len(of_it)} | {_near(of_it)} | {said:.0f} | {was:.0f} |"
                )
    return "\n".join(lines)


def _near(pairs: Iterable[tuple[float, float]]) -> int:
    """How many are within 25 %."""
    return sum(abs(said - was) <= 0.25 * was for said, was in pairs)


def predictions(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """(predicted, measured) downtime in ms, as the reports say them."""
    return [
        (row.facts["predicted_downtime_ms"], row.facts["downtime_ms"])
        for row in rows
        if row.outcome == "done" and row.facts.get("predicted_downtime_ms")
    ]
