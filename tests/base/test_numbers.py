import math

import pytest

from largebatch.base.numbers import final_error, mean_and_std, paired_difference, relative_difference


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([90.0, 80.0, 24.0, 23.0, 25.0, 22.0, 26.0], 24.0),  # the best epoch would be 22, the last 26
        ([30.0, 20.0], 25.0),
        ([40.0], 40.0),
    ],
)
def test_a_runs_error_is_the_median_of_its_last_five_epochs(errors, expected):
    assert final_error(errors) == expected


def test_a_run_without_an_epoch_has_no_error():
    with pytest.raises(ValueError, match="no final error"):
        final_error([])


def test_std_is_of_the_sample():
    assert mean_and_std([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3)))


def test_one_value_has_no_std():
    mean, std = mean_and_std([3.0])
    assert mean == 3.0
    assert math.isnan(std)


@pytest.mark.parametrize(
    ("difference", "norm", "of_all", "expected"),
    [
        (0.5, 2.0, 10.0, 0.25),
        (0.5, 0.0, 10.0, 50.0),  # a tensor of zeros is measured against 10⁻³ of all
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, math.inf),
    ],
)
def test_relative_difference(difference, norm, of_all, expected):
    assert relative_difference(difference, norm, of_all) == expected


def test_paired_classifiers():
    low, high, p_value = paired_difference(5, 15, 1000)
    # (15.5 − 5.5) / 1002 ± 1.96 √(21 / 1002 − 0.00998²) / √1002
    assert (low, high) == pytest.approx((0.001042, 0.018919), abs=1e-5)
    assert p_value == pytest.approx(2 * sum(math.comb(20, wrong) for wrong in range(6)) / 2**20)
    assert paired_difference(15, 5, 1000)[:2] == pytest.approx((-high, -low))
    low, high, p_value = paired_difference(0, 0, 100)
    assert (low, p_value) == (-high, 1)
    assert 0.01 < high < 0.03  # nothing differs, and yet 100 samples don't exclude a point or two
