"""Figures of the page: inline SVG whose groups can be shown and hidden, and the values to read off them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.reports.figures import curves, rates, scaling, series, style, throughput
from largebatch.reports.output import encode
from largebatch.reports.rows import Row
from largebatch.reports.selection import Selection

SIZE = (5.4, 3.7)  # inches: 11 pt stay readable on a phone that is as wide
MARKS = 200  # positions at most at which the values of a curve can be read
# Colours become the page's own, which has a light and a dark one of each.
THEME = {"#000000": "currentColor", style.GRID: "var(--grid)", style.SHADE: "var(--shade)", "#888888": "var(--muted)"}
THEME |= {"#444444": "var(--muted)"} | {colour: f"var(--c{number})" for number, colour in enumerate(style.COLOURS)}


@dataclass(frozen=True)
class Value:
    """Value of a group at some x: its number on the page (None: it cannot be hidden), and the value as text."""

    group: int | None
    text: str


@dataclass(frozen=True)
class Mark:
    """A position at which values can be read: x in parts of the figure's width, what it is called, the values."""

    x: float
    name: str
    values: list[Value]


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    ``top`` and ``bottom`` are those of its panel, in parts of the height from the figure's top.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    top: float
    bottom: float
    marks: list[Mark] = field(default_factory=list)

    def readings(self) -> dict[str, Any]:
        """Return what the page's script reads values from."""
        marks = [
            {"x": round(mark.x, 4), "name": mark.name, "values": [[value.group, value.text] for value in mark.values]}
            for mark in self.marks
        ]
        return {"top": round(self.top, 4), "bottom": round(self.bottom, 4), "marks": marks}


def charts(selection: Selection, rows: Sequence[Row], margin: float) -> list[Chart]:
    """Return the figures that these runs have something to show in."""
    with style.styled(**{"svg.fonttype": "none", "font.family": "sans-serif"}):
        drawn = [_curves(selection, "val_error"), _curves(selection, "train_error"), _rates(selection)]
        if any(group.errors for group in selection.groups):
            drawn.insert(0, _scaling(selection, rows, margin))
        if any(run.epochs_done for run in selection.runs):
            kinds = throughput.measured(selection, "k")
            drawn += [_throughput(kinds, "images"), _throughput(kinds, "time")]
    return [chart for chart in drawn if chart.marks]


def _panel() -> tuple[Figure, Axes]:
    """Return an empty panel on the page's own ground."""
    figure = style.blank(*SIZE)
    axes = figure.subplots()
    for ground in (figure.patch, axes.patch):
        ground.set_alpha(0)
    return figure, axes


def _curves(selection: Selection, name: str) -> Chart:
    """Draw one column of the epoch lines of all groups in one panel."""
    what = {"val_error": "Validation error", "train_error": "Training error"}[name]
    show, band = "validation" if name == "val_error" else "train", 0.18 if len(selection.groups) <= 4 else 0.08
    options = curves.CurveOptions(show=show, band=band)
    looks = series.looks(selection)
    figure, axes = _panel()
    at: dict[int, list[Value]] = {}
    for number, group in reversed(list(enumerate(selection.groups))):  # the baseline lies on top
        look = looks[group.hash]
        curves.draw_group(axes, group, name, look, options, f"g{number}:", linestyle=look.dashes, linewidth=look.width)
    for number, group in enumerate(selection.groups):
        curve = series.curve(group.finished, name)
        for epoch, mean, std in () if curve is None else zip(curve.x, curve.mean, curve.std, strict=True):
            at.setdefault(int(epoch), []).append(Value(number, _spread(float(mean), float(std))))
    curves.set_scale(axes, *curves.limits(selection.groups, options), options.metric)
    curves.mark_decays(axes, selection.baseline or selection.groups[0], "epochs")
    axes.set(xlabel="epoch", ylabel=f"{what.lower()}, top-1 (%)")
    axes.margins(x=0)
    style.grid(axes)
    caption = "Mean over the seeds, with a band of ± 1 std. Dotted: the rate decays."
    marks = [(float(epoch), f"epoch {epoch}", values) for epoch, values in sorted(at.items())]
    return _chart(name, what, caption, figure, axes, _thinned(marks))


def _scaling(selection: Selection, rows: Sequence[Row], margin: float) -> Chart:
    figure, axes = _panel()
    tags = {group.hash: f"g{number}:" for number, group in enumerate(selection.groups)}
    scaling.draw_runs(axes, selection, margin, tags)
    style.doubling_axis(axes, [group.minibatch for group in selection.groups])
    axes.set(xlabel="minibatch size kn", ylabel="final error, top-1 (%)")
    style.grid(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), fontsize=9, frameon=False)
    at: dict[int, list[Value]] = {}
    for number, row in enumerate(rows):
        verdict = row.comparison.verdict if row.comparison else None
        words = series.final(row.group) + (f", {verdict}" if verdict else "")
        at.setdefault(row.group.minibatch, []).append(Value(number, words))
    caption = "Median of a run's last five epochs, mean over the seeds ± 2 std. The grey band is the baseline's."
    marks = [(float(kn), f"kn = {kn}", values) for kn, values in sorted(at.items())]
    return _chart("scaling", "Final error against the size of the minibatch", caption, figure, axes, marks)


def _rates(selection: Selection) -> Chart:
    figure, axes = _panel()
    looks = series.looks(selection)
    at: dict[float, list[Value]] = {}
    for number, group in enumerate(selection.groups):
        rates.draw_group(axes, group, looks[group.hash], "epochs", "", f"g{number}:")
        line = rates.rates(group)
        for epoch in range(group.settings["epochs"] if line else 0):
            assert line is not None
            rate = line[1][line[0].searchsorted(epoch + 1e-9) - 1]
            at.setdefault(epoch, []).append(Value(number, f"{rate:.4g}"))
    rates.set_scale(axes, "epochs")
    marks = [(float(epoch), f"start of epoch {epoch + 1}", values) for epoch, values in sorted(at.items())]
    caption = "The rate of every iteration, as the experiments define it."
    return _chart("rates", "Learning rate", caption, figure, axes, _thinned(marks))


def _throughput(kinds: Sequence[tuple[str, Sequence[throughput.Speed]]], what: str) -> Chart:
    figure, axes = _panel()
    throughput.draw_panel(axes, kinds, what)
    title = str(axes.get_title()).capitalize()
    axes.set(title="", xlabel=throughput.X_AXES["k"], ylabel=throughput.PANELS[what])
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), fontsize=9, frameon=False)
    at: dict[int, list[Value]] = {}
    for name, points in kinds:
        for point in points:
            value = f"{point.median:,.0f} images/s" if what == "images" else f"{point.median_ms:,.3g} ms"
            at.setdefault(point.x, []).append(Value(None, f"{name}: {value}"))
    marks = [(float(k), f"k = {k}", values) for k, values in sorted(at.items())]
    return _chart(
        f"throughput-{what}",
        title,
        "Median of the runs, with bars from the slowest to the fastest.",
        figure,
        axes,
        marks,
    )


def _spread(mean: float, std: float) -> str:
    return f"{mean:.2f} %" if math.isnan(std) else f"{mean:.2f} ± {std:.2f} %"


def _thinned(marks: list[tuple[float, str, list[Value]]]) -> list[tuple[float, str, list[Value]]]:
    """Leave out marks of long runs evenly, but never the last."""
    step = math.ceil(len(marks) / MARKS) or 1
    return marks[::-1][::step][::-1]


def _chart(
    name: str, title: str, caption: str, figure: Figure, axes: Axes, marks: Sequence[tuple[float, str, list[Value]]]
) -> Chart:
    """Make a chart of a finished figure: its SVG, and where its marks come to lie."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    box = axes.get_window_extent()
    placed = [Mark(float(axes.transData.transform((x, 1.0))[0]) / width, words, values) for x, words, values in marks]
    svg = inline(encode(figure, ".svg").decode(), name)
    return Chart(name, title, caption, svg, 1 - box.y1 / height, 1 - box.y0 / height, placed)


def inline(svg: str, name: str) -> Markup:
    """Return an SVG file as an element of the page.

    Its ids begin with ``name``, so that no two figures share one; what belongs to group 3 has ``data-group="3"``;
    colours are those of the page's theme.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'\bid="(?:g(\d+):)?', lambda found: _identity(name, found[1]), element)
    element = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", element)
    element = re.sub(r"#[0-9a-f]{6}\b", lambda found: THEME.get(found[0], found[0]), element)
    return Markup(element.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def _identity(name: str, group: str | None) -> str:
    return f'id="{name}-' if group is None else f'data-group="{group}" id="{name}-g{group}-'
