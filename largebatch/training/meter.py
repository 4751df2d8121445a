"""Figures of all k workers, summed so that the sum has the same bits for any number of processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.runtime.world import World

SECONDS = 2.0  # between two looks for signals: a scheduler's notice may leave no more than half a minute
MOST = 1000  # iterations whose figures wait to be read
FIGURES = 4  # of a worker in a step: summed loss, samples right, losses not finite, images replaced


def wide(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def worker_figures(passes: Sequence[tuple[Tensor, Tensor, int]], n: int) -> Tensor:
    """Return a row of FIGURES for each worker, all passes at once: these small operations show in a small network.

    Args:
        passes: Of each the losses, which of the samples are right, and how many images were replaced.
        n: Samples a worker.
    """
    all_losses, all_right, replaced = zip(*passes, strict=True)
    losses, right = torch.cat(all_losses).view(-1, n), torch.cat(all_right).view(-1, n).sum(1)
    losses = losses.to(wide(losses.device))
    rows = torch.stack([losses.sum(1), right, (~losses.isfinite()).sum(1), torch.zeros_like(right)], dim=1)
    count_replaced(rows, replaced)
    return rows


def count_replaced(rows: Tensor, replaced: Sequence[int]) -> None:
    """Write how many images each pass of a step replaced into the row of its first worker.

    Args:
        rows: (workers, FIGURES), in place.
        replaced: One number a pass.
    """
    if any(replaced):  # seldom: a number that goes to a GPU makes it wait
        rows[:: len(rows) // len(replaced), -1] = torch.tensor(replaced, dtype=rows.dtype, device=rows.device)


@dataclass
class Sums:
    """Figures summed over samples: of an epoch so far (part of a checkpoint), or since the last line."""

    loss: float = 0.0
    right: int = 0
    nonfinite: int = 0
    replaced: int = 0
    seen: int = 0

    def add(self, rows: Tensor, seen: int) -> None:
        """Add rows of FIGURES over ``seen`` samples."""
        loss, right, nonfinite, replaced = rows.sum(0).tolist()
        self.loss += loss
        self.right += int(right)
        self.nonfinite += int(nonfinite)
        self.replaced += int(replaced)
        self.seen += seen

    @property
    def error(self) -> float:
        """Top-1 error in %, of each sample when it was trained on (the paper's training curves)."""
        return 100 * (self.seen - self.right) / self.seen

    @property
    def mean_loss(self) -> float:
        """Cross-entropy a sample."""
        return self.loss / self.seen


@dataclass(frozen=True)
class Wishes:
    """Actions that a process requests after this iteration; all processes take each other's requests."""

    interrupt: bool = False
    end: bool = False
    notice: bool = False
    save: bool = False

    @property
    def signal(self) -> str:
        """The signal that the run is to end for, "" where there is none."""
        return "SIGINT" if self.interrupt else "SIGTERM" if self.end else "SIGUSR1" if self.notice else ""


class Meter:
    """Gathers a row of figures a worker, and reads them all with one sum over the processes.

    Figures are added step by step, so that no sum depends on how often they are read.

    Args:
        k: Logical workers of the run.
        first: The first of this process's.
        world: The processes that share them.

    Attributes:
        look_every: Iterations that take about SECONDS, by rank 0's clock at the last reading; equal in all processes.
    """

    def __init__(self, k: int, first: int, world: World) -> None:
        self._k, self._first, self._world = k, first, world
        self._steps: list[Tensor] = []
        self._seen: list[int] = []
        self._since = time.monotonic()
        self.look_every = 1

    def add(self, rows: Tensor, seen: int) -> None:
        """Add a step's figures, over ``seen`` samples in all processes; waits for nothing."""
        # A worker's row is filled by its owner alone, so that the sum over processes adds zeros to it and nothing else.
        step = torch.zeros((self._k, FIGURES), dtype=wide(rows.device), device=rows.device)
        step[self._first : self._first + len(rows)] = rows
        self._steps.append(step)
        self._seen.append(seen)

    def read(self, wishes: Wishes, *sums: Sums) -> Wishes:
        """Add what has gathered to ``sums``, and return what any process wishes."""
        seconds = (time.monotonic() - self._since) / max(1, len(self._steps))
        enough = float(min(MOST, max(1, int(SECONDS / max(seconds, 1e-9)))))
        # The last two rows count the processes that have each wish, and carry rank 0's number of iterations.
        mine = [[wishes.interrupt, wishes.end, wishes.notice, wishes.save], [enough * self._world.main, 0, 0, 0]]
        device = self._world.device
        rows = torch.cat([*self._steps, torch.tensor(mine, dtype=wide(device), device=device)])
        rows = self._world.sum(rows).cpu()
        for step, seen in zip(rows[:-2].view(-1, self._k, FIGURES), self._seen, strict=True):
            for total in sums:
                total.add(step, seen)
        self.look_every = int(rows[-1, 0])
        self._steps, self._seen, self._since = [], [], time.monotonic()
        return Wishes(*(rows[-2] > 0).tolist())
