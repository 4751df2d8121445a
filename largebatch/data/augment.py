"""Transforms of the user's own for training images, with random numbers that (seed, epoch, index) decide alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.base.user_code import calling, load
from largebatch.data.stream import TRANSFORM, key


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the random numbers of torch, random and numpy begin at a seed, and put these generators back."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


class Transform:
    """A callable from (PIL image, generator) to a PIL image of the same size and mode.

    Args:
        name: ``dataset.transform``, module:callable; imported where it is first used, loader processes included.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, pixels: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """Return other pixels of the same shape.

        The generator that it is handed begins at (seed, epoch, index), as do those of torch, random and numpy.

        Args:
            pixels: uint8 (C, H, W).
            seed: The run's.
            epoch: From 0.
            index: Of the sample.

        Raises:
            UserError: it fails, or returns something else; or these are no pixels.
        """
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        call = f"dataset.transform={self._name}"
        expected = "called with (PIL image, torch.Generator), and has to return a PIL image of the same size and mode"
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) not in (1, 3, 4):
            raise UserError(
                f"{call} is {expected}: it takes images, uint8 (1 or 3, H, W), and these are {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}."
            )
        start = key(seed, TRANSFORM, epoch, index) >> 1
        function, image = load("dataset.transform", self._name), to_pil_image(pixels)
        with seeded(key(start)), calling(call, expected):
            other = function(image, torch.Generator().manual_seed(start))
        if not hasattr(other, "getbands") or (other.size, other.mode) != (image.size, image.mode):
            kind = f"{other.mode} of {other.size}" if hasattr(other, "getbands") else type(other).__name__
            raise UserError(f"{call} returned {kind} for {image.mode} of {image.size}: it is {expected}.")
        changed: Tensor = pil_to_tensor(other)
        return changed


def transform_of(name: str | None) -> Transform | None:
    """Return what ``dataset.transform`` names; None: nothing."""
    return None if name is None else Transform(name)
