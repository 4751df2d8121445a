"""Error or loss against the training's progress: one panel a group, beside the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from largebatch.base.errors import UserError
from largebatch.reports.figures import series, style
from largebatch.reports.figures.style import Look
from largebatch.reports.selection import Group, Selection

# metric= → (what is measured in training, in validation, the y-axis)
METRICS = {
    "error": ("train_error", "val_error", "top-1 error (%)"),
    "top5": (None, "val_error_top5", "top-5 error (%)"),
    "loss": ("train_loss", "val_loss", "cross-entropy"),
}
RECOMPUTED = "val_error_recomputed"
GROUP = style.look(0)
THIN = 1.0  # points
LINE, LABELS = 0.4, 0.6  # inches that a line of the legend takes, and the labels around a panel


@dataclass(frozen=True)
class CurveOptions:
    """Quantities on the axes, and the curves that are shown.

    Attributes:
        metric: One of ``METRICS``.
        show: both, train or validation.
        x: One of :data:`largebatch.reports.figures.series.X_AXES`.
        recomputed: Whether to draw validation error with recomputed BN statistics too.
        smooth: Epochs of the trailing mean that is drawn; 1 is what was recorded.
        band: Opacity of the bands; many in one panel should be faint.

    Raises:
        UserError: a metric was not measured so.
    """

    metric: str = "error"
    show: str = "both"
    x: str = "epochs"
    recomputed: bool = False
    smooth: int = 1
    band: float = 0.18

    def __post_init__(self) -> None:
        if self.metric == "top5" and self.show == "train":
            raise UserError("metric=top5 is measured only in validation: leave show=train out.")
        if self.recomputed and (self.metric != "error" or self.show == "train"):
            raise UserError("recomputed=true is about validation error: it takes metric=error, and not show=train.")

    @property
    def measures(self) -> list[tuple[str, dict[str, Any]]]:
        """The columns to draw and how: validation bold, training thin and dashed, recomputed dotted."""
        train, validation, _ = METRICS[self.metric]
        drawn: list[tuple[str, dict[str, Any]]] = []
        if train and self.show != "validation":
            drawn.append((train, {"linestyle": (0, (4, 2)), "linewidth": THIN}))
        if self.show != "train":
            drawn.append((validation, {"linestyle": "-", "linewidth": 2.0}))
        if self.recomputed:
            drawn.append((RECOMPUTED, {"linestyle": (0, (1, 1)), "linewidth": 2.0}))
        return drawn


def draw(selection: Selection, options: CurveOptions) -> Figure:
    """Return the figure.

    Raises:
        UserError: no run has what was asked for.
    """
    for name, _ in options.measures:
        if not any(name in run.epochs for run in selection.runs):
            hint = ": they were trained without bn.recompute=true" if name == RECOMPUTED else ""
            raise UserError(f"None of these runs has {name}{hint}.")
    names = series.names(selection)
    others = [group for group in selection.groups if group is not selection.baseline] or list(selection.groups)
    columns = len(others) if len(others) <= 3 else {4: 2, 6: 3}.get(len(others), 4)
    rows = math.ceil(len(others) / columns)
    width, height = (4.6, 3.7) if columns <= 3 else (3.35, 2.75)
    figure = style.blank(columns * width, rows * height + 0.4)
    # The panels have equal axes, but do not share them: matplotlib would take a time that grows with their square.
    panels = figure.subplots(rows, columns, squeeze=False)
    lowest, highest = limits(selection.groups, options)
    lines = sum(max(1 + _final(group).count("\n") for group in part) for part in (selection.groups[:1], others))
    for number, axes in enumerate(panels.flat):
        if number >= len(others):
            axes.remove()
            continue
        draw_panel(axes, others[number], selection.baseline, options)
        axes.set_title(names[others[number].hash], fontsize=10.5 if columns <= 3 else 9.5)
        set_scale(axes, lowest, highest, options.metric, 1 + LINE * lines / (height - LABELS))
        axes.tick_params(labelleft=number % columns == 0)
        if number + columns >= len(others):
            axes.set_xlabel(series.X_AXES[options.x])
    figure.supylabel(METRICS[options.metric][2], fontsize=11)
    _key(figure, selection, options)
    return figure


def draw_panel(axes: Axes, group: Group, baseline: Group | None, options: CurveOptions) -> None:
    """Draw one group beside the baseline, with the final error of each in the legend."""
    shown = [] if baseline is None else [(baseline, style.BASELINE, "baseline")]
    if group is not baseline:
        shown.append((group, GROUP, f"k = {group.k}"))
    handles = []
    for one, look, word in shown:
        for name, line in options.measures:
            width = line["linewidth"] * (1.4 if one is baseline else 1)  # where curves meet, both are to be seen
            draw_group(axes, one, name, look, options, linestyle=line["linestyle"], linewidth=width)
        label = f"{word}: {_final(one)}"
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, lw=2, label=label))
    shade_warmup(axes, group, options.x)
    mark_decays(axes, group, options.x)
    axes.margins(x=0)
    axes.set_xlim(left=0)
    style.grid(axes)
    axes.legend(handles=handles, loc="upper right", handlelength=1.6)


def _final(group: Group) -> str:
    """Return what the legend says of a group's error, what is not done on a line of its own."""
    return series.final(group).replace(", ", ",\n", 1)


def draw_group(
    axes: Axes, group: Group, name: str, look: Look, options: CurveOptions, tag: str = "", **line: Any
) -> None:
    """Draw one column of a group: mean and band of the finished runs, and each of the others as a thin line.

    Args:
        axes: Where.
        group: The runs.
        name: The column of the epoch lines.
        look: Its colour and marker.
        options: The x-axis, and how far curves are smoothed.
        tag: Begins the ids of what is drawn, for a page that shows and hides it.
        line: linestyle and linewidth of the mean.
    """
    curve = series.curve(group.finished, name, options.x, options.smooth)
    if curve:
        (drawn,) = axes.plot(curve.x, curve.mean, color=look.colour, gid=f"{tag}mean", **line)
        if look.marker and line["linewidth"] > THIN:
            drawn.set(marker=look.marker, markersize=4, markevery=0.1)
        if len(group.finished) > 1:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            axes.fill_between(curve.x, low, high, color=look.colour, alpha=options.band, lw=0, gid=f"{tag}band")
    for number, run in enumerate((*group.diverged, *group.unfinished)):
        lone = series.curve([run], name, options.x, options.smooth)
        if lone and len(lone.x):
            thin: dict[str, Any] = {
                "color": look.colour,
                "lw": 0.9,
                "linestyle": line["linestyle"],
                "gid": f"{tag}run{number}",
            }
            end: dict[str, Any] = {
                "marker": "x" if run.status == "diverged" else ">",
                "markevery": [-1],
                "markersize": 7,
            }
            axes.plot(lone.x, lone.mean, **thin, **end)


def mark_decays(axes: Axes, group: Group, x_axis: str) -> None:
    """Draw a dotted line at every epoch at which the group's rate decays."""
    for epoch in group.settings.get("schedule.milestones") or ():
        axes.axvline(series.at_epoch(_whole(group), epoch, x_axis), color="#888888", lw=0.8, ls=(0, (1, 2)))


def shade_warmup(axes: Axes, group: Group, x_axis: str) -> None:
    """Shade the epochs of the group's warmup, where one takes place."""
    epochs = group.settings["warmup.epochs"]
    if group.warmup != "none" and epochs:
        axes.axvspan(0, series.at_epoch(_whole(group), epochs, x_axis), color=style.SHADE, lw=0, zorder=0)


def limits(groups: Sequence[Group], options: CurveOptions) -> tuple[float, float]:
    """Return the lowest final mean above 0 and the highest value of the lines that are drawn of all groups.

    The final means are of validation where it is drawn: training may end at 0.
    """
    names = [name for name, _ in options.measures]
    means = {name: [curve.mean for curve in _means(groups, name)] for name in names}
    lone = [run for group in groups for run in (*group.diverged, *group.unfinished)]
    lines = [mean for of_name in means.values() for mean in of_name]
    lines += [run.epochs[name] for run in lone for name in names if name in run.epochs]
    values = np.concatenate(lines)
    highest = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    return min([*(float(mean[-1]) for mean in means[names[-1]] if mean[-1] > 0), highest]), highest


def set_scale(axes: Axes, lowest: float, highest: float, metric: str, headroom: float = 1.0) -> None:
    """Set the y-axis for values up to ``highest``, with room above for the legend (:func:`style.error_scale`)."""
    if metric != "loss":
        style.error_scale(axes, lowest, highest, headroom)
        return
    axes.set_yscale("log", nonpositive="clip")
    style.plain_numbers(axes)
    axes.set_ylim(lowest / 2, highest * (2 * highest / lowest) ** (headroom - 1))


def _means(groups: Sequence[Group], name: str) -> list[series.Curve]:
    curves = [series.curve(group.finished, name) for group in groups]
    return [curve for curve in curves if curve]


def _whole(group: Group) -> Sequence[Any]:
    """Return the runs of a group that tell where its epochs lie: those of full length if there are any."""
    return group.finished or group.runs[:1]


def _key(figure: Figure, selection: Selection, options: CurveOptions) -> None:
    """Say below the panels what lines and shades mean."""
    words = {"train": "training", "val": "validation"}
    handles: list[Any] = [
        Line2D([], [], color="#444444", **line, label=_word(name, words)) for name, line in options.measures
    ]
    if any(len(group.finished) > 1 for group in selection.groups):
        handles.append(Patch(color="#444444", alpha=0.25, lw=0, label="± 1 std over seeds"))
    if any(group.warmup != "none" for group in selection.groups):
        handles.append(Patch(color=style.SHADE, label="warmup"))
    if any(group.settings.get("schedule.milestones") for group in selection.groups):
        handles.append(Line2D([], [], color="#888888", lw=0.8, ls=(0, (1, 2)), label="rate decays"))
    if any(group.diverged for group in selection.groups):
        handles.append(Line2D([], [], color="#444444", lw=0.9, marker="x", label="diverged"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=2.2)


def _word(name: str, words: dict[str, str]) -> str:
    return "validation, BN recomputed" if name == RECOMPUTED else words[name.partition("_")[0]]
