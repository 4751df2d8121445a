"""A row a group: what a table, a page or a figure's legend says of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from largebatch.base.outcome import printable
from largebatch.records.runs import Run
from largebatch.reports.selection import Group, Note, Selection, folded
from largebatch.reports.statistics import Comparison, Spread, compare, in_band_from

BASELINE = "baseline"
# Differences in these show in other columns: the rate and the warmup.
SHOWN = ("k", "n", "warmup.name", "warmup.epochs", "lr.base", "lr.base_minibatch", "lr.scaling", "schedule.milestones")


@dataclass(frozen=True, eq=False)
class Row:
    """Statistics of the runs of a group.

    Attributes:
        group: The runs.
        error: Final errors of the finished runs; None where there are none.
        is_baseline: Whether the others are compared with it.
        comparison: With the baseline; None for the baseline itself, or without one.
        in_band_from: The first epoch from which the mean training error stays within the baseline's band; 0 where it
            does not to the end; None where the baseline has no band (fewer than two finished runs, or other epochs).
        seconds: Mean time of a finished run in s.
        images_per_second: Mean over the finished runs.
    """

    group: Group
    error: Spread | None
    is_baseline: bool
    comparison: Comparison | None
    in_band_from: int | None
    seconds: float | None
    images_per_second: float | None

    def to_mapping(self, differing: Sequence[str] = ()) -> dict[str, Any]:
        """Return plain values, units in the names where they need one; ``differing`` are further settings."""
        group, error, comparison = self.group, self.error, self.comparison or Comparison()
        low, high = comparison.interval or (None, None)
        return {
            "k": group.k,
            "n": group.n,
            "kn": group.minibatch,
            "rate": group.reference_rate,
            "warmup": group.warmup,
            **{key.removesuffix(".name"): group.settings.get(key) for key in differing},
            "seeds": len(group.finished),
            "diverged": len(group.diverged),
            "unfinished": len(group.unfinished),
            "error_mean": error.mean if error else None,
            "error_std": error.std if error and error.seeds > 1 else None,
            "difference": comparison.difference,
            "difference_low": low,
            "difference_high": high,
            "equivalence_p": comparison.equivalence,
            "verdict": BASELINE if self.is_baseline else comparison.verdict,
            "further_seeds": comparison.further_seeds,
            "in_band_from": self.in_band_from,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "experiment_hash": group.hash,
        }


def make_rows(selection: Selection, margin: float) -> list[Row]:
    """Return a row a group, in the selection's order; ``margin`` is what counts as equivalent, in points."""
    return [_row(group, selection.baseline, margin) for group in selection.groups]


def _row(group: Group, baseline: Group | None, margin: float) -> Row:
    comparison = in_band = None
    if baseline and group is not baseline:
        diverged = bool(group.diverged or baseline.diverged)
        comparison = compare(group.errors, baseline.errors, margin, diverged)
        same_length = group.settings["epochs"] == baseline.settings["epochs"]
        if group.finished and len(baseline.finished) > 1 and same_length:
            in_band = in_band_from(training_errors(group), training_errors(baseline)) or 0
    return Row(
        group,
        Spread.of(group.errors) if group.errors else None,
        group is baseline,
        comparison,
        in_band,
        _mean([run.seconds for run in group.finished]),
        _mean([run.images_per_second for run in group.finished]),
    )


def training_errors(group: Group) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the training error in % of the finished runs, (runs, epochs)."""
    return np.array([run.epochs["train_error"] for run in group.finished])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def further_settings(selection: Selection) -> tuple[str, ...]:
    """Return the keys in which groups differ that no column of every table shows."""
    extra = [key for key in selection.differing if key not in SHOWN]

    def seen(group: Group) -> tuple[Any, ...]:
        own = (group.settings.get(key) for key in extra)
        return group.k, group.n, group.reference_rate, group.warmup, *map(str, own)

    for key in selection.differing:
        if key in SHOWN[3:] and len({seen(group) for group in selection.groups}) < len(selection.groups):
            extra.append(key)
    return tuple(extra)


def remarks(selection: Selection, every: bool = False) -> list[str]:
    """Return sentences on what the rows cannot show; many of a kind as one, or ``every`` one."""
    notes = list(selection.notes)
    said = []
    baseline = selection.baseline
    if baseline and not baseline.finished:
        said.append(f"The baseline ({baseline.label}) has no finished run, so there is nothing to compare with.")
    for group in selection.groups:
        if len(group.finished) == 1:
            text = f"{group.label}: a single seed, so it has no std and no verdict."
            notes.append(Note("single", group.label, text))
        devices = sorted({device for run in group.finished for device in _devices(run)})
        if len(devices) > 1:
            kinds = printable(", ".join(devices))
            text = f"{group.label}: its times are of runs on several kinds of device ({kinds})."
            notes.append(Note("devices", group.label, text))
    return [*([note.text for note in notes] if every else folded(notes)), *said]


def _devices(run: Run) -> set[str]:
    return set(run.provenance.get("devices", ()))
