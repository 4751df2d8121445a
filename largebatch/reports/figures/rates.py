"""The schedules of the learning rate that runs follow."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.base.errors import UserError
from largebatch.config.schedule import schedule_of
from largebatch.reports.figures import series, style
from largebatch.reports.figures.series import Values
from largebatch.reports.selection import Group, Selection

X_AXES = ("epochs", "iterations", "images")
POINTS = 200  # of a line, and as many of its warmup, besides the corners


def rates(group: Group, x_axis: str = "epochs") -> tuple[Values, Values] | None:
    """Return where iterations begin and their rates, to draw in steps: enough of them that no corner is cut.

    The last x is the run's end.
    """
    per_epoch = group.iterations_per_epoch
    if per_epoch is None:
        return None
    schedule = schedule_of(group.settings, per_epoch)
    last = schedule.total_iterations - 1
    corners = {at + before for at, _ in schedule.turning_points() for before in (-1, 0)}
    corners |= {*range(0, schedule.warming, per_epoch)}  # where a staircase rises
    evenly = np.concatenate([np.linspace(0, last, POINTS), np.linspace(0, schedule.warming, POINTS)])
    iterations = sorted({at for at in (*evenly.astype(int).tolist(), *corners) if 0 <= at <= last})
    unit = {"epochs": 1 / per_epoch, "iterations": 1.0, "images": float(group.minibatch)}[x_axis]
    values = [schedule.rate_at(iteration) for iteration in iterations]
    return np.array([*iterations, last + 1]) * unit, np.array([*values, values[-1]])


def draw(selection: Selection, x_axis: str) -> Figure:
    """Return the figure: a line for every schedule, with the groups that follow it.

    Raises:
        UserError: no record says how long its epochs were.
    """
    figure = style.blank(8.5, 5.0)
    axes = figure.subplots()
    lines: dict[tuple[bytes, bytes], list[Group]] = defaultdict(list)
    for group in selection.groups:
        line = rates(group, x_axis)
        if line:
            lines[line[0].tobytes(), line[1].tobytes()].append(group)
    if not lines:
        raise UserError("None of these runs has finished an epoch, and their data set's size is not in the record.")
    names = series.names(selection)
    looks = series.looks(selection)
    for groups in lines.values():
        words = names[groups[0].hash] + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")
        draw_group(axes, groups[0], looks[groups[0].hash], x_axis, words)
    set_scale(axes, x_axis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3)
    return figure


def draw_group(axes: Axes, group: Group, look: style.Look, x_axis: str, label: str, tag: str = "") -> None:
    """Draw the schedule of one group, where its record tells it."""
    line = rates(group, x_axis)
    if line:
        (drawn,) = axes.plot(
            *line, color=look.colour, linestyle=look.dashes, lw=look.width, label=label, drawstyle="steps-post"
        )
        drawn.set(marker=look.marker, markersize=4, markevery=0.12)
        drawn.set_gid(f"{tag}rate")


def set_scale(axes: Axes, x_axis: str) -> None:
    """Set the axes: rates fall by factors."""
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=series.X_AXES[x_axis], ylabel="learning rate")
    axes.margins(x=0)
    style.grid(axes)
