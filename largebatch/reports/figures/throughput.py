"""Images a second and time an iteration, against the number of workers or of processes."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable
from largebatch.records.check import flat
from largebatch.records.runs import Run
from largebatch.reports.figures import style
from largebatch.reports.selection import Selection

X_AXES = {"k": "workers k", "processes": "processes"}
# What does not change the work of an iteration, or is on the x-axis.
WITHOUT_EFFECT = ("k", "warmup.", "schedule.", "lr.", "epochs", "pitfall", "bn.", "optimizer.")


@dataclass(frozen=True)
class Speed:
    """Speed of the runs of one kind: images/s of each, its median over the epochs.

    ``minibatch`` is in samples, ``processes`` their number.
    """

    x: int
    minibatch: int
    processes: int
    images_per_second: tuple[float, ...]

    @property
    def median(self) -> float:
        """Images/s, median over the runs."""
        return statistics.median(self.images_per_second)

    @property
    def median_ms(self) -> float:
        """Time of an iteration in ms, median over the runs."""
        return statistics.median(self.iteration_ms)

    @property
    def iteration_ms(self) -> tuple[float, ...]:
        """Time of an iteration of each run, in ms."""
        return tuple(1000 * self.minibatch / rate for rate in self.images_per_second)


def measured(selection: Selection, x: str) -> list[tuple[str, list[Speed]]]:
    """Return what was measured, by rising x, under the name of what else decides the speed.

    Raises:
        UserError: no run finished an epoch.
    """
    found: dict[tuple[str, str], dict[tuple[int, int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, str] = {}
    # The same run on more processes is no further seed, but a further speed.
    for run in (run for group in selection.groups for run in (*group.runs, *group.duplicates)):
        speed = run.images_per_second
        if speed:
            k, n, processes = run.experiment["k"], run.experiment["n"], len(_devices(run))
            work = _work(run)
            names[work] = f"{run.experiment['model']['name']} on {run.experiment['dataset']['name']}, n = {n}"
            found[work, _place(run, x)][k if x == "k" else processes, k * n, processes].append(speed)
    if not found:
        raise UserError("None of these runs has finished an epoch, so there is no speed to draw.")
    return [
        (
            f"{names[work]}, {place}" if len(names) > 1 else place,
            [Speed(*key, tuple(speeds)) for key, speeds in sorted(points.items())],
        )
        for (work, place), points in found.items()
    ]


def ideal(points: Sequence[Speed]) -> list[float]:
    """Return the images/s that the first point's would be if only the number of processes counted."""
    first = points[0]
    return [first.median * point.processes / first.processes for point in points]


PANELS = {"images": "images a second", "time": "time an iteration (ms)"}


def draw(selection: Selection, x: str, predicted: Callable[[Speed], float] | None = None) -> Figure:
    """Return the figure: images/s left, time of an iteration right, and dotted what ideal scaling would be.

    Args:
        selection: The runs.
        x: One of ``X_AXES``.
        predicted: The seconds of an iteration that a model tells for a point; drawn as crosses.
    """
    figure = style.blank(10.5, 4.8)
    kinds = measured(selection, x)
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, PANELS, strict=True):
        draw_panel(axes, kinds, what)
        axes.set_xlabel(X_AXES[x])
        if predicted:
            points = [point for _, points in kinds for point in points]
            seconds = [predicted(point) for point in points]
            told = [s * 1000 if what == "time" else p.minibatch / s for p, s in zip(points, seconds, strict=True)]
            axes.plot(
                [point.x for point in points], told, "x", color="black", ms=9, mew=1.6, zorder=5, label="predicted"
            )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_panel(axes: Axes, kinds: Sequence[tuple[str, Sequence[Speed]]], what: str) -> None:
    """Draw one of ``PANELS``: medians with bars from the slowest run to the fastest, and dotted the ideal."""
    for number, (name, points) in enumerate(kinds):
        look = style.look(number)
        xs = [point.x for point in points]
        perfect = ideal(points)
        values: list[tuple[float, ...]] = [point.images_per_second for point in points]
        if what == "time":
            perfect = [1000 * point.minibatch / speed for point, speed in zip(points, perfect, strict=True)]
            values = [point.iteration_ms for point in points]
        middle = [statistics.median(one) for one in values]
        down = [m - min(one) for m, one in zip(middle, values, strict=True)]
        up = [max(one) - m for m, one in zip(middle, values, strict=True)]
        axes.plot(xs, perfect, color=look.colour, ls=":", lw=1.4)
        bars: dict[str, Any] = {"capsize": 3, "marker": look.marker, "ls": look.dashes, "color": look.colour}
        axes.errorbar(xs, middle, [down, up], label=name, **bars)
    axes.plot([], [], color="#444444", ls=":", lw=1.4, label="ideal: as many times the first point as processes")
    style.doubling_axis(axes, [point.x for _, points in kinds for point in points])
    axes.set_title(PANELS[what])
    style.grid(axes)
    if what == "images":
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    style.plain_numbers(axes)


def _work(run: Run) -> str:
    """Return what decides the work of an image."""
    settings = flat(run.experiment)
    kept = {key: value for key, value in settings.items() if not key.startswith(WITHOUT_EFFECT)}
    return json.dumps(kept, sort_keys=True)


def _place(run: Run, x: str) -> str:
    devices = _devices(run)
    if x == "processes":
        return f"k = {run.experiment['k']}, on {devices[0]}"
    return f"{len(devices)} process{'es' * (len(devices) > 1)} on {devices[0]}"


def _devices(run: Run) -> Sequence[str]:
    """Return the device of every process."""
    return list(map(printable, run.provenance.get("devices") or ["an unknown device"]))
