"""Numbers from numbers: the paper's error of a run, and what several seeds say."""

from __future__ import annotations

import math
import re
import statistics
import typing
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from largebatch.base.errors import UserError

FINAL_EPOCHS = 5
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
T = TypeVar("T", bound="Summable")


class Summable(Protocol):
    """A number, or a tensor."""

    def __add__(self: T, other: T, /) -> T:
        """Return the sum."""


class PairwiseSum(Generic[T]):
    """A sum in one fixed binary tree over its terms in order, with log2 of them in memory at most.

    The tree over 2^a consecutive terms is a subtree of that over 2^b: partial sums of equal, aligned blocks,
    made anywhere, combine to the same bits.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, T]] = []  # (terms, their sum), fewer and fewer terms towards the top

    def add(self, value: T) -> None:
        """Add the next term."""
        terms = 1
        while self._stack and self._stack[-1][0] == terms:
            value = self._stack.pop()[1] + value
            terms *= 2
        self._stack.append((terms, value))

    def total(self) -> T:
        """Return the sum, and forget it.

        Raises:
            ValueError: nothing was added.
        """
        if not self._stack:
            raise ValueError("a sum of no terms")
        _, total = self._stack.pop()
        while self._stack:  # only where the number of terms is no power of two
            total = self._stack.pop()[1] + total
        return total


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


def paired_difference(only_first: int, only_second: int, total: int) -> tuple[float, float, float]:
    """Compare two classifiers on the same samples (McNemar).

    Args:
        only_first: Samples that the first alone has wrong.
        only_second: Samples that the second alone has wrong.
        total: All samples.

    Returns:
        The ends of the 95 % interval of the difference of their error rates, second − first, as shares (Wald's with
        half a sample more in each of the four cells: Agresti and Min, 2005), and the exact two-sided p-value.
    """
    first, second, samples = only_first + 0.5, only_second + 0.5, total + 2
    difference = (second - first) / samples
    spread = 1.959964 * math.sqrt((first + second) / samples - difference**2) / math.sqrt(samples)
    apart = only_first + only_second
    tail = sum(math.comb(apart, wrong) for wrong in range(min(only_first, only_second) + 1))
    return difference - spread, difference + spread, min(1.0, 2 * tail / 2**apart)


def relative_difference(difference: float, norm: float, norm_of_all: float) -> float:
    """Return ‖a − b‖ / max(‖a‖, 10⁻³ × the norm of all tensors).

    The floor keeps a tensor that is zero by construction (the gradients behind a zero γ) from dividing by
    nothing.
    """
    floor = max(norm, 1e-3 * norm_of_all)
    return difference / floor if floor else (0.0 if difference == 0 else math.inf)


def listed(numbers: typing.Iterable[int]) -> str:
    """Return numbers as people write them in a sentence."""
    return ", ".join(map(str, numbers))


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, rising."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def byte_count(key: str, text: str) -> int:
    """Return a size such as 200MB, 1.5GiB or 4096 in bytes.

    Raises:
        UserError: it is not one, or is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    size = math.floor(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if not size:
        raise UserError(
            f"{key}={text} is not a size: it takes such as 200MB (10⁶ bytes each), 1.5GiB (2³⁰ bytes each) or a number "
            "of bytes."
        )
    return size
