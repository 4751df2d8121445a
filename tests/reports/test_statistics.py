import math
import random

import numpy as np
import pytest
from scipy import stats

from largebatch.reports.statistics import Comparison, Difference, Spread, compare, further_seeds, in_band_from


def test_welch_by_hand():
    # 24, 25, 26: mean 25, variance 1, over 3 seeds 1/3. 20, 22: mean 21, variance 2, over 2 seeds 1.
    # Standard error √(1/3 + 1) = √(4/3). Freedom (4/3)² / ((1/3)²/2 + 1²/1) = (16/9) / (19/18) = 32/19.
    difference = Difference.of(Spread.of([24, 25, 26]), Spread.of([20, 22]))
    assert difference.value == pytest.approx(4)
    assert difference.error == pytest.approx(math.sqrt(4 / 3))
    assert difference.freedom == pytest.approx(32 / 19)


def test_an_interval_by_a_table_of_t():
    # Two groups of 5 with variance 0.02 each: error √(0.02/5 + 0.02/5) = √0.008, freedom 8, and t(0.975, 8) = 2.306,
    # t(0.95, 8) = 1.860 in any table.
    spread = Spread(5, 23.0, math.sqrt(0.02))
    difference = Difference.of(Spread(5, 23.2, math.sqrt(0.02)), spread)
    assert difference.freedom == pytest.approx(8)
    half = 2.306 * math.sqrt(0.008)  # 0.2063
    assert difference.interval() == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
    # Equivalent where the 90 % interval, up to 0.2 + 1.860 · √0.008 = 0.3664, lies within the margin.
    assert difference.verdict(0.367) == "equivalent"
    assert difference.verdict(0.366) == "undecided"


def test_the_papers_own_numbers():
    # Table 1: gradual warmup is equivalent within half a point (its 90 % interval is 0.14 ± 0.13), no warmup worse.
    baseline = Spread(5, 23.60, 0.12)
    assert Difference.of(Spread(5, 23.74, 0.09), baseline).verdict(0.5) == "equivalent"
    assert Difference.of(Spread(5, 24.84, 0.37), baseline).verdict(0.5) == "worse"
    assert Difference.of(baseline, Spread(5, 24.84, 0.37)).verdict(0.5) == "better"


@pytest.mark.parametrize("seed", range(5))
def test_scipy_agrees(seed):
    noise = random.Random(seed)
    one = [noise.gauss(24, 0.5) for _ in range(2 + seed)]
    other = [noise.gauss(23.8, 0.2) for _ in range(5)]
    comparison = compare(one, other, 0.5)
    welch = stats.ttest_ind(one, other, equal_var=False)
    assert comparison.interval == pytest.approx(tuple(welch.confidence_interval(0.95)))
    shift = np.array(one)
    above = stats.ttest_ind(shift + 0.5, other, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(shift - 0.5, other, equal_var=False, alternative="less").pvalue
    assert comparison.equivalence == pytest.approx(max(above, below))
    assert comparison.verdict == (
        "equivalent"
        if max(above, below) < 0.05
        else "undecided"
        if welch.pvalue > 0.05
        else "worse"
        if welch.statistic > 0
        else "better"
    )


def test_a_difference_that_is_sure_but_small_is_equivalent():
    assert compare([23.2, 23.21, 23.19], [23.0, 23.01, 22.99], 0.5).verdict == "equivalent"
    assert compare([23.2, 23.21, 23.19], [23.0, 23.01, 22.99], 0.1).verdict == "worse"


def test_further_seeds_are_the_fewest_that_decide():
    group, baseline = Spread(3, 0.83, 0.48), Spread(3, 0.65, 0.32)
    more = further_seeds(group, baseline, 0.5)
    verdicts = [Difference.of(group.with_more(m), baseline.with_more(m)).verdict(0.5) for m in range(more + 3)]
    assert verdicts == ["undecided"] * more + ["equivalent"] * 3


def test_further_seeds_by_hand():
    # Equal means, variance 1 in each of 5 seeds: freedom 2(s − 1), error √(2/s), so equivalent within 1 point where
    # t(0.95, 2s − 2) √(2/s) < 1. With s = 6: 1.812 · 0.577 = 1.046. With s = 7: 1.782 · 0.535 = 0.953.
    spread = Spread(5, 20.0, 1.0)
    assert further_seeds(spread, spread, 1.0) == 2


def test_a_single_seed_has_no_std_and_no_verdict():
    assert math.isnan(Spread.of([24.0]).std)
    assert compare([24.0], [23.0, 23.5], 0.5) == Comparison(difference=0.75)
    assert compare([24.0, 25.0], [23.0], 0.5) == Comparison(difference=1.5)


def test_nothing_finished_has_no_difference():
    assert compare([], [23.0, 23.5], 0.5) == Comparison()
    assert compare([24.0], [], 0.5, diverged=True) == Comparison(verdict="diverged")


def test_a_group_that_lost_a_run_is_not_judged_by_the_others():
    comparison = compare([24.0, 24.1, 24.2], [24.0, 24.1, 24.2], 0.5, diverged=True)
    assert comparison.verdict == "diverged"
    assert comparison.difference == 0
    assert comparison.further_seeds is None


def test_seeds_that_all_agree_leave_no_doubt():
    assert compare([90.0, 90.0], [90.0, 90.0], 0.5) == Comparison(0.0, (0.0, 0.0), 0.0, "equivalent")
    assert compare([90.0, 90.0], [20.0, 20.0], 0.5) == Comparison(70.0, (70.0, 70.0), 1.0, "worse")


@pytest.mark.parametrize("margin", [0, -1, math.nan])
def test_a_margin_is_above_zero(margin):
    with pytest.raises(ValueError, match="nothing to be equivalent"):
        compare([1.0], [1.0], margin)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        # The baseline's mean is 50, 30, 20, 10, and its std √2 = 1.414: the band is ± 2.828.
        ([50.0, 30.0, 20.0, 10.0], 1),
        ([60.0, 32.9, 22.8, 12.8], 3),
        ([60.0, 32.8, 22.8, 7.2], 2),
        ([50.0, 30.0, 17.1, 10.0], 4),  # in, out below, and in again
        ([50.0, 30.0, 20.0, 12.9], None),
        ([50.0, 30.0, math.nan, 10.0], 4),
    ],
)
def test_in_band_is_from_the_epoch_after_the_last_outside(group, expected):
    baseline = np.array([[49.0, 29.0, 19.0, 9.0], [51.0, 31.0, 21.0, 11.0]])
    assert in_band_from(np.array([group]), baseline) == expected


def test_the_groups_mean_counts_not_its_runs():
    baseline = np.array([[19.0, 9.0], [21.0, 11.0]])
    assert in_band_from(np.array([[10.0, 5.0], [30.0, 15.0]]), baseline) == 1
