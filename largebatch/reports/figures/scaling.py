"""Final error against the size of the minibatch: the paper's Figure 1, for our runs and for the published ones."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.base.numbers import mean_and_std
from largebatch.reports.figures import series, style
from largebatch.reports.paper import Table
from largebatch.reports.rows import make_rows
from largebatch.reports.selection import Group, Selection, differing
from largebatch.reports.statistics import BAND, DIVERGED, EQUIVALENT, WORSE

DODGE = 0.05  # of a doubling: rows are drawn side by side, so that their error bars do not hide one another
ROW_LOOKS = (style.look(1), style.look(0), *(style.look(number) for number in range(2, 8)))
PUBLISHED = "#5f5f5f"


def rows_of(groups: Sequence[Group]) -> list[list[Group]]:
    """Put groups that differ by their number of workers alone into a row, by rising kn.

    Where no warmup could take effect, at kη ≤ η, a group stands in the row of every warmup.
    """
    rows: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        rows[_row(group)].append(group)
    everywhere = {key: row for key, row in rows.items() if all(_cannot_warm(group) for group in row)}
    for group in groups:
        if not _cannot_warm(group):
            continue
        for row in rows.values():
            if group not in row and _row(group, warmup=False) == _row(row[0], warmup=False):
                row.append(group)
    kept = [row for key, row in rows.items() if key not in everywhere or len(rows) == len(everywhere)]
    return [sorted(row, key=lambda group: group.minibatch) for row in kept]


def _row(group: Group, warmup: bool = True) -> str:
    return json.dumps(
        {key: value for key, value in group.settings.items() if key != "k" and (warmup or not key.startswith("warmup"))}
    )


def _cannot_warm(group: Group) -> bool:
    return bool(group.reference_rate <= group.settings["lr.base"])


def largest_equivalent(row: Sequence[Group], verdicts: Mapping[str, str | None]) -> Group | None:
    """Return the largest of a row that is equivalent to the baseline, below the first that is worse or diverges.

    Args:
        row: By rising kn.
        verdicts: Of the groups that are compared, by hash.
    """
    found = None
    for group in row:
        verdict = verdicts.get(group.hash)
        if verdict in (WORSE, DIVERGED):
            break
        found = group if verdict == EQUIVALENT else found
    return found


def draw(selection: Selection | None, published: Table | None, margin: float) -> Figure:
    """Return the figure: our runs, the published points, or both.

    Runs on ImageNet share a panel with the published points; others have a panel of their own, because errors of
    another task say nothing on the same axis.

    Args:
        selection: Our runs.
        published: The paper's Figure 1.
        margin: Of equivalence, in points.
    """
    together = selection is not None and all(g.settings["dataset.name"] == "imagenet" for g in selection.groups)
    panels = 2 if selection and published and not together else 1
    figure = style.blank(6.4 * panels, 4.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    sizes: list[list[int]] = [[] for _ in axes]
    if published:
        draw_published(axes[-1], published)
        sizes[-1] += [row.kn for row in published.rows]
    if selection:
        draw_runs(axes[0], selection, margin)
        sizes[0] += [group.minibatch for group in selection.groups]
    for one, title, drawn in zip(axes, _titles(selection, published, panels), sizes, strict=True):
        one.set_title(title)
        one.set(xlabel="minibatch size kn", ylabel="top-1 validation error (%)")
        style.doubling_axis(one, drawn)
        one.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2 if len(drawn) > 1 else 1)
        style.grid(one)
    return figure


def _titles(selection: Selection | None, published: Table | None, panels: int) -> list[str]:
    ours = (
        f"{selection.groups[0].settings['model.name']} on {selection.groups[0].settings['dataset.name']}"
        if selection
        else ""
    )
    theirs = "ResNet-50 on ImageNet, published" if published else ""
    return [ours, theirs] if panels == 2 else [ours or theirs]


def draw_runs(axes: Axes, selection: Selection, margin: float, tags: Mapping[str, str] | None = None) -> None:
    """Draw our groups: a point each at its mean ± 2 std, and the baseline's as a band across.

    Args:
        axes: Where.
        selection: The runs.
        margin: Of equivalence, in points.
        tags: Begin the ids of what is drawn of a group, by its hash, for a page that shows and hides it.
    """
    baseline = selection.baseline
    verdicts = {row.group.hash: row.comparison.verdict for row in make_rows(selection, margin) if row.comparison}
    rows = rows_of(selection.groups)
    for number, (row, label) in enumerate(zip(rows, _row_labels(rows), strict=True)):
        look = ROW_LOOKS[number % len(ROW_LOOKS)]
        dodge = 2 ** (DODGE * (2 * number - len(rows) + 1))
        at = [(group, group.minibatch * (1.0 if group is baseline else dodge)) for group in row if group.errors]
        axes.plot([x for _, x in at], [_mean(group) for group, _ in at], color=look.colour, ls=look.dashes, lw=1.2)
        for group, x in at:
            if group is not baseline:
                _point(axes, group, x, look, (tags or {}).get(group.hash, ""))
        axes.plot([], [], color=look.colour, ls=look.dashes, marker=look.marker, lw=1.4, label=label)
        best = largest_equivalent(row, verdicts)
        if best is not None:
            ring: dict[str, Any] = {
                "markersize": 15,
                "markerfacecolor": "none",
                "markeredgecolor": look.colour,
                "linestyle": "none",
            }
            words = f"largest equivalent within ± {margin:g}: k = {best.k}"
            axes.plot(best.minibatch * dodge, _mean(best), "o", markeredgewidth=1.6, label=words, **ring)
        for group in row:
            if group.diverged:
                _diverged(axes, group, dodge, 0.97 - 0.07 * number, look.colour)
    if baseline is not None and baseline.errors:
        mean, std = mean_and_std(baseline.errors)
        words = f"baseline, k = {baseline.k}: {series.final(baseline)}"
        axes.axhline(mean, color="black", lw=1.2, zorder=1)
        axes.plot(baseline.minibatch, mean, "*", color="black", markersize=13, zorder=4, linestyle="none", label=words)
        if len(baseline.errors) > 1:
            axes.axhspan(mean - BAND * std, mean + BAND * std, color="black", alpha=0.12, lw=0, zorder=0)
    if any(group.diverged for group in selection.groups):
        axes.plot([], [], "x", color="#444444", markeredgewidth=2, label="diverged, of all runs")
    spreads = [(mean, 0.0 if math.isnan(std) else std) for mean, std in _spreads(selection.groups)]
    if spreads:
        low, high = (sign(mean + side * BAND * std for mean, std in spreads) for sign, side in ((min, -1), (max, 1)))
        if style.spans_much(min(mean for mean, _ in spreads), high):
            style.error_scale(axes, min(mean for mean, _ in spreads), high, 1.08)
        else:  # not from 0, as in the paper's figure: what matters is how errors differ
            margin_around = max(0.15 * (high - low), 0.5)
            axes.set_ylim(max(0.0, low - margin_around), high + margin_around)


def _spreads(groups: Sequence[Group]) -> list[tuple[float, float]]:
    return [mean_and_std(group.errors) for group in groups if group.errors]


def _mean(group: Group) -> float:
    return mean_and_std(group.errors)[0]


def _point(axes: Axes, group: Group, x: float, look: style.Look, tag: str) -> None:
    """Draw the point of a group with its error bar."""
    bar = BAND * mean_and_std(group.errors)[1] if len(group.errors) > 1 else 0.0
    drawn = axes.errorbar(x, _mean(group), bar, color=look.colour, marker=look.marker, capsize=4, lw=1.4)
    line, caps, bars = drawn.lines
    for number, artist in enumerate((line, *caps, *bars)):
        artist.set_gid(f"{tag}point{number}")


def _diverged(axes: Axes, group: Group, dodge: float, height: float, colour: str) -> None:
    """Mark runs without an error at the top of the panel, and say how many of all they are."""
    across = axes.get_xaxis_transform()  # x in data, y in parts of the panel
    axes.plot(group.minibatch * dodge, height, "x", color=colour, markersize=8, markeredgewidth=2, transform=across)
    words = f" {len(group.diverged)}/{len(group.runs)}"
    axes.text(group.minibatch * dodge * 1.06, height, words, color=colour, fontsize=9, transform=across, va="center")


def _row_labels(rows: Sequence[Sequence[Group]]) -> list[str]:
    """Name rows by what tells them apart, ± 2 std said once."""
    suffix = f"mean ± {BAND:g} std"
    last = [row[-1] for row in rows]
    keys = [key for key in differing(last) if key not in ("k", "warmup.epochs")]
    if not keys:
        return [suffix]
    words = []
    for group in last:
        named = [
            series.warmup_name(group)
            if key == "warmup.name"
            else f"{key.removesuffix('.name')} = {group.settings.get(key)}"
            for key in keys
        ]
        words.append(f"{', '.join(named)}: {suffix}")
    return words


def draw_published(axes: Axes, table: Table) -> None:
    """Draw the published points, mean ± 2 std, those plotted without a number left out."""
    rows = [row for row in table.rows if row.error is not None]
    kn = [row.kn for row in rows]
    errors = [row.error or 0.0 for row in rows]
    bars = [BAND * (row.std or 0.0) for row in rows]
    label = f"Goyal et al. (2017): mean ± {BAND:g} std"
    axes.errorbar(
        kn, errors, bars, color=PUBLISHED, linestyle=":", lw=1.4, marker="D", markersize=5, capsize=4, label=label
    )
    axes.set_ylim(20, 40)
