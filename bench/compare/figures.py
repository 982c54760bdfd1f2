"""What all plots share. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI: Final = 130


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(axes: Axes, title: str) -> None:
    """A title, a grid, no frame."""
    axes.set_title(title, loc="left")
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
