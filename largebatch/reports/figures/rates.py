"""The schedules of the learning rate that runs follow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.base.errors import UserError
from largebatch.config.schedule import RateSchedule, reference_rate
from largebatch.reports.figures import series, style
from largebatch.reports.figures.series import Values
from largebatch.reports.selection import Group, Selection

X_AXES = ("epochs", "iterations", "images")
POINTS = 200  # of a line, and as many of its warmup, besides the corners


def schedule_of(settings: Mapping[str, Any], iterations_per_epoch: int) -> RateSchedule:
    """Return the schedule of an experiment, as :meth:`~largebatch.config.run.Config.rates` does of a configuration.

    Args:
        settings: What defines the experiment, under dotted keys.
        iterations_per_epoch: Whole minibatches in the training set.
    """
    base, pitfall, warmup = settings["lr.base"], settings["pitfall"], settings["warmup.name"]
    minibatch = settings["k"] * settings["n"]
    reference = reference_rate(base, minibatch, settings["lr.base_minibatch"], settings["lr.scaling"])
    scale = reference / base if pitfall == "scale_loss" else 1.0
    form = {"per_epoch_warmup": "staircase", "warmup_from_zero": "from_zero"}.get(pitfall)
    return RateSchedule(
        base=base / scale,
        reference=reference / scale,
        warmup=form if form and warmup == "gradual" else warmup,
        iterations_per_epoch=iterations_per_epoch,
        warmup_iterations=round(settings["warmup.epochs"] * iterations_per_epoch),
        decay=settings["schedule.name"],
        milestone_iterations=tuple(round(epoch * iterations_per_epoch) for epoch in settings["schedule.milestones"]),
        factor=settings["schedule.factor"],
        total_iterations=settings["epochs"] * iterations_per_epoch,
    )


def iterations_per_epoch(group: Group) -> int | None:
    """Return what the record says, or the size of the data set; None where neither does."""
    for run in group.runs:
        if run.epochs_done:
            return int(run.epochs["iteration"][0])
    images = group.settings.get("dataset.train_images")
    return images // group.minibatch if images else None


def rates(group: Group, x_axis: str = "epochs") -> tuple[Values, Values] | None:
    """Return where iterations begin and their rates, to draw in steps: enough of them that no corner is cut.

    The last x is the run's end.
    """
    per_epoch = iterations_per_epoch(group)
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
