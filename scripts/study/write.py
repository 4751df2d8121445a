"""Write the page of the study, its tables and figures, from run records.

    largebatch compact runs=runs/study out=results/study/records
    python scripts/study/write.py results/study

Written there: README.md, table.md, report.html and the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evidence import Evidence
from plan import MARGIN, SIZES, named

from largebatch.report.table import NONE

HERE = Path(__file__).parent


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure1(evidence: Evidence) -> str:
    """Return the table of every kn, against the baseline."""
    heads = ("kn", "k", "rate", "iterations", "error %", "difference to kn = 256", f"within ± {MARGIN:g}?")
    rows = []
    for kn in SIZES:
        group = evidence.groups[named(kn)]
        iterations = group.runs[0].summary["iterations"]
        numbers = (str(kn), str(group.k), f"{group.reference_rate:g}", f"{iterations:,}")
        rows.append((*numbers, evidence.error(named(kn)), *evidence.against(named(kn))))
    return markdown(heads, rows)


def versus(evidence: Evidence, rows: Sequence[tuple[str, str, str, str]], paper: str) -> str:
    """Return a table of experiments, each against another, beside the published errors.

    Args:
        evidence: The records.
        rows: What it is, the experiment, the one that it is compared with, and what was published.
        paper: Head of the last column.
    """
    heads = ("", "error %", "difference", f"within ± {MARGIN:g}?", paper)
    lines = []
    for what, name, other, beside in rows:
        compared = (NONE, NONE) if name == other else evidence.against(name, other)
        lines.append((what, evidence.error(name), *compared, beside))
    return markdown(heads, lines)
