"""Style figures: readable at the size of a slide, for every kind of colour vision, and in black and white."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.borderpad": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # names of runs may hold a $
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "svg.hashsalt": "largebatch",  # the same records make the same file
}
GRID, SHADE = "#d9d9d9", "#ececec"
NOTEBOOK_DPI = 72


@dataclass(frozen=True)
class Look:
    """Line style of a group: a colour, and dashes and markers for print without colour."""

    colour: str
    dashes: Any
    marker: str
    width: float = 1.6


BASELINE = Look("#000000", "-", "", 2.4)
# After Okabe and Ito, whose colours keep apart for every kind of colour vision; those too light for a thin line on
# white are darker here. Dashes and markers come in numbers without a common factor, so that pairs repeat late.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b8559a", "#8c6d00", "#6a3d9a")
DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def look(number: int) -> Look:
    """Return the look of the group of this number, the baseline not counted."""
    return Look(COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """Draw and save in our style within this block."""
    with matplotlib.rc_context(STYLE | more):
        yield


class ShownFigure(Figure):
    """A figure that a notebook shows where it is the value of a cell; pyplot is not needed for it."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
        return buffer.getvalue()


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that makes room for its labels by itself."""
    return ShownFigure(figsize=(width, height), layout="constrained")


def grid(axes: Axes) -> None:
    """Draw the thin grid that every panel has."""
    axes.grid(color=GRID, linewidth=0.6)


def spans_much(lowest: float, highest: float) -> bool:
    """Whether errors lie so far apart that a linear axis would hide what is small."""
    return 0 < lowest < highest / 8


def error_scale(axes: Axes, lowest: float, highest: float, headroom: float = 1.0) -> None:
    """Set the axis of an error in %: logarithmic where it spans much, and then linear from ``lowest`` down to 0.

    Args:
        axes: Where the error is the y-axis.
        lowest: The lowest final error, above 0.
        highest: The highest error drawn.
        headroom: Empty space above it, for a legend: 1 is none, 2 as much as what is drawn on a linear axis.
    """
    if not spans_much(lowest, highest):
        axes.set_yticks(MaxNLocator(5).tick_values(0, min(highest, 100)))
        axes.set_ylim(0, max(highest, lowest) * headroom)
        return
    steps = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    linear_to = max(step for step in steps if step <= max(lowest, steps[0]))
    axes.set_yscale("symlog", linthresh=linear_to, linscale=0.4)
    ticks = [0, *(step for step in steps if linear_to <= step <= highest * 1.5)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, highest * (highest / linear_to) ** (headroom - 1))


def plain_numbers(axes: Axes) -> None:
    """Label a logarithmic y-axis at 1, 2, 5, 10, 20, 50 and so on, without powers."""
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")


def doubling_axis(axes: Axes, numbers: Sequence[int]) -> None:
    """Set a log-2 x-axis for these numbers, with the paper's names for sizes: 512, 1k, 2k."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(numbers))
    if len(ticks) > 12:
        ticks = [2**power for power in range(ticks[0].bit_length() - 1, ticks[-1].bit_length() + 1)]
    axes.set_xticks(ticks, [f"{number // 1024}k" if number % 1024 == 0 else str(number) for number in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(numbers) / 1.5, max(numbers) * 1.5)
