"""Draws what was measured. Needs matplotlib."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter

from bench.compare.cases import DIRTY_MIB_S, LAZY, UNSHAPED
from bench.compare.figures import finish, new_figure
from bench.compare.plots_of_moves import draw_moves
from bench.compare.tables import Spread, downtimes_ms, predictions

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.compare.run import Row
    from bench.compare.tables import Results

DOWNTIME: Final = "downtime.png"
PARTS: Final = "parts.png"
PREDICTED: Final = "predicted.png"


def draw(results: Results, directory: Path) -> None:
    """All plots, into files of these names."""
    with mpl.rc_context({"font.size": 9, "axes.axisbelow": True}):
        draw_downtime(results, directory / DOWNTIME)
        draw_parts(results, directory / PARTS)
        draw_predictions(results, directory / PREDICTED)
        draw_moves(results, directory)


def compared(results: Results) -> dict[str, dict[int, list[Row]]]:
    """System -> memory in MiB -> rows, of the cases in which only memory differs."""
    systems: dict[str, dict[int, list[Row]]] = {}
    for row in results.rows:
        same = (row.workload, row.dirty_mib_s, row.link) == ("memory", DIRTY_MIB_S, UNSHAPED.name)
        if same and row.outcome == "done":
            systems.setdefault(row.system, {}).setdefault(row.memory_mib, []).append(row)
    return systems


def draw_downtime(results: Results, path: Path) -> None:
    """Median and whole range of the client's gap against memory, of each system."""
    figure = new_figure(8.5, 5.0)
    axes: Axes = figure.subplots()
    systems = compared(results)
    for system, sizes in systems.items():
        spreads = {size: Spread.of(downtimes_ms(rows)) for size, rows in sorted(sizes.items())}
        medians = [one.median for one in spreads.values()]
        below = [one.median - one.least for one in spreads.values()]
        above = [one.greatest - one.median for one in spreads.values()]
        is_ours = system == LAZY.name
        axes.errorbar(
            list(spreads),
            medians,
            yerr=(below, above),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=2.4 if is_ours else 1.1,
            label=f"{system} (n={min(one.n for one in spreads.values())})",
        )
    axes.set(xscale="log", yscale="log", ylabel="the client's longest gap, ms")
    axes.set_xlabel(f"memory of the container, MiB ({DIRTY_MIB_S} MiB/s written)")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
    axes.set_xticks(sorted({size for sizes in systems.values() for size in sizes}))
    axes.minorticks_off()
    finish(axes, "How long a client waits: median, and the whole range")
    axes.legend(frameon=False)
    figure.savefig(path)


def draw_parts(results: Results, path: Path) -> None:
    """What our downtime consists of, by memory: medians."""
    figure = new_figure(8.5, 3.2)
    axes = figure.subplots()
    sizes = sorted(compared(results).get(LAZY.name, {}).items())
    names = list(sizes[0][1][0].parts_ms) if sizes else []
    lefts = [0.0] * len(sizes)
    for name in names:
        widths = [statistics.median(row.parts_ms[name] for row in rows) for _, rows in sizes]
        axes.barh([f"{size} MiB" for size, _ in sizes], widths, left=lefts, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_xlabel("ms, from unplugged on the source to running on the target (medians)")
    finish(axes, "What the downtime consists of")
    axes.legend(
        frameon=False, ncols=len(names) or 1, loc="upper center", bbox_to_anchor=(0.5, -0.25)
    )
    figure.savefig(path)


def draw_predictions(results: Results, path: Path) -> None:
    """Each move, by what had been predicted of it."""
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    pairs = predictions(results.rows)
    values = [value for pair in pairs for value in pair] or [1.0]
    ends = [min(values) / 1.1, max(values) * 1.1]
    axes.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], alpha=0.12)
    axes.plot(ends, ends, linewidth=0.8, color="#888888")
    axes.plot([was for _, was in pairs], [said for said, _ in pairs], "o", markersize=4)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.minorticks_off()
    ticks = [tick for tick in (100, 200, 500, 1000, 2000, 5000) if ends[0] <= tick <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="measured downtime, ms", ylabel="predicted, ms")
    finish(axes, "Predicted downtime; the band is ± 25 %")
    figure.savefig(path)
