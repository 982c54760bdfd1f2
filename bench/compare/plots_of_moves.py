"""Draws single moves, of each kind the one whose client waited as long as the median. Needs
matplotlib.

Times are since the command began. Where a thing was is known from what `migrate --json` had told by
then; how long it took, from the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.compare.cases import LAZY, UNSHAPED
from bench.compare.figures import finish, new_figure
from bench.compare.tables import by_case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.compare.run import Row
    from bench.compare.tables import Results
    from bench.compare.throughput import Curve

MIB: Final = 1 << 20
# Matplotlib has so many before it begins anew.
COLORS: Final = 10
TIMELINE: Final = "timeline.png"
ROUNDS: Final = "rounds.png"
GAPS: Final = "gaps.png"
THROUGHPUT: Final = "throughput.png"
_GREY: Final = "#9a9a9a"
_LANE: Final = "#4a6f94"


def typical(results: Results) -> list[Row]:
    """Of each case the move of ours with the median gap, in the order of the file."""
    found = []
    for systems in by_case(results.rows).values():
        told = [one for one in systems.get(LAZY.name, ()) if one.outcome == "done"]
        moves = sorted(
            (one for one in told if one.facts.get("told")), key=lambda one: one.client_gap_ms or 0.0
        )
        if moves:
            found.append(moves[(len(moves) - 1) // 2])
    return found


def draw_moves(results: Results, directory: Path) -> None:
    """All plots, into files of these names; none where nothing was told."""
    moves = typical(results)
    if not moves:
        return
    largest = max(
        moves, key=lambda one: (one.workload == "memory", one.memory_mib <= 1024, one.memory_mib)
    )
    draw_timeline(largest, directory / TIMELINE)
    draw_rounds(moves, directory / ROUNDS)
    draw_gaps(results, directory / GAPS)
    draw_throughput([one for one in moves if one.curve], directory / THROUGHPUT)


def draw_timeline(row: Row, path: Path) -> None:
    """One move: all of it above, the standstill below."""
    figure = new_figure(8.5, 5.0)
    whole, close = figure.subplots(2, 1, height_ratios=(3, 2))
    at_ms = {name: ms for ms, name in row.facts["told"]}
    _draw_whole(whole, row, at_ms)
    finish(whole, f"One move: {row.workload} of {row.memory_mib} MiB, {row.dirty_mib_s} MiB/s")
    whole.set_xlabel("s since the command began")
    left_ms = 0.0
    for name, took_ms in row.parts_ms.items():
        close.barh(["stands still"], [took_ms], left=left_ms, label=name)
        left_ms += took_ms
    begun_ms = (row.gap_at_ms or at_ms["freeze"]) - at_ms["freeze"]
    for label, waited_ms in (
        ("a client waits", row.client_gap_ms),
        ("by datagrams", row.udp_gap_ms),
    ):
        if waited_ms is not None:
            close.barh([label], [waited_ms], left=begun_ms, color=_GREY)
    close.invert_yaxis()
    close.set_xlabel("ms since the freeze began")
    finish(close, "The standstill")
    close.legend(
        frameon=False, ncols=7, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.35)
    )
    figure.savefig(path)


def _draw_whole(axes: Axes, row: Row, at_ms: dict[str, float]) -> None:
    """One lane for each kind of thing, in s."""
    told = row.facts["told"]
    ended_ms = [ms for ms, name in told if name == "round"]
    rounds = [
        (end - one["duration_ms"], one["duration_ms"])
        for end, one in zip(ended_ms, row.facts["rounds"], strict=False)
    ]
    lanes: dict[str, list[tuple[float, float]]] = {
        "preflight, connecting": [(0.0, at_ms["rootfs"])],
        "rounds": rounds,
        "target prepares, rounds go on": [(at_ms["prepare"], at_ms["freeze"] - at_ms["prepare"])],
        "stands still": [(at_ms["freeze"], row.facts["downtime_ms"])],
        "rest of memory": [(at_ms["filled"] - row.facts["fill_ms"], row.facts["fill_ms"])],
        "a client waits": [(row.gap_at_ms or at_ms["freeze"], row.client_gap_ms or 0.0)],
    }
    for lane, spans in lanes.items():
        for nth, (begun_ms, took_ms) in enumerate(spans):
            shade = 1.0 if nth % 2 == 0 else 0.6
            left_s, took_s = begun_ms / 1000, took_ms / 1000
            axes.barh([lane], [took_s], left=left_s, color=_LANE, alpha=shade)
    axes.invert_yaxis()


def draw_rounds(moves: list[Row], path: Path) -> None:
    """What each round sent; the last one is sent while the container stands still."""
    figure = new_figure(8.5, 4.0)
    axes = figure.subplots()
    for nth, row in enumerate(one for one in moves if one.link == UNSHAPED.name):
        sent_mib = [one["bytes_sent"] / MIB for one in row.facts["rounds"]]
        label = f"{row.workload} {row.memory_mib} MiB, {row.dirty_mib_s} MiB/s, {row.link}"
        numbers, style = range(1, len(sent_mib) + 1), "-" if nth < COLORS else "--"
        (line,) = axes.plot(numbers, sent_mib, style, marker=".", label=label)
        axes.plot([len(sent_mib)], sent_mib[-1:], "o", color=line.get_color())
    axes.set(yscale="log", xlabel="round", ylabel="sent, MiB")
    finish(axes, "What each round sends; the last, in the standstill, has a large dot")
    figure.legend(frameon=False, loc="outside right center", fontsize=7)
    figure.savefig(path)


def draw_gaps(results: Results, path: Path) -> None:
    """Each move of ours, as four have seen it."""
    seen: dict[str, Callable[[Row], float | None]] = {
        "downtime, by the report": lambda one: one.facts.get("downtime_ms"),
        "the container's own clock": lambda one: one.still_ms,
        "client by datagrams": lambda one: one.udp_gap_ms,
        "client by TCP": lambda one: one.client_gap_ms,
    }
    cases = {
        case: [one for one in systems.get(LAZY.name, ()) if one.outcome == "done"]
        for case, systems in by_case(results.rows).items()
    }
    shown = [case for case, rows in cases.items() if rows]
    figure = new_figure(8.5, 1.2 + 0.42 * len(shown))
    axes = figure.subplots()
    for nth, (label, value) in enumerate(seen.items()):
        points = [
            (known, place + (nth - 1.5) * 0.16)
            for place, case in enumerate(shown)
            for one in cases[case]
            if (known := value(one)) is not None
        ]
        known_ms, places = [x for x, _ in points], [y for _, y in points]
        axes.plot(known_ms, places, "o", markersize=3.5, alpha=0.75, label=label)
    axes.set_yticks(range(len(shown)), shown, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, None))
    finish(axes, "How long each move was, as four have seen it")
    figure.legend(frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)


def draw_throughput(moves: list[Row], path: Path) -> None:
    """Of loaded servers, one below the other."""
    if not moves:
        return
    figure = new_figure(8.5, 1.9 * len(moves))
    for axes, row in zip(figure.subplots(len(moves), 1, squeeze=False).flat, moves, strict=True):
        assert row.curve is not None
        _draw_curve(axes, row, row.curve)
    axes.set_xlabel("s since the command began")
    figure.savefig(path)


def _draw_curve(axes: Axes, row: Row, curve: Curve) -> None:
    at_s = [(place * curve.bin_ms - curve.begun_ms) / 1000 for place in range(len(curve.answers))]
    axes.plot(at_s, [count * 1000 / curve.bin_ms for count in curve.answers], linewidth=0.8)
    begun_ms = next(ms for ms, name in row.facts["told"] if name == "freeze")
    ended_ms = begun_ms + row.facts["downtime_ms"]
    axes.axvspan(begun_ms / 1000, ended_ms / 1000, color=_GREY, alpha=0.4, linewidth=0)
    axes.axvline(0.0, linewidth=0.8, color=_GREY)
    axes.set(ylim=(0, None), ylabel="answers/s")
    finish(axes, f"{row.workload}, {row.memory_mib} MiB; the standstill is grey")
