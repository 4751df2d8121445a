"""Expected largest values against closed forms, enumeration and sampling."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest

from largebatch.cost_model.stragglers import measured_maximum, normal_maximum


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        (1, 0.0),
        (2, 1 / math.sqrt(math.pi)),
        (3, 3 / (2 * math.sqrt(math.pi))),
        (4, 6 / math.sqrt(math.pi) * math.atan(math.sqrt(2)) / math.pi),  # David and Nagaraja, Order Statistics, 3.2
        (10, 1.538752730835),  # the usual tables
        (100, 2.507593635),
    ],
)
def test_the_largest_of_normal_numbers(draws, expected):
    assert normal_maximum(draws) == pytest.approx(expected, abs=1e-8)


def test_the_largest_of_65536_as_numbers_are_drawn():
    drawn = np.random.default_rng(0).standard_normal((100, 65_536)).max(axis=1)
    assert normal_maximum(65_536) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(100))


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_largest_of_measured_values_is_the_mean_over_all_draws(draws):
    values = [3.0, 1.0, 1.0, 7.0]
    every = fmean(max(drawn) for drawn in itertools.product(values, repeat=draws))
    assert measured_maximum(values, draws) == pytest.approx(every)


def test_many_draws_meet_the_slowest():
    assert measured_maximum([1.0, 2.0, 9.0], 1000) == pytest.approx(9.0)
