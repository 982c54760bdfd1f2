"""Measures downtime, ours and others'.

    python -m bench [run] [--quick] [--runs N] [--only PATTERN] [--optional] [--out FILE]
    python -m bench report [--in FILE] [--docs DIRECTORY]

`run` appends a line of JSON for each move to the file and prints it in short; `report` makes tables
and plots of the file. Both sides of every comparison are of one run. scripts/setup --bench first.
Exit code 0: whatever was measured, all of it was done or said to be impossible here.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console

from bench.compare.cases import MATRIX, QUICK
from bench.compare.run import conditions, run_case
from bench.compare.tables import ResultsError, read, render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO

    from bench.compare.run import Row
    from bench.lab.lab import Lab

RUNS: Final = 5
RUNS_MAX: Final = 1000
DOCS: Final = Path(__file__).resolve().parents[1] / "docs/bench"
RESULTS: Final = DOCS / "results.jsonl"
TITLE: Final = """\
# How long a client waits

Made by `python -m bench report` of `results.jsonl`. A container is moved between two lab hosts
while a client asks it 1,000 times a second over one TCP connection; its gap is the longest time
between two answers, over the whole move. Of a container of memory a second client asks by
datagrams, which nobody sends again, and a thread of the container looks at the clock each ms.
Medians, and p95 by nearest rank; every move's memory was verified.

![Downtime against memory](downtime.png)

![Parts of the downtime](parts.png)

![Predicted downtime](predicted.png)

![One move](timeline.png)

![What each round sends](rounds.png)

![Gaps](gaps.png)

![Throughput](throughput.png)
"""


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure; the number of what was lost or failed, as an exit code."""
    offered = [
        one for one in (QUICK if options.quick else MATRIX) if options.optional or not one.optional
    ]
    planned = [found for one in offered if (found := one.only(options.only)) is not None]
    if not planned:
        names = [f"  {one.case.label} {way.name}" for one in offered for way in one.systems]
        sys.stderr.write("\n".join([f"nothing has {options.only.pattern!r} in it:", *names, ""]))
        return 2
    bad = 0
    whole_s = sum(one.expected_s(options.runs) for one in planned)
    console.print(f"{options.runs} of each; some {whole_s / 60:.0f} minutes on a quiet machine")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("ab") as out:
        for one in planned:
            expected_s = one.expected_s(options.runs)
            console.print(f"[bold]{one.case.label}[/] some {expected_s:.0f} s")
            for row in run_case(one.case, one.systems, options.runs, _noting(out)):
                _write(out, row)
                bad += row.outcome in ("lost", "failed")
                console.print(_line(row))
    return 1 if bad else 0


def report(options: argparse.Namespace) -> int:
    """Tables and plots."""
    # Only this needs matplotlib, of the optional group `bench` in pyproject.toml.
    from bench.compare.plots import draw

    try:
        with options.results.open("rb") as lines:
            results = read(lines)
    except (OSError, ResultsError) as error:
        sys.stderr.write(f"{options.results}: {error}\n")
        return 1
    options.docs.mkdir(parents=True, exist_ok=True)
    draw(results, options.docs)
    (options.docs / "README.md").write_text(f"{TITLE}\n{render(results)}")
    return 0


def _noting(out: BinaryIO) -> Callable[[Lab], None]:
    return lambda lab: _write(out, conditions(lab))


def _write(out: BinaryIO, line: msgspec.Struct) -> None:
    """At once: an interrupted run has what was measured."""
    out.write(msgspec.json.encode(line) + b"\n")
    out.flush()


def _line(row: Row) -> str:
    if row.client_gap_ms is None:
        return f"  {row.number:3} {row.system:34} {row.outcome}: {row.why}"
    total_s = (row.total_ms or 0.0) / 1000
    return (
        f"  {row.number:3} {row.system:34} {row.outcome}: gap {row.client_gap_ms:6.0f} ms,"
        f" {total_s:5.1f} s, {row.wire_mib or 0.0:.0f} MiB {row.why}"
    )


def runs(text: str) -> int:
    """How often each."""
    if not text.isdecimal() or not 1 <= int(text) <= RUNS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {RUNS_MAX}")
    return int(text)


def pattern(text: str) -> re.Pattern[str]:
    """What to measure."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--quick", action="store_true", help="every system once, under 5 minutes")
    parser.add_argument("--optional", action="store_true", help="also what takes minutes a run")
    parser.add_argument("--runs", type=runs, metavar="N", help=f"of each; {RUNS}, or 1 if quick")
    of_both = "a regular expression in case and system"
    parser.add_argument("--only", type=pattern, default="", metavar="PATTERN", help=of_both)
    parser.add_argument("--out", type=Path, default=RESULTS, help="lines of JSON are added to it")
    parser.add_argument("--in", type=Path, default=RESULTS, dest="results", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    options.runs = options.runs or (1 if options.quick else RUNS)
    if options.what == "report":
        return report(options)
    return run(options, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
