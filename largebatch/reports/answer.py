"""Answer how large k may be, from probes of one run, and compare with trained runs.

The rule. Of the probes at the full rate, after the paper's share of warmup (5/90 of the run) and before the first
decay:

1. drift: k steps of the baseline are one large step as long as its end point is wrong by no more than the way itself,
   ‖ŵ − w‖ ≤ ‖w − w_t‖. The median over the probes of the largest such k. (On a quadratic the ratio is 1 at kηλ = 1.59,
   just inside 2, where the large step would diverge.)
2. noise: a minibatch beyond the noise scale tr Σ / |G|² averages what is no longer noise. k = scale / n, the means of
   tr Σ and |G|² taken over the probes.

Up to the smaller of both, k should match the baseline; beyond the larger it should not; between them lies the doubt.
A warmup is needed where, at the start of the run and at the full rate, drift or the bound of stability (kηλ_max) do not
yet allow that k; it should last until they do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable
from largebatch.config.schedule import reference_rate
from largebatch.records.check import Corrupt, flat
from largebatch.records.read import read_probes
from largebatch.records.runs import Run, load
from largebatch.reports.rows import make_rows
from largebatch.reports.selection import Group, Selection, grouped
from largebatch.reports.statistics import BETTER, DIVERGED, EQUIVALENT, UNDECIDED, WORSE

EARLY = 5 / 90  # of a run: the paper's warmup
NEARLY = 0.9  # of the full rate
LIMIT = 1.0  # of an end point's error, in lengths of the way

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Probed:
    """A run with its probes, in the order of their iterations.

    ``settings`` define its experiment under dotted keys.
    """

    directory: Path
    settings: Mapping[str, Any]
    lines: Sequence[Line]

    @property
    def name(self) -> str:
        """Its directory, as it may be shown."""
        return printable(str(self.directory))

    @property
    def full_rate(self) -> float:
        """η of a small step after any warmup and before the first decay: η̂ / k."""
        base, usual, scaling = (self.settings[f"lr.{key}"] for key in ("base", "base_minibatch", "scaling"))
        k, n = int(self.settings["k"]), int(self.settings["n"])
        return reference_rate(base, k * n, usual, scaling) / k

    @property
    def steps(self) -> int:
        """Return the number of small steps of every probe; later ones may have another probe.steps."""
        return min(len(line["end_point"]) for line in self.lines)

    def at_full_rate(self) -> list[Line]:
        """Return the probes whose small steps have the full rate, or as good as (under a cosine)."""
        return [line for line in self.lines if line["small_rate"] > NEARLY * self.full_rate]

    def main_phase(self) -> list[Line]:
        """Return those of them that the rule counts."""
        early = EARLY * self.settings["epochs"]
        return [line for line in self.at_full_rate() if line["epoch"] >= early]


def readable(directory: Path) -> Run:
    """Read a run, or raise :class:`UserError`."""
    try:
        return load(directory)
    except Corrupt as error:
        raise UserError(f"run={directory} cannot be read: {error}.") from None


def open_probed(directory: Path) -> Probed:
    """Read a run that was probed.

    Raises:
        UserError: no run can be read there, or it has no probe.
    """
    run = readable(directory)
    lines = read_probes(directory)
    if not lines:
        raise UserError(
            f"run={directory} was not probed: train with probe.every=1, or keep checkpoints (checkpoint.every=… "
            "checkpoint.keep=…) and measure from them with `largebatch probe run=…`."
        )
    return Probed(directory, dict(grouped([run])[0].settings), lines)


@dataclass(frozen=True)
class Answer:
    """Answer of the rule.

    Attributes:
        probes: How many it counted.
        drift: Largest k by the end point: the median over the probes.
        drift_range: Its lowest and highest among them.
        steps: How many small steps were followed: a ``drift`` of so many says that it is no less.
        noise: k by the noise scale; infinite where the noise hides the gradient.
        noise_error: Its standard error, by leaving out one probe after another; NaN for a single one.
        scale: The noise scale in samples.
        warmup: Whether one is needed at ``safe``; None where no probe says.
        warmup_epochs: How long it should last: the first probe at which nothing speaks against ``safe``; None where
            none is needed, or none was found.
        start: What the probe at the start says of ``safe``: the largest k by the end point, and kηλ_max.
        bound: Of kηλ_max.
    """

    probes: int
    drift: int
    drift_range: tuple[int, int]
    steps: int
    noise: float
    noise_error: float
    scale: float
    warmup: bool | None
    warmup_epochs: float | None
    start: tuple[int, float] | None
    bound: float

    @property
    def safe(self) -> int:
        """The largest k that should match the baseline."""
        return _safe(self.drift, self.noise)

    @property
    def unsafe(self) -> float:
        """The k beyond which it should not; infinite where nothing that was measured says so."""
        drift = math.inf if self.drift >= self.steps else self.drift
        return max(drift, self.noise)


def check_places(settings: Mapping[str, Any], rates: Mapping[float, float]) -> None:
    """Refuse a run in which no probe would count, before it is trained.

    Args:
        settings: What defines the experiment, under dotted keys.
        rates: η̂ at each place that will be probed, by its epoch.

    Raises:
        UserError: no probe would count.
    """
    planned = Probed(
        Path("this run"), settings, [{"epoch": at, "small_rate": rate / settings["k"]} for at, rate in rates.items()]
    )
    if not planned.main_phase():
        raise _without_main_phase(planned)


def _without_main_phase(probed: Probed) -> UserError:
    return UserError(
        f"{probed.name} has no probe at its full rate after {EARLY:.1%} of its epochs and before the first "
        "decay: probe more often (probe.every), or take a run of more epochs."
    )


def answer(probed: Probed) -> Answer:
    """Apply the rule of this module.

    Raises:
        UserError: no probe counts.
    """
    main = probed.main_phase()
    if not main:
        raise _without_main_phase(probed)
    each = [largest_by_drift(line) for line in main]
    drift = statistics.median_low(each)
    n = probed.settings["n"]
    scale = noise_scale(main)
    noise = scale / n
    without = [noise_scale([*main[:place], *main[place + 1 :]]) / n for place in range(len(main)) if len(main) > 1]
    warmup, epochs, start = _warmup(probed, _safe(drift, noise))
    return Answer(
        probes=len(main),
        drift=drift,
        drift_range=(min(each), max(each)),
        steps=probed.steps,
        noise=noise,
        noise_error=_jackknife(without),
        scale=scale,
        warmup=warmup,
        warmup_epochs=epochs,
        start=start,
        bound=main[0]["stability_bound"],
    )


def _safe(drift: int, noise: float) -> int:
    return max(1, math.floor(min(drift, noise)))


def largest_by_drift(line: Line) -> int:
    """Return the largest k up to which the end point of every k' is wrong by no more than the way to it."""
    for steps, error in enumerate(line["end_point"], start=1):
        if error is None or error > LIMIT:
            return max(1, steps - 1)
    return len(line["end_point"])


def noise_scale(lines: Sequence[Line]) -> float:
    """Return mean tr Σ / mean |G|² in samples; infinite where the estimate of |G|² is not above 0."""
    squared, trace = (
        sum(line[name] for line in lines if line["noise_trace"] is not None and line["gradient_squared"] is not None)
        for name in ("gradient_squared", "noise_trace")
    )
    return trace / squared if squared > 0 else math.inf


def _jackknife(without: Sequence[float]) -> float:
    if not without or not all(map(math.isfinite, without)):
        return math.nan
    mean = statistics.fmean(without)
    return math.sqrt((len(without) - 1) / len(without) * sum((value - mean) ** 2 for value in without))


def _warmup(probed: Probed, k: int) -> tuple[bool | None, float | None, tuple[int, float] | None]:
    """Return whether k needs a warmup, its length in epochs, and what the start says."""
    lines = probed.at_full_rate()
    if not lines or lines[0]["iteration"]:
        return None, None, None

    def curved(line: Line) -> float:
        return k * float(line["small_rate"]) * float(math.nan if line["sharpness"] is None else line["sharpness"])

    def bears(line: Line) -> bool:
        followed = min(k, len(line["end_point"]))
        return largest_by_drift(line) >= followed and not curved(line) > float(line["stability_bound"])

    start = largest_by_drift(lines[0]), curved(lines[0])
    if bears(lines[0]):
        return False, None, start
    return True, next((line["epoch"] for line in lines if bears(line)), None), start


@dataclass(frozen=True)
class Trained:
    """Trained runs with one kind of warmup: the verdict of every k against the baseline, by rising k.

    ``error`` is the mean final error in %, None where there is none.
    """

    warmup: str
    verdicts: Sequence[tuple[int, str, float | None]]

    @property
    def largest(self) -> int | None:
        """The largest k that is not shown to be worse, below the first that is."""
        return self._last((EQUIVALENT, BETTER, UNDECIDED))

    @property
    def largest_equivalent(self) -> int | None:
        """The largest k that is shown to be equivalent, below the first that is worse or diverges."""
        return self._last((EQUIVALENT, BETTER))

    @property
    def first_worse(self) -> int | None:
        """The smallest k that is shown to be worse, or diverges."""
        return next((k for k, verdict, _ in self.verdicts if verdict in (WORSE, DIVERGED)), None)

    def _last(self, kinds: Sequence[str]) -> int | None:
        below = [one for one in self.verdicts if self.first_worse is None or one[0] < self.first_worse]
        return max((k for k, verdict, _ in below if verdict in kinds), default=None)


def trained(selection: Selection, margin: float) -> list[Trained]:
    """Return what the runs of a sweep show, with n, rate and all else as the baseline has it, by warmup.

    Raises:
        UserError: there is no baseline, or nothing to compare it with.
    """
    if selection.baseline is None:
        raise UserError("a comparison with training needs a baseline: leave baseline=none out.")
    by_warmup: dict[str, list[tuple[int, str, float | None]]] = {}
    for row in make_rows(selection, margin):
        if row.comparison and row.comparison.verdict and _differs_by_k(row.group, selection.baseline):
            error = sum(row.group.errors) / len(row.group.errors) if row.group.errors else None
            by_warmup.setdefault(row.group.warmup, []).append((row.group.k, row.comparison.verdict, error))
    if not by_warmup:
        raise UserError("these runs have no k with a verdict against the baseline: each needs two seeds or more.")
    return [Trained(warmup, sorted(verdicts)) for warmup, verdicts in by_warmup.items()]


def _differs_by_k(group: Group, baseline: Group) -> bool:
    keys = {*group.settings, *baseline.settings}
    return all(
        group.settings.get(key) == baseline.settings.get(key)
        for key in keys
        if key != "k" and not key.startswith("warmup")
    )


def fits(probed: Probed, selection: Selection) -> None:
    """Raise :class:`UserError` where the runs of a sweep are of another task than the one that was probed."""
    baseline = selection.groups[0].settings
    own = flat(probed.settings)
    keys = [key for key in {*own, *baseline} if key.split(".")[0] in ("dataset", "model", "n", "epochs", "lr")]
    other = sorted(key for key in keys if own.get(key) != baseline.get(key))
    if other:
        raise UserError(
            f"runs= are of another task than {probed.name}: they differ in {', '.join(other)}. Give the sweep of "
            "the same one."
        )
