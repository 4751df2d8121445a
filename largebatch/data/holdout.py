"""A part of the training set that is never trained on, and is validated on instead of the validation images.

Whatever is chosen by looking at validation errors, such as a rate, is chosen on it: the validation images are then
new to everything that was chosen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.data.files import Names, Split
from largebatch.data.stream import HOLDOUT, hashes, key


def hold_out(total: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose what is held out of a training set: a function of the two numbers and the seed alone.

    Args:
        total: Images of the training set.
        count: Images that are held out.
        seed: ``dataset.holdout_seed``; the run's own seed has no part in it, so that all runs of a comparison, and an
            ensemble of them, are validated on the same images.

    Returns:
        Indices of what is trained on (total − count,) and of what is held out (count,), both int64 and rising.

    Raises:
        UserError: nothing would be left to train on.
    """
    if count >= total:
        raise UserError(
            f"dataset.holdout={count} leaves nothing of the {total} training images to train on: hold out fewer."
        )
    order = torch.argsort(hashes(key(seed, HOLDOUT), torch.arange(total)), stable=True)
    return order[count:].sort().values, order[:count].sort().values


@dataclass(frozen=True)
class Part(Split):
    """Some images of a split: those at ``rows`` (N,) of ``whole``."""

    whole: Split
    rows: Tensor

    @classmethod
    def of(cls, whole: Split, rows: Tensor) -> Part:
        """Take a part; every class stays, though the part may have no image of it."""
        chosen = rows.numpy()
        names = Names.of(os.fsencode(whole.names[int(row)]) for row in chosen)
        return cls(np.asarray(whole.labels)[chosen], names, whole.classes, whole, rows)

    def read(self, index: int) -> bytes:
        """Read it where it lies in the whole."""
        return self.whole.read(int(self.rows[index]))

    def where(self, index: int) -> str:
        """Say where it lies in the whole."""
        return self.whole.where(int(self.rows[index]))

    def sizes(self, rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Ask the whole."""
        return self.whole.sizes(self.rows.tolist() if rows is None else [int(self.rows[row]) for row in rows])
