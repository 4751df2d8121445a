"""Numbers from numbers: the paper's error of a run, and what several seeds say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FINAL_EPOCHS = 5


def final_error(errors: Sequence[float]) -> float:
    """Return a run's error: the median over its last five epochs (section 5.1).

    Args:
        errors: Validation error of every epoch in order, in %. Fewer than five: the median of those.

    Raises:
        ValueError: there is no epoch.
    """
    if not errors:
        raise ValueError("a run without a validated epoch has no final error")
    return statistics.median(errors[-FINAL_EPOCHS:])


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n − 1); the latter is NaN for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def relative_difference(difference: float, norm: float, norm_of_all: float) -> float:
    """Return ‖a − b‖ / max(‖a‖, 10⁻³ × the norm of all tensors).

    The floor keeps a tensor that is zero by construction (the gradients behind a zero γ) from dividing by
    nothing.
    """
    floor = max(norm, 1e-3 * norm_of_all)
    return difference / floor if floor else (0.0 if difference == 0 else math.inf)
