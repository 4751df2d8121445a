"""Figures of all k workers, summed so that the sum has the same bits for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.runtime.world import World
from largebatch.training.validation import wide

FIGURES = 4  # of a worker in a step: summed loss, samples right, losses not finite, images replaced


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
    """What a process would like to happen after this iteration; all agree on what any of them wishes."""

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

    Args:
        k: Logical workers of the run.
        first: The first of this process's.
        world: The processes that share them.
    """

    def __init__(self, k: int, first: int, world: World) -> None:
        # A worker's row is filled by its owner alone, so that the sum adds zeros to it and nothing else; the
        # last row counts the processes that have each wish.
        self._rows = torch.zeros((k + 1, FIGURES), dtype=wide(world.device), device=world.device)
        self._first, self._world, self._seen = first, world, 0

    def add(self, rows: Tensor, seen: int) -> None:
        """Add a step's figures, over ``seen`` samples in all processes; waits for nothing."""
        self._rows[self._first : self._first + len(rows)] += rows
        self._seen += seen

    def read(self, wishes: Wishes, *sums: Sums) -> Wishes:
        """Add what has gathered to ``sums``, and return what any process wishes."""
        mine = (wishes.interrupt, wishes.end, wishes.notice, wishes.save)
        self._rows[-1] = torch.tensor(mine, dtype=self._rows.dtype)
        rows = self._world.sum(self._rows).cpu()
        for total in sums:
            total.add(rows[:-1], self._seen)
        # Before the rows are emptied: on the CPU both names mean the same memory.
        wished = Wishes(*(rows[-1] > 0).tolist())
        self._rows.zero_()
        self._seen = 0
        return wished
