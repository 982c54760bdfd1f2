"""The report: its keys, how it is built, written, read and shown."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from migrate.core.clock_relation import ClockRelation
from migrate.core.convergence import Limits, decide
from migrate.core.downtime import DowntimeParts
from migrate.core.messages import FillDone, Versions
from migrate.core.prediction import Workload
from migrate.core.rounds_seen import History
from migrate.errors import MigrateError, TransferFailed, runs_on
from migrate.report import (
    MAX_REPORT_BYTES,
    Report,
    ReportBuilder,
    read_report,
    summary_table,
    write_report,
)
from transport.sender import RoundStats

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [
    "migration_id",
    "container",
    "runtime",
    "source",
    "target",
    "tracker",
    "restore",
    "outcome",
    "rounds",
    "downtime_ms",
    "downtime_parts_ms",
    "predicted_downtime_ms",
    "total_ms",
    "memory_bytes",
    "bytes_sent",
    "fill_ms",
    "faults",
]
ROUND_KEYS = [
    "number",
    "pages",
    "bytes_raw",
    "bytes_sent",
    "zero_pages",
    "unchanged_pages",
    "duration_ms",
]
PART_KEYS = ["freeze", "dump", "final_delta", "rootfs", "restore", "handover", "resume"]


@dataclass
class Clock:
    """Milliseconds that only the test moves."""

    now_ms: float = 1000.0

    def __call__(self) -> float:
        return self.now_ms


def stats(number: int, pages: int, sent: int, **more: int) -> RoundStats:
    fields = {"zero_pages": 0, "unchanged_pages": 0, "vanished_pages": 0} | more
    return RoundStats(
        number=number,
        pages=pages,
        bytes_raw=pages * 4096,
        bytes_sent=sent,
        duration_ms=12.5,
        **fields,
    )


def moved() -> Report:
    clock = Clock()
    builder = ReportBuilder("m1", "sheep", "alpha", "beta", clock_ms=clock)
    builder.runtime, builder.tracker, builder.restore = "runc", "write-protect", "lazy"
    builder.memory_bytes = 1 << 30
    builder.add_versions("alpha", Versions("6.12", "4.2.1", "1.1.15", "x86_64"))
    history = History()
    for one in (stats(1, 1000, 2_000_000, zero_pages=7), stats(2, 10, 30_000, unchanged_pages=5)):
        builder.add_round(one)
        history.add(one)
    limits = Limits(max_downtime_ms=600, max_rounds=30)
    builder.add_decision(decide(history, Workload(memory_bytes=1 << 30), limits))
    builder.add_images(stats(0, 0, 5_000))
    parts = DowntimeParts(10_000, 120_000, 20_000, 0, 105_000, 15_000, 10_700)
    builder.add_downtime(parts, ClockRelation(offset_us=-2_500, error_us=200))
    builder.add_fill(FillDone(650.0, 42, 1 << 30, 80, 1100))
    builder.warn("no swap")
    builder.warn("no swap")
    builder.stills_ms = [7.25, 12.0004]
    clock.now_ms += 4321.0
    return builder.build("done")


def aborted() -> Report:
    builder = ReportBuilder("m2", "sheep", "alpha", "beta", clock_ms=Clock())
    error = TransferFailed(
        "the link was lost",
        host="beta",
        phase="precopy",
        container_state=runs_on("alpha"),
        remedy="try again",
    )
    return builder.build("aborted", error)


def test_the_report_of_a_move() -> None:
    report = moved()
    assert (report.outcome, report.error) == ("done", None)
    assert report.total_ms == 4321.0
    assert report.bytes_sent == 2_035_000
    assert report.downtime_ms == 280.7
    assert report.downtime_parts_ms is not None
    parts = [getattr(report.downtime_parts_ms, key) for key in PART_KEYS]
    assert sum(parts) == pytest.approx(report.downtime_ms)
    assert report.prediction is not None
    foreseen = [getattr(report.prediction.parts_ms, key) for key in PART_KEYS]
    assert sum(foreseen) == pytest.approx(report.predicted_downtime_ms, abs=0.01)
    assert (report.prediction.memory_bytes, report.prediction.pace) == (1 << 30, 1.0)
    assert "600 allowed" in report.freeze_reason
    assert (report.fill_ms, report.faults) == (650.0, 42)
    assert (report.fault_p50_us, report.fault_p99_us) == (80, 1100)
    assert report.clock is not None
    assert (report.clock.offset_ms, report.clock.error_ms) == (-2.5, 0.2)
    assert report.warnings == ("no swap",)
    assert report.stills_ms == (7.25, 12.0)
    assert report.versions["alpha"].criu == "4.2.1"


def test_the_report_of_a_failure_says_what_and_where() -> None:
    report = aborted()
    assert (report.outcome, report.downtime_ms, report.rounds) == ("aborted", None, ())
    assert report.error is not None
    assert report.error.message == "the link was lost"
    assert report.error.container_state == "runs on alpha"


@pytest.mark.parametrize("report", [moved(), aborted()], ids=["done", "aborted"])
def test_the_keys_that_programs_read(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "m.json"
    write_report(report, path)
    document = json.loads(path.read_text())
    assert list(document)[: len(KEYS)] == KEYS
    for one in document["rounds"]:
        assert list(one) == ROUND_KEYS
    if document["downtime_parts_ms"] is not None:
        assert list(document["downtime_parts_ms"]) == PART_KEYS
    assert read_report(path) == report


def test_it_is_written_whole_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("an older one")
    path.chmod(0o644)
    old = os.umask(0)
    try:
        write_report(moved(), path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.mkdir()
    with pytest.raises(MigrateError, match="cannot be written"):
        write_report(moved(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for data in (b"", b"{}", b"\xff", json.dumps({"migration_id": 5}).encode()):
        path.write_bytes(data)
        with pytest.raises(MigrateError, match="no report"):
            read_report(path)
    path.write_bytes(b" " * (MAX_REPORT_BYTES + 1))
    with pytest.raises(MigrateError, match="larger than any report"):
        read_report(path)
    with pytest.raises(MigrateError, match="no report"):
        read_report(tmp_path / "missing")


def shown(report: Report) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_the_table_of_a_move() -> None:
    report = moved()
    lines = shown(report).splitlines()
    assert lines[0] == "container  sheep (runc)"
    assert lines[1] == "way        alpha → beta: done"
    foreseen = f"(predicted {report.predicted_downtime_ms:.0f} ms"
    assert lines[2].startswith(f"downtime   281 ms ± 0.2 {foreseen}")
    assert " ".join(lines[3].split()) == (
        "freeze 10 dump 120 final_delta 20 rootfs 0 restore 105 handover 15 resume 11"
    )
    assert lines[4] == "total      4.3 s"
    assert lines[5] == (
        "memory     1024.0 MiB, 1.9 MiB sent in 2 rounds (5 pages unchanged, 7 zero)"
    )
    assert lines[6] == "fill       0.7 s, 42 pages asked for (waiting 0.08 ms, p99 1.10 ms)"
    assert lines[7] == "stilled    2 times while it was copied, 12 ms at most"
    assert lines[-1] == "warning    no swap"


def test_the_table_of_a_failure() -> None:
    text = shown(aborted())
    assert "way        alpha → beta: aborted" in text
    assert "error      the link was lost" in text
    assert "remedy     try again" in text
    assert "downtime" not in text
