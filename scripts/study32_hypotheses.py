"""Judge the hypotheses of results/study32/plan.md by the records, as far as there are records.

    python scripts/study32_hypotheses.py

Written before any arm was run. A comparison is judged as soon as both of its sides have two seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from study32 import MARGIN, MORE_SEEDS, RECORDS, RUNS, SEEDS, SIZES, finished, largest_that_holds

from largebatch.records.runs import Run
from largebatch.reports.statistics import DIVERGED, EQUIVALENT, Comparison, compare

EARLY_EPOCHS = 6  # 20 of the paper's 90, of 30: training curves are compared from the next epoch on


@dataclass(frozen=True)
class Judged:
    """One comparison: the hypothesis that it belongs to, in words, its figures, and whether it is as expected."""

    hypothesis: int
    what: str
    figures: str
    as_expected: bool


def runs_of(found: Mapping[str, Run], name: str, k: int) -> list[Run]:
    """Return the runs of an arm that are over, by seed."""
    names = (f"{name}-k{k}-s{seed}" for seed in (*SEEDS, *MORE_SEEDS))
    return [found[one] for one in names if one in found]


def errors_of(runs: Sequence[Run]) -> list[float]:
    """Return the final errors of the runs that are done, in %."""
    return [run.final_error for run in runs if run.final_error is not None]


def held(found: Mapping[str, Run]) -> int | None:
    """Return the largest k that holds, or None while runs that decide it are missing."""
    runs = {k: [found.get(f"figure1-k{k}-s{seed}") for seed in SEEDS] for k in SIZES}
    if any(run is None for several in runs.values() for run in several):
        return None
    whole = {k: errors_of([run for run in several if run]) for k, several in runs.items()}
    return largest_that_holds({k: errors for k, errors in whole.items() if len(errors) == len(SEEDS)})


def against(found: Mapping[str, Run], one: tuple[str, int], other: tuple[str, int]) -> Comparison | None:
    """Compare two arms, each a name and its k: the first one's error minus the other's; None for too few seeds."""
    sides = [runs_of(found, *arm) for arm in (one, other)]
    if min(map(len, sides)) < 2:
        return None
    diverged = any(run.status == "diverged" for side in sides for run in side)
    return compare(errors_of(sides[0]), errors_of(sides[1]), MARGIN, diverged)


def is_higher(comparison: Comparison) -> bool:
    """Whether the first error is the higher one: the 95 % interval lies above 0, or a run has diverged."""
    return comparison.verdict == DIVERGED or (comparison.interval is not None and comparison.interval[0] > 0)


def is_lower(comparison: Comparison) -> bool:
    """Whether the first error is the lower one: the 95 % interval lies below 0."""
    return comparison.interval is not None and comparison.interval[1] < 0


def in_figures(comparison: Comparison) -> str:
    """Return difference, interval and verdict."""
    if comparison.difference is None or comparison.interval is None:
        return str(comparison.verdict)
    low, high = comparison.interval
    return f"{comparison.difference:+.2f} [{low:+.2f}, {high:+.2f}] {comparison.verdict}"


def judge(found: Mapping[str, Run]) -> Iterator[Judged]:
    """Yield every comparison of the plan that the runs allow, in the plan's order."""
    baseline = ("figure1", 1)
    for k in SIZES[1:]:
        if comparison := against(found, ("figure1", k), baseline):
            expected = comparison.verdict == EQUIVALENT if k <= 32 else is_higher(comparison)
            yield Judged(1, f"k = {k} and k = 1", in_figures(comparison), expected)
    h = held(found)
    if h is None:
        return
    for k in (h, 2 * h):
        for name in ("none", "constant"):
            if comparison := against(found, (name, k), ("figure1", k)):
                what = f"k = {k}: {name} and gradual warmup"
                yield Judged(2, what, in_figures(comparison), is_higher(comparison))
    for name, worse in (("sqrt", True), ("unscaled", True), ("half", False), ("double", False)):
        if comparison := against(found, (name, h), ("figure1", h)):
            expected = is_higher(comparison) if worse else not is_lower(comparison)
            yield Judged(3, f"k = {h}: {name} and linear", in_figures(comparison), expected)
    if comparison := against(found, ("gamma0", h), ("gamma1", h)):
        yield Judged(4, f"k = {h}: γ = 0 and γ = 1", in_figures(comparison), is_lower(comparison))
    yield from _curves(found, h)
    for name, k in (("n8", 4 * h), ("n128", max(1, h // 4))):
        if comparison := against(found, (name, k), ("figure1", h)):
            what = f"minibatch of k = {h}: n = {name[1:]} and n = 32"
            yield Judged(7, what, in_figures(comparison), comparison.verdict == EQUIVALENT)


def _curves(found: Mapping[str, Run], h: int) -> Iterator[Judged]:
    """Judge training curves: do they meet, and do those of the k that keep the test error, and no others?"""
    done = {k: [run for run in runs_of(found, "figure1", k) if run.status == "done"] for k in SIZES}
    means = {k: np.mean([run.epochs["train_error"] for run in runs], axis=0) for k, runs in done.items() if runs}
    apart = {k: float(np.abs(curve - means[1])[EARLY_EPOCHS:].max()) for k, curve in means.items() if 1 < k <= h}
    for k, distance in apart.items():
        what = f"k = {k}: training error from epoch {EARLY_EPOCHS + 1} on"
        yield Judged(5, what, f"{distance:.2f} points apart at most", distance <= MARGIN)
    base = float(np.mean(errors_of(done[1])))
    met = {k: bool(abs(curve[-1] - means[1][-1]) <= MARGIN) for k, curve in means.items() if k > 1}
    kept = {k: bool(abs(np.mean(errors_of(done[k])) - base) <= MARGIN) for k in met}
    misled = [k for k in met if met[k] != kept[k]]
    figures = f"not for k = {', '.join(map(str, misled))}" if misled else f"for every k of {len(met)}"
    yield Judged(5, "training error tells whether the test error is kept", figures, not misled)


def main() -> None:
    """Print a line a comparison."""
    found = finished(RUNS, RECORDS)
    print(f"{len(found)} runs are over. Differences in points, with 95 % intervals; margin ± {MARGIN} points.")
    for one in judge(found):
        print(f"{one.hypothesis}  {one.what:<48} {one.figures:<40} {'' if one.as_expected else 'NOT '}as expected")


if __name__ == "__main__":
    main()
