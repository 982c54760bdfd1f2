"""Draws a soak: memory, descriptors, disk and downtime over its moves. Needs matplotlib.

Memory and descriptors are drawn after every move, disk only for the host that the container has
left, since otherwise its root file system would be in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.soak_result import HOSTS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.soak_result import Outcome

INCHES: Final = (10.0, 6.4)
DPI: Final = 130
COLOURS: Final = {"A": "#1f6fb4", "B": "#d9730d"}
MIB_KIB: Final = 1024


def draw(outcome: Outcome, conditions: dict[str, Any], path: Path) -> None:
    """Write the plot; the suffix of `path` says in which format. At least one move."""
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.axisbelow": True}):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        (memory, descriptors), (disk, downtime) = figure.subplots(2, 2, sharex=True)
        _draw_memory(memory, outcome)
        _draw_descriptors(descriptors, outcome)
        _draw_disk(disk, outcome)
        _draw_downtime(downtime, outcome)
        for axes in (memory, descriptors, disk, downtime):
            axes.grid(visible=True, linewidth=0.4, alpha=0.6)
            axes.set_ylim(bottom=0)
            axes.margins(x=0.01)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, ncols=2, loc="lower right")
        for axes in (disk, downtime):
            axes.set_xlabel("migrations so far")
        figure.suptitle(_title(outcome, conditions))
        figure.savefig(path)


def _title(outcome: Outcome, conditions: dict[str, Any]) -> str:
    verdict = "flat" if outcome.is_well else "FAILED"
    return (
        f"One container, {len(outcome.moves)} migrations: {verdict}\n"
        f"{conditions['memory_mib']} MiB of memory, {conditions['dirty_mib_s']} MiB/s written,"
        f" a client with {conditions['probe_per_s']:g} requests/s on one connection;"
        f" Linux {conditions['kernel']}, {conditions['cores']} cores for all hosts"
    )


def _draw_memory(axes: Axes, outcome: Outcome) -> None:
    axes.set_title("Memory of the agent, MiB", loc="left")
    for host in HOSTS:
        for name, style, words in (("agent_rss_kib", "-", "RSS"), ("agent_uss_kib", ":", "USS")):
            moves, values = _every(outcome, host, name)
            mib = [value / MIB_KIB for value in values]
            axes.plot(moves, mib, style, color=COLOURS[host], label=f"{host}, {words}")


def _draw_descriptors(axes: Axes, outcome: Outcome) -> None:
    axes.set_title("Open descriptors and threads of the agent", loc="left")
    for host in HOSTS:
        named = (("agent_descriptors", "-", "descriptors"), ("agent_threads", ":", "threads"))
        for name, style, words in named:
            axes.step(
                *_every(outcome, host, name),
                style,
                where="post",
                color=COLOURS[host],
                label=f"{host}, {words}",
            )


def _draw_disk(axes: Axes, outcome: Outcome) -> None:
    axes.set_title("Disk, MiB", loc="left")
    named = (("state_kib", "-", "/var/lib/migrate"), ("run_kib", ":", "/run/migrate"))
    for host in HOSTS:
        for name, style, words in named:
            series = outcome.series(host, name)
            moves, values = [at for at, _ in series], [kib / MIB_KIB for _, kib in series]
            axes.plot(moves, values, style, color=COLOURS[host], label=f"{host}, {words}")


def _draw_downtime(axes: Axes, outcome: Outcome) -> None:
    axes.set_title("Downtime, and the client's longest silence, ms", loc="left")
    moves = [move.number for move in outcome.moves]
    downtimes = [move.report["downtime_ms"] for move in outcome.moves]
    axes.plot(moves, downtimes, ".", color="black", markersize=4, label="downtime")
    heard = [
        (number, gap)
        for number, gap in zip(moves, outcome.client_gaps_ms(), strict=True)
        if gap is not None
    ]
    if heard:
        axes.plot(*zip(*heard, strict=True), "x", color="#888888", markersize=3, label="silence")


def _every(outcome: Outcome, host: str, name: str) -> tuple[list[int], list[float]]:
    """A quantity of a host before the first move and after each."""
    taken = [(0, outcome.before), *((move.number, move.samples) for move in outcome.moves)]
    return [at for at, _ in taken], [getattr(samples[host], name) for _, samples in taken]
