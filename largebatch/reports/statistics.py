"""Compute statistics over seeds: differences, equivalence, and curves that meet.

Equivalence is shown by two one-sided tests (Schuirmann, 1987): that the difference of two means is above −margin,
and that it is below +margin. Means may have unequal variances (Welch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.base.numbers import mean_and_std

Errors = Sequence[float]
Curves = NDArray[np.float64]

LEVEL = 0.05  # of every test
BAND = 2.0  # std on either side of a mean: the paper's error bars (Figure 1)
EQUIVALENT, WORSE, BETTER, UNDECIDED, DIVERGED = "equivalent", "worse", "better", "undecided", "diverged"
DEFINITIONS = (
    "error: median validation error of a run's last five epochs, in % (top-1), as mean ± sample std over its seeds.",
    "difference: to the baseline, in points, with Welch's 95 % confidence interval.",
    "verdict: equivalent where two one-sided tests show, at 5 %, a difference within ± margin; else worse or better "
    "where the 95 % interval leaves out 0; else undecided, +m seeds: so many more of this row and of the baseline "
    "each would decide it, if their means and stds stay what they are. A single seed has no std and no verdict, and a "
    "group with a diverged run has no mean to judge. Every row is judged for itself: in a table of many, one in "
    "twenty may look worse or better by chance.",
    f"in band: the first epoch from which the mean training error stays within ± {BAND:g} std of the baseline's seeds; "
    "never (0 for programs) where the last epoch lies outside.",
)


@dataclass(frozen=True)
class Spread:
    """Final errors of some seeds: their number, mean and sample std (NaN for one), in %."""

    seeds: int
    mean: float
    std: float

    @classmethod
    def of(cls, errors: Errors) -> Spread:
        """Return that of one or more errors."""
        return cls(len(errors), *mean_and_std(errors))

    def with_more(self, seeds: int) -> Spread:
        """Return the same mean and std from more seeds."""
        return Spread(self.seeds + seeds, self.mean, self.std)


@dataclass(frozen=True)
class Difference:
    """A mean minus another, in points, by Welch.

    Attributes:
        value: The difference.
        error: Its standard error.
        freedom: Degrees of freedom (Welch and Satterthwaite).
    """

    value: float
    error: float
    freedom: float

    @classmethod
    def of(cls, group: Spread, baseline: Spread) -> Difference:
        """Return group − baseline, of two or more seeds each."""
        one, other = group.std**2 / group.seeds, baseline.std**2 / baseline.seeds
        total = one + other
        if not total:  # all seeds agree: there is no doubt left, whatever the degrees of freedom
            return cls(group.mean - baseline.mean, 0.0, 1.0)
        freedom = total**2 / (one**2 / (group.seeds - 1) + other**2 / (baseline.seeds - 1))
        return cls(group.mean - baseline.mean, math.sqrt(total), freedom)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the confidence interval that misses the true difference with probability ``level``."""
        from scipy.special import stdtrit  # imported where used: scipy takes a while, scipy.stats ten times that

        half = self.error * float(stdtrit(self.freedom, 1 - level / 2))
        return self.value - half, self.value + half

    def equivalence(self, margin: float) -> float:
        """Return the p-value of the two one-sided tests that the difference is within ± margin: the larger one."""
        from scipy.special import stdtr

        nearest = margin - abs(self.value)  # how far the nearer bound is
        if not self.error:
            return 0.0 if nearest > 0 else 1.0
        return float(stdtr(self.freedom, -nearest / self.error))

    def verdict(self, margin: float) -> str:
        """Return equivalent, worse, better or undecided, each at ``LEVEL``."""
        if self.equivalence(margin) < LEVEL:
            return EQUIVALENT
        low, high = self.interval()
        return WORSE if low > 0 else BETTER if high < 0 else UNDECIDED


def further_seeds(group: Spread, baseline: Spread, margin: float) -> int:
    """Return how many more seeds of both would decide, if means and stds stay what they are.

    The intervals shrink to the difference itself, so some number always does.
    """
    more = 1
    while _undecided(group, baseline, margin, more):
        more *= 2
    low, high = more // 2, more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _undecided(group, baseline, margin, middle) else (low, middle)
    return high


def _undecided(group: Spread, baseline: Spread, margin: float, more: int) -> bool:
    return Difference.of(group.with_more(more), baseline.with_more(more)).verdict(margin) == UNDECIDED


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline.

    Attributes:
        difference: Of the mean final errors, in points; None without a finished run of both.
        interval: Its 95 % confidence interval; None for a single seed of either.
        equivalence: p-value of the two one-sided tests.
        verdict: equivalent, worse, better, undecided; diverged where a run of either has no error; None for a single
            seed of either.
        further_seeds: Of an undecided one, how many more of both would decide.
    """

    difference: float | None = None
    interval: tuple[float, float] | None = None
    equivalence: float | None = None
    verdict: str | None = None
    further_seeds: int | None = None


def compare(group: Errors, baseline: Errors, margin: float, diverged: bool = False) -> Comparison:
    """Compare final errors; ``diverged`` says that a run of either has none.

    Raises:
        ValueError: ``margin`` is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"a margin of {margin} points leaves nothing to be equivalent")
    unjudged: str | None = DIVERGED if diverged else None
    if not group or not baseline:
        return Comparison(verdict=unjudged)
    one, other = Spread.of(group), Spread.of(baseline)
    if min(one.seeds, other.seeds) < 2:
        return Comparison(one.mean - other.mean, verdict=unjudged)
    difference = Difference.of(one, other)
    verdict = unjudged or difference.verdict(margin)
    return Comparison(
        difference.value,
        difference.interval(),
        difference.equivalence(margin),
        verdict,
        further_seeds(one, other, margin) if verdict == UNDECIDED else None,
    )


def in_band_from(group: Curves, baseline: Curves) -> int | None:
    """Return the first epoch, from 1, from which the group's mean stays within the baseline's mean ± ``BAND`` std.

    Args:
        group: Training errors of its runs, (runs, epochs).
        baseline: Those of the baseline's, (runs, epochs); two runs or more.

    Returns:
        None where the last epoch lies outside.
    """
    half = BAND * baseline.std(axis=0, ddof=1)
    distance: NDArray[Any] = np.abs(group.mean(axis=0) - baseline.mean(axis=0))
    # Equal curves differ by the rounding of their means.
    outside = np.flatnonzero(~(distance <= half + 1e-9))
    first = int(outside[-1]) + 2 if outside.size else 1
    return first if first <= group.shape[1] else None
