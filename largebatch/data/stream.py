"""Order samples by seed and logical position alone, never by the hardware.

Worker j of iteration t takes the j-th slice of n of the t-th slice of kn of one permutation of the training set
an epoch (remark 4 of the paper). Every random choice is a hash (splitmix64) of the seed, the epoch and the
sample's index, so it needs no generator whose state would depend on who asked before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

# Purposes: each has random numbers of its own.
ORDER, AUGMENT, INITIALISE, DROPOUT, PROBE, HOLDOUT, OWN, TRANSFORM = range(8)


def _signed(value: int) -> int:
    """Return the two's-complement reading of 64 bits, which is what an int64 tensor holds."""
    return value - (1 << 64) if value >> 63 else value


def mix(value: int) -> int:
    """Return splitmix64's output for one 64-bit state (Steele, Lea and Flood, 2014)."""
    value = (value + _GOLDEN) & _MASK
    for shift, factor in _MIX:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """Return 64 bits that depend on every part and on their order, such as (seed, purpose, epoch)."""
    state = 0
    for part in parts:
        state = mix(state ^ (part & _MASK))
    return state


def _shift(value: Tensor, by: int) -> Tensor:
    """Shift right without the sign, which int64 would carry along."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def hashes(root: int, indices: Tensor, draw: int = 0) -> Tensor:
    """Return 63 random bits for every index.

    Args:
        root: From :func:`key`.
        indices: int64 of any shape, on any device.
        draw: Number of the random number wanted for each index.

    Returns:
        int64 of the same shape, 0 ≤ value < 2⁶³; equal to :func:`hash_one` element by element.
    """
    value = (indices ^ _signed(root)) + _signed(((draw + 1) * _GOLDEN) & _MASK)
    value = value + _signed(_GOLDEN)
    for shift, factor in _MIX:
        value = (value ^ _shift(value, shift)) * _signed(factor)
    return _shift(value ^ _shift(value, 31), 1)


def hash_one(root: int, index: int, draw: int = 0) -> int:
    """Return 63 random bits for one index: :func:`hashes` in plain Python, for loader processes."""
    return mix(((index ^ root) + (draw + 1) * _GOLDEN) & _MASK) >> 1


def uniform_one(root: int, index: int, draw: int = 0) -> float:
    """Return a float64 in [0, 1) for one index, from the top 53 of its random bits."""
    return (hash_one(root, index, draw) >> 10) * 2.0**-53


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of ``range(size)``: int64 of shape (size,), a function of (seed, epoch) alone."""
    return torch.argsort(hashes(key(seed, ORDER, epoch), torch.arange(size)), stable=True)


@dataclass
class SampleStream:
    """The samples of every worker at every iteration of a run.

    Attributes:
        size: Images in the training set.
        k: Logical workers.
        n: Samples a worker takes in an iteration.
        seed: The run's seed.
    """

    size: int
    k: int
    n: int
    seed: int
    _order: tuple[int, Tensor] | None = field(default=None, repr=False)

    @property
    def iterations_per_epoch(self) -> int:
        """Whole minibatches of kn in the training set."""
        return self.size // (self.k * self.n)

    def order(self, epoch: int) -> Tensor:
        """Return the epoch's permutation, int64 of shape (size,)."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.size, self.seed, epoch))
        return self._order[1]

    def samples(self, iteration: int, first_worker: int, workers: int) -> Tensor:
        """Return the indices of some consecutive workers' samples.

        Args:
            iteration: Counted from 0 over the whole run.
            first_worker: The first of them, 0 ≤ first_worker < k.
            workers: How many.

        Returns:
            int64 of shape (workers · n,), worker by worker.
        """
        epoch, within = divmod(iteration, self.iterations_per_epoch)
        start = (within * self.k + first_worker) * self.n
        return self.order(epoch)[start : start + workers * self.n]

    def passes(
        self, start: int, stop: int, first_worker: int, workers: int, workers_per_pass: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (epoch, indices) of every forward pass that one process makes in iterations [start, stop).

        Indices have shape (workers_per_pass · n,).
        """
        for iteration in range(start, stop):
            epoch = iteration // self.iterations_per_epoch
            for worker in range(first_worker, first_worker + workers, workers_per_pass):
                yield epoch, self.samples(iteration, worker, workers_per_pass)


@dataclass
class IndependentShuffles(SampleStream):
    """pitfall=independent_shuffle: each worker shuffles the whole set for itself and takes its own slices of n.

    In an epoch some samples come to several workers and others to none.
    """

    _orders: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def samples(self, iteration: int, first_worker: int, workers: int) -> Tensor:
        """Return the indices of some consecutive workers' samples, each from its own permutation."""
        epoch, within = divmod(iteration, self.iterations_per_epoch)
        slices = []
        for worker in range(first_worker, first_worker + workers):
            if (epoch, worker) not in self._orders:
                self._orders = {at: order for at, order in self._orders.items() if at[0] == epoch}
                self._orders[epoch, worker] = permutation(self.size, key(self.seed, worker), epoch)
            slices.append(self._orders[epoch, worker][within * self.n : (within + 1) * self.n])
        return torch.cat(slices)
