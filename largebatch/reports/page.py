"""One page on what runs say: self-contained HTML for a browser, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from largebatch.base.outcome import printable
from largebatch.records.runs import Run
from largebatch.reports.charts import charts
from largebatch.reports.figures import series, style
from largebatch.reports.output import SIGNATURE
from largebatch.reports.rows import Row, make_rows, remarks
from largebatch.reports.selection import Group, Selection
from largebatch.reports.statistics import BETTER, DEFINITIONS, DIVERGED, EQUIVALENT, UNDECIDED, WORSE
from largebatch.reports.tables import our_cells

LISTED = 4  # groups named in the answer, by verdict
VERDICTS: dict[str | None, str] = {
    EQUIVALENT: "equivalent to it within ± {margin:g} points",
    WORSE: "worse",
    BETTER: "better",
    UNDECIDED: "undecided with so few seeds",
    DIVERGED: "not to be judged, with runs that diverged",
    None: "not to be judged, with a single seed or none",
}


@dataclass(frozen=True)
class Toggle:
    """A group's check box: its number, name, final error, and how its line looks."""

    number: int
    name: str
    final: str
    colour: str
    dashes: str
    width: float
    baseline: bool


def page(selection: Selection, margin: float, every_note: bool = False) -> str:
    """Return the page.

    Args:
        selection: The runs.
        margin: What counts as equivalent, in points.
        every_note: Show every note; otherwise many of a kind are one.
    """
    rows = make_rows(selection, margin)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("largebatch.reports", "templates"),
        autoescape=True,  # names and commands in a record are a stranger's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = charts(selection, rows, margin)
    return environment.get_template("page.html.j2").render(
        signature=SIGNATURE,
        question=question(selection),
        answer=answer(selection, rows, margin),
        toggles=_toggles(selection),
        charts=figures,
        readings={chart.name: chart.readings() for chart in figures},
        table=our_cells(selection, rows, margin),
        differences=_differences(selection),
        warnings=[
            f"{printable(str(path))} was left out, its record is corrupt: {reason}."
            for path, reason in selection.corrupt
        ],
        remarks=remarks(selection, every_note),
        runs=[_origin(run) for run in selection.runs],
        definitions=DEFINITIONS,
        colours=style.COLOURS,
    )


def question(selection: Selection) -> str:
    """Return what the page is about, in a sentence."""
    baseline = selection.baseline
    if baseline is None:
        return f"What do these {len(selection.groups)} groups of runs reach?"
    if len(selection.groups) == 1:
        return f"What does {baseline.label} reach?"
    keys = [key.removesuffix(".name") for key in selection.differing if key != "warmup.epochs"]
    differing = " and ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)
    return f"Do runs that differ in {differing} reach the error of the baseline, {baseline.label}?"


def answer(selection: Selection, rows: Sequence[Row], margin: float) -> str:
    """Return what the verdicts come to, in a sentence or two."""
    others = [row for row in rows if not row.is_baseline]
    judged: dict[str | None, list[Row]] = {verdict: [] for verdict in VERDICTS}
    for row in others:
        judged[row.comparison.verdict if row.comparison else None].append(row)
    if not others or judged[None] == others:
        return "Nothing is judged: that takes a baseline and another group, each with two seeds that are done."
    found = [(VERDICTS[verdict].format(margin=margin), of_it) for verdict, of_it in judged.items() if of_it]
    baseline = next(series.final(row.group) for row in rows if row.is_baseline)
    if len(found) == 1:
        words, of_it = found[0]
        subject = {1: "The other group is", 2: "Both other groups are"}.get(
            len(others), f"All {len(others)} others are"
        )
        return f"The baseline reaches {baseline}. {subject} {words} ({_named(of_it, selection)})."
    parts = [
        f"{len(of_it)} {'is' if len(of_it) == 1 else 'are'} {words} ({_named(of_it, selection)})"
        for words, of_it in found
    ]
    return f"The baseline reaches {baseline}. Of {len(others)} other groups, {'; '.join(parts)}."


def _named(rows: Sequence[Row], selection: Selection) -> str:
    names = [_short(row.group, selection.differing) for row in rows[:LISTED]]
    more = [f"{len(rows) - LISTED} more"] if len(rows) > LISTED else []
    return ", ".join([*names, *more])


def _short(group: Group, keys: Sequence[str]) -> str:
    """Return what tells a group from the others, for a list of them."""
    words = []
    for key in keys:
        if key == "warmup.name":
            words.append("without warmup" if group.warmup == "none" else f"with {group.warmup} warmup")
        elif key != "warmup.epochs":
            words.append(f"{key.removesuffix('.name')} = {group.settings.get(key)}")
    return " ".join(words)


def _toggles(selection: Selection) -> list[Toggle]:
    names, looks = series.names(selection), series.looks(selection)
    toggles = []
    for number, group in enumerate(selection.groups):
        look = looks[group.hash]
        baseline = group is selection.baseline
        colour = "currentColor" if baseline else f"var(--c{style.COLOURS.index(look.colour)})"
        dashes = "" if look.dashes == "-" else " ".join(f"{part * look.width:g}" for part in look.dashes[1])
        toggles.append(Toggle(number, names[group.hash], series.final(group), colour, dashes, look.width, baseline))
    return toggles


def _differences(selection: Selection) -> Mapping[str, Any]:
    """Return the keys in which groups differ, and their values by group."""
    keys = selection.differing
    names = series.names(selection)
    rows = [(names[group.hash], [_shown(group.settings.get(key)) for key in keys]) for group in selection.groups]
    return {"keys": keys, "rows": rows}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)


def _origin(run: Run) -> dict[str, str]:
    """Return where a run comes from, in words."""
    origin = run.provenance
    git = origin.get("git") or {}
    commit = (git.get("commit") or "unknown")[:12] + (" and changes" if git.get("dirty") else "")
    versions = origin.get("versions") or {}
    devices = origin.get("devices") or ["unknown"]
    return {
        "directory": run.name,
        "seed": str(run.seed),
        "status": run.status + (f", resumed {run.starts - 1} times" if run.resumed else ""),
        "error": "–" if run.final_error is None else f"{run.final_error:.2f}",
        "devices": f"{len(devices)} × {printable(devices[0])}",
        "code": printable(commit),
        "versions": printable(f"Python {versions.get('python', '?')}, PyTorch {versions.get('torch', '?')}"),
        "started": printable(str(origin.get("started", "unknown"))),
        "command": printable(str(origin.get("command", "unknown"))),
    }
