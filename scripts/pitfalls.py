"""Table and figure of what each pitfall costs, from run records: final error, mean ± std over the seeds.

    python scripts/pitfalls.py results/pitfalls
    python scripts/pitfalls.py results/pitfalls --gather runs/pitfalls

``--gather`` first copies what the table and a reader need of every run. Written beside the records: README.md and
pitfalls.svg, pitfalls.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from curves import STYLE, gather
from matplotlib.figure import Figure

from largebatch.config import PITFALLS
from largebatch.record import holds_run, read_provenance, read_summary

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

![Final error of every run by pitfall](pitfalls.svg)

One image is 0.28 points, and three seeds are few: differences below about the sum of the two spreads say nothing
either way. At this rate training stands near the edge of stability, and a large spread is mostly one seed that fell
off it (the figure shows each run): `gamma_one`, `decay_bn` and `independent_shuffle` lost one so, which is a reason to
distrust their means, not a measure of the mistake. What is plain: gradients normalised by n destroy the run. Over 225
iterations weight decay of 1e-4 hardly acts, so mistakes about it can show little here; ImageNet's 14,040 give them more
time. `padded_eval` has the weights of `none` and moves the reported figure alone. `absorb_rate_corrected` is the
recipe itself in another form: its runs differ from those of `none` by rounding, which training amplifies.

    {command}
    python scripts/pitfalls.py results/pitfalls --gather runs/pitfalls
"""


def load(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the summaries of the runs below ``results`` by pitfall, in the order of the list of pitfalls."""
    found = defaultdict(list)
    for path in sorted(path for path in results.iterdir() if path.is_dir() and holds_run(path)):
        summary = read_summary(path) or {}
        origin = read_provenance(path) or {}
        if summary.get("status") not in ("done", "diverged"):
            raise SystemExit(f"{path} is not finished: {summary.get('status')}")
        found[origin["experiment"]["pitfall"]].append(summary)
    if not found:
        raise SystemExit(f"{results} holds no runs.")
    return {name: found[name] for name in PITFALLS if name in found}


def errors(summaries: list[dict[str, Any]]) -> list[float]:
    """Return the final errors of the runs that have one."""
    return [summary["final_error"] for summary in summaries if summary["status"] == "done"]


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    reference = statistics.mean(errors(groups["none"]))
    rows = ["| `pitfall=` | what it does | error % | against none | diverged |", "|---|---|---|---|---|"]
    for name, summaries in groups.items():
        values = errors(summaries)
        diverged = len(summaries) - len(values)
        shown = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "–"
        against = f"{statistics.mean(values) - reference:+.2f}" if values and name != "none" else "–"
        rows.append(f"| `{name}` | {PITFALLS[name]} | {shown} | {against} | {diverged} of {len(summaries)} |")
    return "\n".join(rows)


def draw(groups: dict[str, list[dict[str, Any]]]) -> Figure:
    """Return the figure: a dot a run, a bar at the mean, a row a pitfall."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row, (name, summaries) in enumerate(groups.items()):
        values = errors(summaries)
        colour = "#000000" if name == "none" else "#0072B2"
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=7)
        if values:
            axes.plot(statistics.mean(values), row, "|", color=colour, markersize=22, markeredgewidth=2)
        if len(values) < len(summaries):
            words = f"{len(summaries) - len(values)} of {len(summaries)} diverged"
            axes.text(GUESSING * 0.85, row, words, ha="right", va="center", color="#D55E00")
    axes.axvline(statistics.mean(errors(groups["none"])), color="#000000", lw=0.8, ls=":")
    axes.set(xscale="log", xlim=(0.5, 100), xlabel="top-1 validation error (%), final")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 90], ["0.5", "1", "2", "5", "10", "20", "50", "90"])
    axes.minorticks_off()
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    return figure


def main() -> None:
    """Write table and figure of one directory of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory of run records; table and figure are written there")
    parser.add_argument("--gather", type=Path, metavar="RUNS", help="directory of whole runs to copy records from")
    arguments = parser.parse_args()
    if arguments.gather:
        gather(arguments.gather, arguments.results)
    groups = load(arguments.results)
    text = INTRODUCTION.format(table=table(groups), command=COMMAND.format(names=",".join(groups)))
    (arguments.results / "README.md").write_text(text, encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure = draw(groups)
        figure.savefig(arguments.results / "pitfalls.svg", metadata={"Date": None})
        figure.savefig(arguments.results / "pitfalls.png", dpi=120)
    print(f"{arguments.results / 'README.md'} and pitfalls.svg, from {sum(map(len, groups.values()))} runs")


if __name__ == "__main__":
    main()
