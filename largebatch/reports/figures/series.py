"""Numbers that figures draw: a value an epoch of every run of a group, and how seeds spread around their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from largebatch.base.numbers import mean_and_std
from largebatch.records.runs import Run
from largebatch.reports.figures import style
from largebatch.reports.selection import Group, Selection

Values = NDArray[np.float64]

X_AXES = {"epochs": "epoch", "iterations": "iteration", "images": "images seen in training", "hours": "hours"}
# Keys whose differences a group's label shows already.
LABELLED = ("k", "warmup.name", "warmup.epochs", "pitfall", "lr.base", "lr.base_minibatch", "lr.scaling")


@dataclass(frozen=True)
class Curve:
    """A figure against the training's progress: mean over runs and sample standard deviation, NaN for one run.

    ``x``, ``mean`` and ``std`` have a value an epoch.
    """

    x: Values
    mean: Values
    std: Values


def progress(run: Run, x_axis: str) -> Values:
    """Return where each epoch of a run ends on one of ``X_AXES``; hours are of training and validation."""
    if x_axis == "epochs":
        return run.epochs["epoch"]
    if x_axis == "hours":
        return np.cumsum(run.epochs["seconds"]) / 3600
    iterations = run.epochs["iteration"]
    return iterations if x_axis == "iterations" else iterations * (run.experiment["k"] * run.experiment["n"])


def smoothed(values: Values, epochs: int) -> Values:
    """Return the mean of every value and those of the ``epochs`` − 1 before it, as far as there are."""
    if epochs <= 1:
        return values
    return np.array([values[max(0, end - epochs) : end].mean() for end in range(1, len(values) + 1)])


def curve(runs: Sequence[Run], name: str, x_axis: str = "epochs", smooth: int = 1) -> Curve | None:
    """Return one column of the epoch lines over runs of equal length; None where none of them has it."""
    having = [run for run in runs if name in run.epochs]
    if not having:
        return None
    values = np.stack([smoothed(run.epochs[name], smooth) for run in having])
    std = values.std(axis=0, ddof=1) if len(having) > 1 else np.full(values.shape[1], np.nan)
    return Curve(np.mean([progress(run, x_axis) for run in having], axis=0), values.mean(axis=0), std)


def at_epoch(runs: Sequence[Run], epoch: float, x_axis: str) -> float:
    """Return where an epoch, which may be a fraction, lies on an x-axis; NaN where no run came that far."""
    if x_axis == "epochs":
        return epoch
    xs = np.mean([progress(run, x_axis) for run in runs], axis=0)
    return float(np.interp(epoch, np.arange(len(xs) + 1), np.concatenate([[0.0], xs]), right=np.nan))


def final(group: Group) -> str:
    """Return a group's final error as people write it, with what must be said beside it."""
    words = []
    if group.errors:
        mean, std = mean_and_std(group.errors)
        words.append(f"{mean:.2f} ± {std:.2f} %" if len(group.errors) > 1 else f"{mean:.2f} % (one seed)")
    for runs, word in ((group.diverged, "diverged"), (group.unfinished, "unfinished")):
        if runs:
            words.append(f"{len(runs)} of {len(group.runs)} {word}")
    return ", ".join(words)


def names(selection: Selection) -> dict[str, str]:
    """Return what to call each group, by its hash: its label, and the settings that tell it from the others."""
    groups = selection.groups
    further = [key for key in selection.differing if key not in LABELLED]
    labels = {group.hash: [group.label, *_settings(group, further)] for group in groups}
    if len({tuple(label) for label in labels.values()}) < len(groups):
        labels = {group.hash: [*labels[group.hash], *_settings(group, LABELLED)] for group in groups}
    if selection.baseline:
        labels[selection.baseline.hash].append("baseline")
    return {name: ", ".join(label) for name, label in labels.items()}


def looks(selection: Selection) -> dict[str, style.Look]:
    """Return how to draw each group, by its hash, where several share a panel."""
    others = [group for group in selection.groups if group is not selection.baseline]
    drawn = {group.hash: style.look(number) for number, group in enumerate(others)}
    return drawn if selection.baseline is None else {selection.baseline.hash: style.BASELINE, **drawn}


def _settings(group: Group, keys: Sequence[str]) -> list[str]:
    return [f"{key.removesuffix('.name')}={group.settings.get(key)}" for key in keys]


def warmup_name(group: Group) -> str:
    """Return a group's warmup as words."""
    return "no warmup" if group.warmup == "none" else f"{group.warmup} warmup"
