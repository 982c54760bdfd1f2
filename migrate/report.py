"""The report of one migration: what it took, in parts, and what had been predicted.

Written as JSON for programs (bench, dashboards) and shown as a table. A failed migration has one as
well, with its outcome and error, and without the figures that it never got to. Knows no migration:
the coordinator tells the `ReportBuilder` what happens.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from rich.table import Table

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from migrate.core.clock_relation import ClockRelation
    from migrate.core.convergence import Decision
    from migrate.core.downtime import DowntimeParts
    from migrate.core.messages import FillDone, Versions
    from transport.sender import RoundStats

MAX_REPORT_BYTES: Final = 4 << 20
"""Of a report that is read: a thousand rounds with everything around them are a tenth of it."""
MIB: Final = 1 << 20

Outcome = Literal["done", "aborted", "in_doubt"]


class RoundReport(msgspec.Struct, frozen=True):
    """One round of pre-copy; the final delta is the last of them. bytes_raw: content before
    compression. pages travelled with content, zero_pages as a mark, unchanged_pages not at all."""

    number: int
    pages: int
    bytes_raw: int
    bytes_sent: int
    zero_pages: int
    unchanged_pages: int
    duration_ms: float


class PartsReport(msgspec.Struct, frozen=True):
    """The parts of the downtime in ms, as `core/downtime.py` defines them."""

    freeze: float
    dump: float
    final_delta: float
    rootfs: float
    restore: float
    handover: float
    resume: float


class PredictionReport(msgspec.Struct, frozen=True):
    """The prediction when nothing but the freeze was left to do: its parts in ms, and what they
    were made from (`core/prediction.py: Workload`). remaining_bytes: of memory, expected to be
    written until the freeze; rate_bytes_s: how fast they would be sent."""

    parts_ms: PartsReport
    remaining_bytes: int
    rate_bytes_s: float
    memory_bytes: int
    shared_bytes: int
    unwatched_bytes: int
    tasks: int
    threads: int
    mappings: int
    round_trip_ms: float | None
    pace: float
    busy: float


_PARTS: Final = PartsReport.__struct_fields__
_AS_THEY_ARE: Final = (
    *("memory_bytes", "shared_bytes", "unwatched_bytes", "tasks", "threads", "mappings"),
    "round_trip_ms",
)


class ClockReport(msgspec.Struct, frozen=True):
    """target clock = source clock + offset, known to ± error."""

    offset_ms: float
    error_ms: float


class ErrorReport(msgspec.Struct, frozen=True):
    """What ended the migration."""

    message: str
    host: str
    phase: str
    container_state: str
    remedy: str


class HostVersions(msgspec.Struct, frozen=True):
    """Of one host."""

    kernel: str
    criu: str
    runtime: str
    architecture: str


class ThrottleReport(msgspec.Struct, frozen=True):
    """A container that was slowed while it was copied: what it got of its processor time at the end
    (per cent), by which means, and in how many steps."""

    cpu_percent: float
    by: str
    steps: int


class Report(msgspec.Struct, frozen=True):
    """See the module. None: not known, because it did not happen or could not be measured.

    outcome: "done" (runs on the target), "aborted" (runs on the source, as before) or "in_doubt".
    downtime_ms: from unplugged on the source to running on the target. bytes_sent: written to the
    data streams, rounds and image files. fill_ms, faults: of the pager, after the downtime; half
    of the pages asked for waited fault_p50_us at most, 99 % fault_p99_us.
    stills_ms: how long the container stood still for its tracker in each round before the freeze.
    held_frames: what came for the container on the source meanwhile and was sent after it.
    """

    migration_id: str
    container: str
    runtime: str
    source: str
    target: str
    tracker: str
    restore: str
    outcome: Outcome
    rounds: tuple[RoundReport, ...]
    downtime_ms: float | None
    downtime_parts_ms: PartsReport | None
    predicted_downtime_ms: float | None
    total_ms: float
    memory_bytes: int
    bytes_sent: int
    fill_ms: float | None
    faults: int | None
    fault_p50_us: int | None = None
    fault_p99_us: int | None = None
    clock: ClockReport | None = None
    error: ErrorReport | None = None
    versions: dict[str, HostVersions] = {}
    images_bytes: int | None = None
    freeze_reason: str = ""
    warnings: tuple[str, ...] = ()
    throttle: ThrottleReport | None = None
    tracker_reason: str = ""
    stills_ms: tuple[float, ...] = ()
    held_frames: int = 0
    prediction: PredictionReport | None = None
    format: Literal[1] = 1


class CopyReport(msgspec.Struct, frozen=True):
    """A copy of a container: its name, the host that it is for, and its own addresses. error: why
    there is none."""

    name: str
    host: str
    addresses: tuple[str, ...]
    error: ErrorReport | None = None


class CloneReport(msgspec.Struct, frozen=True):
    """Copies of a container that runs on. pause_ms: how long it stood still, from unplugged to
    plugged; None if it did not. copying: all else, as of a migration whose outcome says whether the
    copies run; it has no downtime."""

    copies: tuple[CopyReport, ...]
    pause_ms: float | None
    copying: Report


def error_report(error: MigrateError) -> ErrorReport:
    """What a report says of an error."""
    return ErrorReport(error.message, error.host, error.phase, error.container_state, error.remedy)


class ReportBuilder:
    """Collects what becomes a report. `clock_ms` is monotonic; the total counts from here on."""

    def __init__(
        self,
        migration_id: str,
        container: str,
        source: str,
        target: str,
        *,
        clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._migration_id = migration_id
        self._container = container
        self._source = source
        self._target = target
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        self.runtime = ""
        self.tracker = ""
        self.tracker_reason = ""
        self.restore = ""
        self.memory_bytes = 0
        self.held_frames = 0
        self._rounds: list[RoundReport] = []
        self._images: RoundStats | None = None
        self._decision: Decision | None = None
        self._parts: DowntimeParts | None = None
        self._clocks: ClockRelation | None = None
        self._fill: FillDone | None = None
        self._versions: dict[str, HostVersions] = {}
        self._throttle: ThrottleReport | None = None
        self._warnings: list[str] = []
        self.stills_ms: list[float] = []

    def add_round(self, stats: RoundStats) -> None:
        """A round, or the final delta, is acknowledged."""
        names = RoundReport.__struct_fields__
        self._rounds.append(RoundReport(**{name: getattr(stats, name) for name in names}))

    def add_images(self, stats: RoundStats) -> None:
        """The image files are acknowledged."""
        self._images = stats

    def add_decision(self, decision: Decision) -> None:
        """The last one says why it was frozen, and what downtime was predicted then."""
        self._decision = decision

    def add_throttle(self, share: float, by: str) -> None:
        """The container was slowed once more, to this share of its processor time."""
        steps = self._throttle.steps if self._throttle else 0
        self._throttle = ThrottleReport(round(100 * share, 1), by, steps + 1)

    def add_downtime(self, parts: DowntimeParts, clocks: ClockRelation) -> None:
        """The container runs on the target."""
        self._parts = parts
        self._clocks = clocks

    def add_fill(self, fill: FillDone) -> None:
        """All memory has arrived in the container."""
        self._fill = fill

    def add_versions(self, host: str, versions: Versions) -> None:
        """What a host runs."""
        self._versions[host] = HostVersions(
            versions.kernel, versions.criu, versions.runtime, versions.architecture
        )

    def warn(self, message: str) -> None:
        """Something the user should know that stopped nothing; once each."""
        if message not in self._warnings:
            self._warnings.append(message)

    def build(self, outcome: Outcome, error: MigrateError | None = None) -> Report:
        """The report as of now."""
        parts = self._parts
        sent = sum(stats.bytes_sent for stats in self._rounds)
        return Report(
            migration_id=self._migration_id,
            container=self._container,
            runtime=self.runtime,
            source=self._source,
            target=self._target,
            tracker=self.tracker,
            restore=self.restore,
            outcome=outcome,
            rounds=tuple(self._rounds),
            downtime_ms=parts.downtime_us / 1000 if parts else None,
            downtime_parts_ms=PartsReport(**parts.as_ms()) if parts else None,
            predicted_downtime_ms=(
                round(self._decision.predicted_downtime_ms, 3) if self._decision else None
            ),
            total_ms=round(self._clock_ms() - self._started_ms, 3),
            memory_bytes=self.memory_bytes,
            bytes_sent=sent + (self._images.bytes_sent if self._images else 0),
            fill_ms=self._fill.fill_ms if self._fill else None,
            faults=self._fill.faults if self._fill else None,
            fault_p50_us=self._fill.fault_p50_us if self._fill else None,
            fault_p99_us=self._fill.fault_p99_us if self._fill else None,
            clock=(
                ClockReport(self._clocks.offset_us / 1000, self._clocks.error_us / 1000)
                if self._clocks
                else None
            ),
            error=error_report(error) if error else None,
            versions=dict(self._versions),
            images_bytes=self._images.bytes_raw if self._images else None,
            freeze_reason=self._decision.reason if self._decision else "",
            warnings=tuple(self._warnings),
            throttle=self._throttle,
            tracker_reason=self.tracker_reason,
            stills_ms=tuple(round(ms, 3) for ms in self.stills_ms),
            held_frames=self.held_frames,
            prediction=_prediction(self._decision) if self._decision else None,
        )


def _prediction(decision: Decision) -> PredictionReport:
    foreseen, workload = decision.prediction, decision.workload
    parts = {name: round(getattr(foreseen, f"{name}_ms"), 3) for name in _PARTS}
    return PredictionReport(
        parts_ms=PartsReport(**parts),
        remaining_bytes=decision.remaining_bytes,
        rate_bytes_s=round(decision.rate_bytes_s),
        pace=round(workload.pace, 3),
        busy=round(workload.busy, 3),
        **{name: getattr(workload, name) for name in _AS_THEY_ARE},
    )


def write_report(report: Report | CloneReport, path: Path) -> None:
    """Write it as JSON, readable by its owner, whole or not at all. Raises MigrateError."""
    data = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp makes the file 0600; the rename keeps that.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise MigrateError(
            f"the report cannot be written to {path}: {error}",
            remedy="the migration itself is not affected",
        ) from error


def read_report(path: Path) -> Report:
    """A report that was written before. Raises MigrateError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REPORT_BYTES + 1)
        if len(data) > MAX_REPORT_BYTES:
            raise MigrateError(f"{path} is larger than any report")
        return msgspec.json.decode(data, type=Report)
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise MigrateError(f"{path} is no report: {error}") from error


def summary_table(report: Report) -> Table:
    """What a person wants to see at the end, in two columns."""
    table = _table()
    for label, text in _summary(report):
        table.add_row(label, text)
    return table


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def clone_table(report: CloneReport) -> Table:
    """The same for copies."""
    table = _table()
    for copy in report.copies:
        text = f"{copy.name} on {copy.host} {' '.join(copy.addresses)}".rstrip()
        table.add_row("copy", f"none: {text}: {copy.error.message}" if copy.error else text)
    if report.pause_ms is not None:
        table.add_row("paused", f"the original stood still for {report.pause_ms:.0f} ms")
    for label, text in _summary(report.copying):
        table.add_row(label, text)
    return table


def _summary(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("container", f"{report.container} ({report.runtime or 'unknown runtime'})"),
        ("way", f"{report.source} → {report.target}: {report.outcome}"),
    ]
    if report.downtime_ms is not None:
        rows.append(("downtime", _downtime(report, report.downtime_ms)))
    if report.downtime_parts_ms is not None:
        parts = msgspec.structs.asdict(report.downtime_parts_ms)
        rows.append(("", "  ".join(f"{name} {ms:.0f}" for name, ms in parts.items())))
    rows.append(("total", f"{report.total_ms / 1000:.1f} s"))
    rows.append(("memory", _memory(report)))
    if report.fill_ms is not None:
        rows.append(("fill", _fill(report, report.fill_ms)))
    if report.throttle is not None:
        slowed = report.throttle
        rows.append(("throttled", f"to {slowed.cpu_percent:g} % of its CPU, by {slowed.by}"))
    if report.stills_ms:
        times, longest_ms = len(report.stills_ms), max(report.stills_ms)
        rows.append(("stilled", f"{times} times while it was copied, {longest_ms:.0f} ms at most"))
    if report.freeze_reason:
        rows.append(("frozen", report.freeze_reason))
    rows += [("warning", text) for text in report.warnings]
    if report.error is not None:
        rows.append(("error", report.error.message))
        rows.append(("remedy", report.error.remedy))
    return [row for row in rows if row[1]]


def _downtime(report: Report, downtime_ms: float) -> str:
    text = f"{downtime_ms:.0f} ms"
    if report.clock is not None:
        text += f" ± {report.clock.error_ms:.1f}"
    if report.predicted_downtime_ms is not None:
        text += f" (predicted {report.predicted_downtime_ms:.0f} ms)"
    return text


def _fill(report: Report, fill_ms: float) -> str:
    text = f"{fill_ms / 1000:.1f} s, {report.faults} pages asked for"
    if report.faults and report.fault_p50_us is not None and report.fault_p99_us is not None:
        median_ms, p99_ms = report.fault_p50_us / 1000, report.fault_p99_us / 1000
        text += f" (waiting {median_ms:.2f} ms, p99 {p99_ms:.2f} ms)"
    return text


def _memory(report: Report) -> str:
    rounds = "1 round" if len(report.rounds) == 1 else f"{len(report.rounds)} rounds"
    text = (
        f"{report.memory_bytes / MIB:.1f} MiB, {report.bytes_sent / MIB:.1f} MiB sent in {rounds}"
    )
    unchanged = sum(stats.unchanged_pages for stats in report.rounds)
    zero = sum(stats.zero_pages for stats in report.rounds)
    if unchanged or zero:
        text += f" ({unchanged} pages unchanged, {zero} zero)"
    return text
