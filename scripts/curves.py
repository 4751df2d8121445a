"""Draw error against epoch from run records: mean over the seeds as a line, lowest to highest as a band.

    python scripts/curves.py results/digits-curves
    python scripts/curves.py results/digits-curves --gather runs/digits-curves

The figure lies beside the records, as curves.svg and curves.png. ``--gather`` first copies what the figure and a
reader need of every run: its configuration, provenance, summary and one line an epoch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.record import holds_run, read_metrics, read_provenance, read_summary

# Okabe and Ito's colours keep apart for every kind of colour vision; the dashes do so in grey.
LOOKS = (("#000000", "-"), ("#D55E00", "--"), ("#0072B2", "-."), ("#009E73", ":"), ("#CC79A7", (0, (5, 1, 1, 1))))
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "largebatch",  # the same records make the same file
}
PANELS = (("train_error", "training error"), ("val_error", "validation error"))


@dataclass(frozen=True)
class Group:
    """The runs of one experiment, which differ by their seed alone."""

    minibatch: int
    label: str
    errors: dict[str, list[list[float]]]


def gather(runs: Path, results: Path) -> None:
    """Copy what is worth keeping of every run below ``runs``."""
    for source in sorted(path for path in runs.iterdir() if holds_run(path)):
        target = results / source.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "provenance.json", "summary.json"):
            shutil.copyfile(source / name, target / name)
        lines = [json.dumps(line) + "\n" for line in read_metrics(source, "epoch")]
        (target / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def load(results: Path) -> list[Group]:
    """Return the experiments below ``results``, the smallest minibatch first."""
    experiments = defaultdict(list)
    for path in sorted(path for path in results.iterdir() if path.is_dir() and holds_run(path)):
        experiments[(read_provenance(path) or {})["experiment_hash"]].append(path)
    if not experiments:
        raise SystemExit(f"{results} holds no runs.")
    return sorted((group(paths) for paths in experiments.values()), key=lambda group: (group.minibatch, group.label))


def group(paths: list[Path]) -> Group:
    """Put the runs of one experiment together."""
    summaries: list[dict[str, Any]] = [read_summary(path) or {} for path in paths]
    experiment = (read_provenance(paths[0]) or {})["experiment"]
    summary, final = summaries[0], [summary["final_error"] for summary in summaries]
    warms = summary["reference_rate"] > experiment["lr"]["base"]
    mistake = "" if experiment["pitfall"] == "none" else f", pitfall {experiment['pitfall']}"
    warmup = {"none": "no warmup"}.get(experiment["warmup"]["name"], f"{experiment['warmup']['name']} warmup")
    label = (
        f"kn = {summary['minibatch']}, η = {summary['reference_rate']:g}, {warmup if warms else 'baseline'}{mistake}: "
        f"{statistics.mean(final):.2f} ± {statistics.stdev(final):.2f} %"
    )
    lines = [read_metrics(path, "epoch") for path in paths]
    errors = {name: [[line[name] for line in run] for run in lines] for name, _ in PANELS}
    return Group(summary["minibatch"], label, errors)


def draw(groups: list[Group], seeds: int) -> Figure:
    """Return the figure: training error left, validation error right."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, PANELS, strict=True):
        for look, one in zip(LOOKS, groups, strict=False):
            curve(axes, one.errors[name], one.label, *look)
        axes.set(title=title, xlabel="epoch", yscale="log", ylim=(0.3, 100))
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.margins(x=0)
        axes.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("top-1 error (%)")
    handles, labels = panels[1].get_legend_handles_labels()
    title = f"final validation error, mean ± std of {seeds} seeds"
    figure.legend(handles, labels, title=title, loc="outside lower center", frameon=False, handlelength=3)
    return figure


def curve(axes: Axes, runs: list[list[float]], label: str, colour: str, dashes: Any) -> None:
    """Draw one experiment: a value an epoch for each of its runs."""
    epochs = range(1, len(runs[0]) + 1)
    columns = list(zip(*runs, strict=True))
    axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, lw=0)
    axes.plot(epochs, [statistics.mean(c) for c in columns], color=colour, linestyle=dashes, lw=1.8, label=label)


def main() -> None:
    """Draw the figure of one directory of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory of run records; the figure is written there")
    parser.add_argument("--gather", type=Path, metavar="RUNS", help="directory of whole runs to copy records from")
    arguments = parser.parse_args()
    if arguments.gather:
        gather(arguments.gather, arguments.results)
    groups = load(arguments.results)
    with matplotlib.rc_context(STYLE):
        figure = draw(groups, seeds=len(groups[0].errors["val_error"]))
        figure.savefig(arguments.results / "curves.svg", metadata={"Date": None})
        figure.savefig(arguments.results / "curves.png", dpi=120)
    print(f"{arguments.results / 'curves.svg'} and .png, from {sum(len(g.errors['val_error']) for g in groups)} runs")


if __name__ == "__main__":
    main()
