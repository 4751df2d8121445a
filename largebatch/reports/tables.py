"""Tables of runs, and of what the paper published, in the formats that people and programs read."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from largebatch.records.write import finite
from largebatch.reports import paper
from largebatch.reports.rows import BASELINE, Row, further_settings, make_rows, remarks
from largebatch.reports.selection import Selection
from largebatch.reports.statistics import BAND, DEFINITIONS, UNDECIDED, Spread

FORMATS = ("text", "markdown", "csv", "latex", "json")
NONE = "–"
NOTES = 100  # columns of notes below a narrower table


@dataclass(frozen=True)
class Cells:
    """A table of words: a title, heads, rows, and sentences below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def table(
    selection: Selection | None, margin: float, shape: str, published: str | None, every_note: bool = False
) -> str:
    """Return the table of a selection.

    Args:
        selection: The runs; None for the published rows alone.
        margin: What counts as equivalent, in points.
        shape: One of :data:`FORMATS`, or html for a notebook. CSV has one table: the published one where there is one.
        published: One of :data:`largebatch.reports.paper.TABLES`, to be put beside ours; None for ours alone.
        every_note: Show every note; otherwise many of a kind are one. JSON has every one.
    """
    rows = make_rows(selection, margin) if selection else []
    beside = paper.beside(paper.published(published), selection.groups if selection else ()) if published else []
    if shape == "json":
        return _as_json(selection, rows, margin, published, beside)
    if shape == "csv":
        extra = further_settings(selection) if selection else ()
        return _as_csv([_published_values(one) for one in beside] or [row.to_mapping(extra) for row in rows])
    tables = [our_cells(selection, rows, margin, every_note)] if selection else []
    if published:
        tables.append(_published_cells(paper.published(published), beside, selection))
    written = {"text": as_text, "markdown": as_markdown, "latex": as_latex, "html": as_html}[shape]
    return "\n\n".join(map(written, tables))


def our_cells(selection: Selection, rows: Sequence[Row], margin: float, every_note: bool = False) -> Cells:
    """Return the table of our runs in words; many notes of a kind are one unless ``every_note`` is set."""
    extra = further_settings(selection)
    heads = ["k", "n", "kn", "rate", "warmup", *(key.removesuffix(".name") for key in extra), "seeds", "error %"]
    heads += ["difference", "verdict", "in band"] if selection.baseline else []
    heads += ["time", "images/s"]
    title = "Top-1 validation error"
    if selection.baseline:
        title += f" against the baseline ({selection.baseline.label}), margin ± {margin:g} points"
    notes = (
        "error: median of a run's last five epochs, mean ± std of the seeds; difference in points [95 % interval]; "
        "in band: epoch from which the training curve stays within the baseline's (`largebatch table --help`)",
        *remarks(selection, every_note),
    )
    return Cells(title, tuple(heads), tuple(_cells(row, extra, selection.baseline is not None) for row in rows), notes)


def _cells(row: Row, extra: Sequence[str], compared: bool) -> tuple[str, ...]:
    group = row.group
    cells = [str(group.k), str(group.n), str(group.minibatch), f"{group.reference_rate:.4g}", group.warmup]
    cells += [_shown(group.settings.get(key)) for key in extra]
    cells += [_seeds(row), spread(row.error)]
    cells += [difference(row), verdict(row), _epoch(row.in_band_from)] if compared else []
    return *cells, duration(row.seconds), NONE if row.images_per_second is None else f"{row.images_per_second:,.0f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _seeds(row: Row) -> str:
    group = row.group
    missing = {"diverged": len(group.diverged), "unfinished": len(group.unfinished)}
    words = [f"{count} {what}" for what, count in missing.items() if count]
    return f"{len(group.finished)} of {len(group.runs)}: {', '.join(words)}" if words else str(len(group.finished))


def spread(error: Spread | None) -> str:
    """Return mean ± std in %, without the unit."""
    if error is None:
        return NONE
    return f"{error.mean:.2f} ± {NONE if math.isnan(error.std) else format(error.std, '.2f')}"


def difference(row: Row) -> str:
    """Return the difference to the baseline in points, with its 95 % interval."""
    comparison = row.comparison
    if comparison is None or comparison.difference is None:
        return NONE
    shown = f"{comparison.difference:+.2f}"
    return f"{shown} [{comparison.interval[0]:+.2f}, {comparison.interval[1]:+.2f}]" if comparison.interval else shown


def verdict(row: Row) -> str:
    """Return the verdict, and what an undecided one needs."""
    if row.comparison is None:
        return BASELINE if row.is_baseline else NONE
    if row.comparison.verdict == UNDECIDED:
        more = row.comparison.further_seeds
        return f"undecided, +{more} seed{'s' * (more != 1)}"
    return row.comparison.verdict or NONE


def _epoch(epoch: int | None) -> str:
    return NONE if epoch is None else f"from {epoch}" if epoch else "never"


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it."""
    if seconds is None:
        return NONE
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _published_cells(table: paper.Table, beside: Sequence[paper.Beside], selection: Selection | None) -> Cells:
    heads = ("", "kn", "rate", "warmup", "published %", "ours %", "seeds", "difference", "within")
    notes = [
        "published: ResNet-50 on ImageNet, mean ± std of five runs (Goyal et al., 2017); within: our mean lies "
        f"within the published one ± {BAND:g} std",
        *([table.note] if table.note else []),
    ]
    if selection:
        others = [group.label for group in selection.groups if not any(group is one.group for one in beside)]
        if others:
            # Of another data set, model, rate or recipe.
            notes.append(f"Not an experiment of this table: {'; '.join(others)}.")
    return Cells(f"{table.title}, as published", heads, tuple(map(_published_row, beside)), tuple(notes))


def _published_row(one: paper.Beside) -> tuple[str, ...]:
    row, ours = one.row, one.ours
    theirs = "no number" if row.error is None else f"{row.error:.2f} ± {row.std:.2f}"
    gap = f"{ours.mean - row.error:+.2f}" if ours and row.error is not None else NONE
    within = NONE if one.within is None else "yes" if one.within else "no"
    seeds = str(ours.seeds) if ours else NONE
    return row.what, str(row.kn), f"{row.rate:.4g}", row.warmup, theirs, spread(ours), seeds, gap, within


def _published_values(one: paper.Beside) -> dict[str, Any]:
    row, ours = one.row, one.ours
    return {
        "what": row.what,
        "kn": row.kn,
        "rate": row.rate,
        "warmup": row.warmup,
        "model": row.model,
        "zero_gamma": row.zero_gamma,
        "published_mean": row.error,
        "published_std": row.std,
        "seeds": ours.seeds if ours else 0,
        "error_mean": ours.mean if ours else None,
        "error_std": ours.std if ours and ours.seeds > 1 else None,
        "within_band": one.within,
        "experiment_hash": one.group.hash if one.group else None,
    }


def as_text(table: Cells) -> str:
    """Return a table for terminals: columns aligned, numbers to the right."""
    columns = list(zip(table.heads, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [_is_number(column[1:]) for column in columns]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [line(table.heads), *map(line, table.rows)]
    width = max(NOTES, *map(len, lines))
    notes = [text for note in table.notes for text in textwrap.wrap(note, width, break_on_hyphens=False)]
    return "\n".join([table.title, "", *lines, "", *notes])


def as_markdown(table: Cells) -> str:
    """Return a table in GitHub's Markdown."""
    columns = list(zip(table.heads, *table.rows, strict=True))
    rule = "|".join("--:" if _is_number(column[1:]) else "---" for column in columns)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.heads, *table.rows)]
    return "\n".join([f"**{table.title}**", "", rows[0], f"|{rule}|", *rows[1:], "", *(f"- {n}" for n in table.notes)])


def as_html(table: Cells) -> str:
    """Return a table in HTML, for notebooks."""
    columns = list(zip(table.heads, *table.rows, strict=True))
    sides = ["right" if _is_number(column[1:]) else "left" for column in columns]

    def row(cells: Iterable[str], tag: str) -> str:
        parts = zip(cells, sides, strict=True)
        return "".join(f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in parts)

    lines = [f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows]
    notes = "<br>".join(map(html.escape, table.notes))
    return "\n".join(
        [
            f"<table><caption>{html.escape(table.title)}</caption>",
            f"<thead><tr>{row(table.heads, 'th')}</tr></thead>",
            *("<tbody>", *lines, "</tbody></table>"),
            f"<p><small>{notes}</small></p>",
        ]
    )


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "·": r"$\cdot$",
    "√": r"$\surd$",
    "η": r"$\eta$",
    "γ": r"$\gamma$",
    "`": r"\textasciigrave{}",
}


def as_latex(table: Cells) -> str:
    r"""Return a ``table`` for LaTeX with the package booktabs; notes are comments."""

    def words(text: str) -> str:
        signed = re.sub(r"(?<!\w)-(?=\d)", "−", text)
        return "".join(LATEX.get(character, character) for character in signed)

    columns = list(zip(table.heads, *table.rows, strict=True))
    kinds = "".join("r" if _is_number(column[1:]) else "l" for column in columns)
    rows = [" & ".join(map(words, row)) + r" \\" for row in (table.heads, *table.rows)]
    return "\n".join(
        [
            *(f"% {note}" for note in table.notes),
            r"\begin{table}",
            rf"\caption{{{words(table.title)}}}",
            r"\centering",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _is_number(cells: Iterable[str]) -> bool:
    return all(cell == NONE or re.match(r"[+-]?\d", cell) for cell in cells)


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _as_json(
    selection: Selection | None,
    rows: Sequence[Row],
    margin: float,
    published: str | None,
    beside: Sequence[paper.Beside],
) -> str:
    values: dict[str, Any] = {"definitions": list(DEFINITIONS)}
    if selection:
        extra = further_settings(selection)
        values |= {
            "margin": margin,
            "baseline": selection.baseline.hash if selection.baseline else None,
            "rows": [
                {
                    **row.to_mapping(extra),
                    "errors": list(row.group.errors),
                    "runs": [str(run.directory) for run in row.group.runs],
                }
                for row in rows
            ],
            "notes": remarks(selection, every=True),
            "corrupt": [{"directory": str(path), "reason": reason} for path, reason in selection.corrupt],
        }
    if published:
        values["published"] = {"table": published, "rows": [_published_values(one) for one in beside]}
    text = json.dumps(finite(values), indent=2, ensure_ascii=False)
    # What JSON may hold and a terminal should not get: a directory's name is a stranger's.
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
