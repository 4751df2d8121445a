"""A step ends when the slowest of p processes does: how much later than their mean that is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np


@cache
def normal_maximum(draws: int) -> float:
    """Return the expected largest of ``draws`` independent standard normal numbers: 0, 0.564 of two, … 4.29 of 65,536.

    E[max] = ∫₀^∞ (1 − Φ(x)^p) dx − ∫₋∞^0 Φ(x)^p dx, by the trapezoidal rule, whose error here is below 10⁻⁹.
    """
    if draws == 1:
        return 0.0
    from scipy.special import log_ndtr  # takes long to import

    x = np.linspace(0.0, 12.0, 24_001)
    above = -np.expm1(draws * log_ndtr(x))
    below = np.exp(draws * log_ndtr(-x))
    return float(np.trapezoid(above - below, x))


def measured_maximum(values: Sequence[float], draws: int) -> float:
    """Return the expected largest of ``draws`` from these values, with replacement: exact, where a bootstrap draws.

    E[max] = Σ x₍ᵢ₎ ((i/N)^p − ((i − 1)/N)^p). It never exceeds the largest value, so it is a lower bound where p is
    much more than N.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    shares = (np.arange(len(ordered) + 1) / len(ordered)) ** draws
    return float(ordered @ np.diff(shares))
