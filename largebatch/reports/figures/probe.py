"""Draw probes: drift against the small steps, noise scale and sharpness against the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from largebatch.base.errors import UserError
from largebatch.records.read import read_probes
from largebatch.reports.answer import LIMIT, Line, noise_scale
from largebatch.reports.figures import style
from largebatch.reports.selection import Group, Selection

DRAWN = 6  # probes whose drift is drawn
MEASURES = {
    "end_point": "‖ŵ − w‖ / ‖w − w_t‖ after k steps",
    "distance": "distance of a minibatch's gradients / length",
    "cosine": "cosine of a minibatch's gradients",
}


def draw(selection: Selection, measure: str) -> Figure:
    """Return the figure: a row of three panels for every group with a run that was probed, its first such seed.

    Args:
        selection: The runs.
        measure: What the first panel draws: end_point, distance or cosine.

    Raises:
        UserError: none of them was probed.
    """
    rows: list[tuple[Group, list[dict[str, Any]]]] = []
    for group in selection.groups:
        found = next((lines for run in group.runs if (lines := read_probes(run.directory))), None)
        if found:
            rows.append((group, found))
    if not rows:
        raise UserError("None of these runs was probed: train with probe.every=1, or see `largebatch probe --help`.")
    figure = style.blank(13.5, 4.2 * len(rows))
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for (group, lines), (drift, noise, sharp) in zip(rows, panels, strict=True):
        title = f"{group.settings['model.name']} on {group.settings['dataset.name']}: {group.label}"
        drift.set_title(title, loc="left")
        _draw_drift(drift, lines, measure)
        _draw_noise(noise, group, lines)
        _draw_sharpness(sharp, group, lines)
    return figure


def _draw_drift(axes: Axes, lines: Sequence[Line], measure: str) -> None:
    """Draw one line an epoch, from early and light to late and dark."""
    last = len(lines) - 1
    chosen = sorted({round(last * (part / (DRAWN - 1)) ** 2) for part in range(DRAWN)})  # most change is early
    first = 1 if measure == "end_point" else 2  # the second small step is the first that can have drifted
    for number, place in enumerate(chosen):
        values = [math.nan if value is None else value for value in lines[place][measure]]
        look = style.look(number)
        shade = 0.75 * (1 - number / max(1, len(chosen) - 1))
        colour = tuple(part + (1 - part) * shade for part in to_rgb(style.COLOURS[1]))
        label = f"epoch {lines[place]['epoch']:g}"
        axes.plot(range(first, first + len(values)), values, color=colour, linestyle=look.dashes, lw=1.8, label=label)
    if measure == "end_point":
        axes.axhline(LIMIT, color="black", lw=1)
    axes.set(xlabel="small steps k" if measure == "end_point" else "small step j + 1", ylabel=MEASURES[measure])
    axes.legend()
    style.grid(axes)


def _draw_noise(axes: Axes, group: Group, lines: Sequence[Line]) -> None:
    told = [line for line in lines if line["noise_trace"] is not None and line["gradient_squared"] is not None]
    points = [(line["epoch"], noise_scale([line])) for line in told]
    shown = [(epoch, scale) for epoch, scale in points if math.isfinite(scale) and scale > 0]
    look = style.look(1)
    axes.plot(*zip(*shown, strict=True) if shown else ([], []), color=look.colour, marker=look.marker)
    axes.axhline(group.minibatch, color="black", lw=1, label=f"kn = {group.minibatch}")
    if shown:
        axes.set_yscale("log")
        style.plain_numbers(axes)
    hidden = [epoch for epoch, scale in points if not math.isfinite(scale)]
    across = axes.get_xaxis_transform()  # x in data, y in parts of the panel
    axes.plot(hidden, [0.97] * len(hidden), "x", color="#444444", transform=across, label="|G|² hidden by noise")
    _shade_warmup(axes, group)
    axes.set(xlabel="epoch", ylabel="noise scale tr Σ / |G|² (samples)")
    axes.legend()
    style.grid(axes)


def _draw_sharpness(axes: Axes, group: Group, lines: Sequence[Line]) -> None:
    look = style.look(0)
    points = [(line["epoch"], line["rate_times_sharpness"]) for line in lines if line["rate_times_sharpness"]]
    axes.plot(
        *zip(*points, strict=True) if points else ([], []), color=look.colour, marker=look.marker, label="kη λ_max"
    )
    bound = lines[0]["stability_bound"]
    axes.axhline(bound, color="black", lw=1, label=f"bound of stability, {bound:.2f}")
    if any(value > 0 for _, value in points):
        axes.set_yscale("log")
        style.plain_numbers(axes)
    _shade_warmup(axes, group)
    axes.set(xlabel="epoch", ylabel="rate × largest Hessian eigenvalue")
    axes.legend()
    style.grid(axes)


def _shade_warmup(axes: Axes, group: Group) -> None:
    if group.warmup != "none" and group.settings["warmup.epochs"]:
        axes.axvspan(0, group.settings["warmup.epochs"], color=style.SHADE, zorder=0, label="warmup")
