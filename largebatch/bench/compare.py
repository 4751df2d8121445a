"""Sides that take turns: a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Side:
    """One of the things compared: a ``turn`` is a call that handles ``images`` images and waits until it is done.

    ``prepare`` comes before each turn and is not timed.
    """

    turn: Callable[[], None]
    images: int
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Spread:
    """``low`` to ``high`` holds the true median in 19 of 20 measurements; from under six values, in fewer."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and its 95 % confidence interval from order statistics, which assumes no distribution.

    The interval runs from the r-th smallest to the r-th largest value, r the largest with
    2 · P(Binomial(N, 1/2) < r) ≤ 0.05 (Conover, 1999, section 3.2); r = 1 where there is none, for N < 6.
    """
    ordered = sorted(values)
    total, rank, outside = len(ordered), 1, 1
    while 2 * (outside + math.comb(total, rank)) <= 0.05 * 2**total:
        outside += math.comb(total, rank)
        rank += 1
    return Spread(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


@dataclass(frozen=True)
class Timings:
    """Seconds of every side's turns, in order, and the images of a turn."""

    seconds: Mapping[str, Sequence[float]]
    images: Mapping[str, int]

    def speed(self, name: str) -> float:
        """Return images/s in a side's median turn."""
        return self.images[name] / statistics.median(self.seconds[name])

    def ratio(self, ours: str, peer: str) -> Spread:
        """Return ours over the peer in images/s, over pairs of neighbouring turns: above 1, ours is faster."""
        share = self.images[ours] / self.images[peer]
        pairs = zip(self.seconds[ours], self.seconds[peer], strict=True)
        return spread([share * theirs / mine for mine, theirs in pairs])

    def cost(self, ours: str, peer: str) -> Spread:
        """Return ours over the peer in seconds a turn, over pairs of neighbouring turns: below 1, ours is faster."""
        pairs = zip(self.seconds[ours], self.seconds[peer], strict=True)
        return spread([mine / theirs for mine, theirs in pairs])


def take_turns(
    sides: Mapping[str, Side],
    repeats: int,
    what: str,
    shown: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time the sides A B, B A, A B … after one turn each to warm up.

    Args:
        sides: By name.
        repeats: Timed turns of each.
        what: The progress bar's name, on a terminal's stderr.
        shown: Whether there is one.
        clock: Seconds: of the wall, or time.process_time for what a core does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    turns = (repeats + 1) * len(sides)
    with tqdm(total=turns, desc=what, unit="turn", disable=None if shown else True, leave=False) as bar:
        for repeat in range(repeats + 1):
            for name in order:
                sides[name].prepare()
                started = clock()
                sides[name].turn()
                if repeat:
                    seconds[name].append(clock() - started)
                bar.update()
            order.reverse()  # who goes first has no advantage
    return Timings(seconds, {name: side.images for name, side in sides.items()})
