"""The soak: one container moves back and forth between two lab hosts, many times, under load.

It is a user of the product like any other. A client streams over one connection from the first move
to the last. After every move the container's memory is checked byte by byte, exactly one host must
run it, the client must have been answered again, and both hosts are measured (`soak_samples.py`).
At the end it is judged whether anything has grown (`soak_trend.py`).

A host is judged by the samples that were taken while the container was on the other one, so that
what belongs to the container is not in them. Before the first move both journals are filled to
their bound: a host that has been in service for long is what must not grow.

    --out FILE    a line of JSON for the run, for each move, and for the verdict
    --plot FILE   memory, descriptors, disk and downtime over the run

Exit code 0: every move succeeded, the client and the memory lost nothing, nothing has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.containers import ContainerSpec
from bench.soak_result import HOSTS
from bench.soak_run import PROBE_PER_S, run_soak

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.soak_result import Move, Outcome
    from bench.soak_samples import Sample

NAME: Final = "soak"
ADDRESS: Final = "10.77.0.50/24"
MIGRATIONS: Final = 20
MIGRATIONS_MAX: Final = 100_000
MEMORY_MIB: Final = 64
DIRTY_MIB_S: Final = 8
LINE_EVERY: Final = 10
"""Moves to a line of progress, where there is no terminal."""


class Follower:
    """Follows a run on the console and into the file of --out."""

    def __init__(self, migrations: int, console: Console, out: IO[str] | None) -> None:
        self._migrations = migrations
        self._console = console
        self._out = out
        self._bar = Progress(
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("two hosts come up", total=migrations)

    def __enter__(self) -> Follower:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def write(self, line: dict[str, Any]) -> None:
        """A line of --out, at once: an interrupted run has what was measured."""
        if self._out is not None:
            print(json.dumps(line), file=self._out, flush=True)

    def begun(self, before: dict[str, Sample]) -> None:
        """The lab is up and the container runs."""
        self.write({"move": 0, "samples": {host: asdict(one) for host, one in before.items()}})

    def moved(self, move: Move) -> None:
        """One migration is done and verified."""
        self.write(move.as_json())
        said = f"{move.source} → {move.target}, {move.report['downtime_ms']:.0f} ms"
        self._bar.update(self._task, advance=1, description=said)
        if not self._console.is_terminal and move.number % LINE_EVERY == 0:
            self._console.print(f"{move.number} of {self._migrations} moves: {said}")


def show(outcome: Outcome, console: Console) -> None:
    """The table and the verdict."""
    if not outcome.moves:
        console.print(f"[bold red]FAILED[/] {outcome.failure}", soft_wrap=True)
        return
    table = Table(title="While the container is on the other host", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("host")
    for heading in ("first", "median", "last", "per 100 moves"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for trend in outcome.trends:
        verdict = "[bold red]grows[/]" if trend.has_grown else "[green]flat[/]"
        values = (f"{one:.0f}" for one in (trend.first, trend.median, trend.last))
        words = title(trend.name) if trend.host == HOSTS[0] else ""
        change = f"{trend.per_100:+.1f}" if round(trend.per_100, 1) else "0"
        table.add_row(words, trend.host, *values, change, verdict)
    console.print(table)
    downtimes = sorted(move.report["downtime_ms"] for move in outcome.moves)
    console.print(
        f"moves: {len(outcome.moves)}; downtime median {quantile(downtimes, 0.5):.0f} ms,"
        f" p95 {quantile(downtimes, 0.95):.0f} ms, longest {downtimes[-1]:.0f} ms;"
        " memory verified after each",
        soft_wrap=True,
    )
    client = outcome.client
    if client is None:
        console.print("client: gave no report")
    else:
        console.print(
            f"client: {client.sent} requests, {client.received} answers,"
            f" {client.out_of_order} out of order, {client.resets} resets,"
            f" longest gap {client.gap_max_ms:.0f} ms {client.error}".rstrip(),
            soft_wrap=True,
        )
    if outcome.is_well:
        console.print("[bold green]flat, and nothing was lost[/]")
        return
    reasons = [outcome.failure] if outcome.failure else []
    reasons += [f"{title(one.name)}, of {one.host} grows" for one in outcome.grown]
    if client is None or not client.clean:
        reasons.append("the client's stream has a hole")
    console.print(f"[bold red]FAILED[/] {'; '.join(reasons)}", soft_wrap=True)


def title(name: str) -> str:
    """A quantity's name for people, with its unit."""
    words = name.replace("agent_", "agent's ").replace("_kib", ", KiB")
    return words.replace("rss", "RSS").replace("uss", "USS")


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed; `ordered` is not empty."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def conditions(spec: ContainerSpec, migrations: int) -> dict[str, Any]:
    """Under which a run was made, for --out and the plot."""
    return {
        "migrations": migrations,
        "memory_mib": spec.memory_mib,
        "dirty_mib_s": int(spec.args[0]),
        "probe_per_s": PROBE_PER_S,
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }


def main() -> int:
    """Run the soak; see the module for its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.split("\n")[0])
    parser.add_argument("--migrations", type=int, default=MIGRATIONS, metavar="N")
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB")
    parser.add_argument("--dirty-rate", type=int, default=DIRTY_MIB_S, metavar="MIB", help="in 1 s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw here, .png or .svg")
    arguments = parser.parse_args()
    if not 1 <= arguments.migrations <= MIGRATIONS_MAX:
        parser.error(f"--migrations is between 1 and {MIGRATIONS_MAX}")
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path.parent} is no directory")
    spec = ContainerSpec(
        NAME,
        "memory",
        args=(str(arguments.dirty_rate),),
        memory_mib=arguments.memory,
        address=ADDRESS,
    )
    console = Console(highlight=False)
    with ExitStack() as stack:
        out = stack.enter_context(arguments.out.open("w")) if arguments.out else None
        observer = Follower(arguments.migrations, console, out)
        observer.write({"run": conditions(spec, arguments.migrations)})
        with observer:
            outcome = run_soak(spec, arguments.migrations, observer)
        observer.write(
            {
                "verdict": "flat" if outcome.is_well else "failed",
                "failure": outcome.failure,
                "trends": [asdict(trend) for trend in outcome.trends],
                "client": None if outcome.client is None else asdict(outcome.client),
                "client_gaps_ms": outcome.client_gaps_ms(),
            }
        )
    show(outcome, console)
    if arguments.plot is not None and outcome.moves:
        # Only here: nothing but the plot needs matplotlib.
        from bench.soak_plot import draw

        draw(outcome, conditions(spec, arguments.migrations), arguments.plot)
        console.print(f"drawn: {arguments.plot}")
    return 0 if outcome.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
