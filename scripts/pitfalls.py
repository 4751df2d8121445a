"""Table and figure of what each pitfall costs, from run records: final error, mean ± std over the seeds.

    largebatch compact runs=runs/pitfalls out=results/pitfalls
    python scripts/pitfalls.py results/pitfalls

Written beside the records: README.md and pitfalls.svg, pitfalls.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from largebatch.config.pitfalls import PITFALLS
from largebatch.reports.figures.style import GRID, blank, styled
from largebatch.reports.rows import Row, make_rows
from largebatch.reports.selection import select
from largebatch.reports.tables import difference, spread, verdict

GUESSING = 90.0  # % error with ten classes
COMMAND = (
    "largebatch train -m pitfall={names} seed=0,1,2 k=32 n=8 lr.base_minibatch=8 epochs=45 threads=1 "
    "log_every=1000 hydra.sweep.dir=runs/pitfalls"
)
INTRODUCTION = """# What each pitfall costs

ResNet-8 on the digits, kn = 32 × 8 = 256 from a baseline of 8 samples: the rate is scaled by 32, as in the paper's
kn = 8192, with the paper's recipe over 45 epochs (225 iterations, the first 13 of them warmup). Top-1 validation error
(360 images), median of each run's last five epochs, mean ± std of three seeds. A run that diverges has no error.

{table}

The difference is in points, with its 95 % interval. The verdict asks whether it lies within ± 0.5 points
(`largebatch table runs=results/pitfalls baseline=pitfall=none`, and `--help` defines it).

![Final error of every run by pitfall](pitfalls.svg)

One image is 0.28 points, and three seeds are few: differences below about the sum of the two spreads say nothing
either way. At this rate training stands near the edge of stability, and a large spread is mostly one seed that fell
off it (the figure shows each run): `gamma_one`, `decay_bn` and `independent_shuffle` lost one so, which is a reason to
distrust their means, not a measure of the mistake. What is plain: gradients normalised by n destroy the run. Over 225
iterations weight decay of 1e-4 hardly acts, so mistakes about it can show little here; ImageNet's 14,040 give them more
time. `padded_eval` has the weights of `none` and moves the reported figure alone. `absorb_rate_corrected` is the
recipe itself in another form: its runs differ from those of `none` by rounding, which training amplifies.

    {command}
    largebatch compact runs=runs/pitfalls out=results/pitfalls
    python scripts/pitfalls.py results/pitfalls
"""


def load(results: Path) -> dict[str, Row]:
    """Return what the records say by pitfall, in the order of the list of pitfalls."""
    rows = {row.group.pitfall: row for row in make_rows(select([str(results)], "pitfall=none"), margin=0.5)}
    return {name: rows[name] for name in PITFALLS if name in rows}


def table(rows: dict[str, Row]) -> str:
    """Return the table in Markdown."""
    lines = ["| `pitfall=` | what it does | error % | difference | verdict | diverged |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        diverged = f"{len(row.group.diverged)} of {len(row.group.runs)}"
        cells = (f"`{name}`", PITFALLS[name], spread(row.error), difference(row), verdict(row), diverged)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: dict[str, Row]) -> Figure:
    """Return the figure: a dot a run, a bar at the mean, a row a pitfall."""
    figure = blank(8, 5)
    axes = figure.subplots()
    for height, (name, row) in enumerate(rows.items()):
        errors = row.group.errors
        colour = "#000000" if name == "none" else "#0072B2"
        axes.plot(errors, [height] * len(errors), "o", color=colour, alpha=0.6, markersize=7)
        if row.error:
            axes.plot(row.error.mean, height, "|", color=colour, markersize=22, markeredgewidth=2)
        if row.group.diverged:
            words = f"{len(row.group.diverged)} of {len(row.group.runs)} diverged"
            axes.text(GUESSING * 0.85, height, words, ha="right", va="center", color="#D55E00")
    axes.axvline(rows["none"].error.mean, color="#000000", lw=0.8, ls=":")
    axes.set(xscale="log", xlim=(0.5, 100), xlabel="top-1 validation error (%), final")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 90], ["0.5", "1", "2", "5", "10", "20", "50", "90"])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    return figure


def main() -> None:
    """Write table and figure of one directory of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory of run records; table and figure are written there")
    results = parser.parse_args().results
    rows = load(results)
    text = INTRODUCTION.format(table=table(rows), command=COMMAND.format(names=",".join(rows)))
    (results / "README.md").write_text(text, encoding="utf-8")
    with styled():
        figure = draw(rows)
        figure.savefig(results / "pitfalls.svg", metadata={"Date": None})
        figure.savefig(results / "pitfalls.png", dpi=120)
    runs = sum(len(row.group.runs) for row in rows.values())
    print(f"{results / 'README.md'} and pitfalls.svg, from {runs} runs")


if __name__ == "__main__":
    main()
