"""What earlier moves by drains tell of this host's containers: how fast each writes, and for how
long it stood still.

Nothing is asked of the container: what a drain's moves have reported (`drain_moves.py`) is read. A
container that no drain of this host has moved yet is not in it.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

from migrate.core.messages import MAX_RESIDENTS
from migrate.drain_state import OF_DRAINS
from migrate.errors import MigrateError
from migrate.report import read_report
from transport.core.frames import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from migrate.config import HostPaths
    from migrate.report import Report, RoundReport

# Of moves; as many as a host may have containers. Older ones are removed.
KEPT_MAX: Final = MAX_RESIDENTS


class Past(NamedTuple):
    """Of a container's last move. dirty_bytes_s: written while it was copied, 0 if that was not
    seen. downtime_ms: None if it did not arrive, or was not moved live."""

    dirty_bytes_s: float
    downtime_ms: float | None


def read(paths: HostPaths) -> dict[str, Past]:
    """By the container's name. Blocking, a millisecond a move. Removes what is too old."""
    newest = _newest(paths.drain)
    for old in newest[KEPT_MAX:]:
        for path in (old, old.with_suffix(".log")):
            path.unlink(missing_ok=True)
    found: dict[str, Past] = {}
    for path in newest[:KEPT_MAX]:
        with contextlib.suppress(MigrateError):
            report = read_report(path)
            if report.container not in found and report.rounds:
                found[report.container] = _past(report)
    return found


def _newest(directory: Path) -> list[Path]:
    """Reports, the latest first. One that is removed meanwhile is none."""
    at_ns: dict[Path, int] = {}
    for path in directory.glob("*.json"):
        if path.name not in OF_DRAINS:
            with contextlib.suppress(FileNotFoundError):
                at_ns[path] = path.stat().st_mtime_ns
    return sorted(at_ns, key=lambda path: at_ns[path], reverse=True)


def _past(report: Report) -> Past:
    is_live = report.outcome == "done" and report.tracker != "none"
    return Past(dirty_bytes_s(report.rounds), report.downtime_ms if is_live else None)


def dirty_bytes_s(rounds: Sequence[RoundReport]) -> float:
    """What was written during a round travels in the next one."""
    pairs = list(itertools.pairwise(rounds))
    seconds = sum(former.duration_ms for former, _ in pairs) / 1000
    pages = sum(later.pages + later.zero_pages for _, later in pairs)
    return pages * PAGE_BYTES / seconds if seconds > 0 else 0.0
