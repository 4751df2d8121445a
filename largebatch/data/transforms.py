"""Crop, flip and normalise: over whole batches, with randomness that only the sample decides."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.data.stream import AUGMENT, hash_one, hashes, key, uniform_one

# Random scale and aspect ratio of a training crop (Szegedy et al., 2015), as torchvision draws them.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_CACHED = 2**17  # pixels that a core's cache holds as floats


@dataclass(frozen=True)
class Crops:
    """Parameters of a batch of crops of small images: int64 tensors of shape (batch,).

    ``top`` and ``left`` are the window's corner in the padded image, in pixels; ``flip`` is 0 or 1.
    """

    top: Tensor
    left: Tensor
    flip: Tensor

    def of(self, indices: Tensor) -> Crops:
        """Return the crops of some of the samples, by their place in these."""
        return Crops(self.top[indices], self.left[indices], self.flip[indices])


def draw_crops(seed: int, epoch: int, indices: Tensor, pad: int, flip: bool) -> Crops:
    """Draw window and flip for every sample from (seed, epoch, index) alone.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        indices: Samples in the training set, int64 of shape (batch,).
        pad: Zero padding on each side in pixels; 0 keeps the image whole.
        flip: Whether half of the images are mirrored.
    """
    root = key(seed, AUGMENT, epoch)
    top, left = (hashes(root, indices, draw) % (2 * pad + 1) for draw in (0, 1))
    mirrored = hashes(root, indices, 2) % 2 if flip else torch.zeros_like(indices)
    return Crops(top, left, mirrored)


def crop_and_flip(images: Tensor, crops: Crops, pad: int) -> Tensor:
    """Cut every image's window out of its zero-padded self; shape and dtype (batch, C, H, W) stay."""
    height, width = images.shape[-2:]
    device = images.device
    rows = crops.top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = torch.where(crops.flip[:, None] == 1, width - 1 - columns, columns) + crops.left[:, None]
    padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
    places = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    cut = padded.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1))
    return cut.view(images.shape)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Turn uint8 pixels into (pixel / 255 − mean) / std, channel by channel.

    Args:
        images: uint8 of shape (batch, C, H, W).
        mean: C values for pixels in [0, 1].
        std: C values.
        dtype: float32 or float64.
    """
    scale, shift = _scale_and_shift(mean, std, dtype, images.device)
    if images.device.type != "cpu":
        return images.to(dtype).mul_(scale).add_(shift)
    # A few images at a time: what one operation leaves in the cache, the next one finds there.
    normalised = torch.empty_like(images, dtype=dtype)
    at_once = max(1, _CACHED // math.prod(images.shape[1:]))
    for to, pixels in zip(torch.split(normalised, at_once), torch.split(images, at_once), strict=True):
        to.copy_(pixels).mul_(scale).add_(shift)
    return normalised


@functools.cache  # made anew for every batch, they would make a GPU wait
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def draw_resized_crop(
    seed: int, epoch: int, index: int, width: int, height: int, flip: bool
) -> tuple[tuple[int, int, int, int], bool]:
    """Draw a crop of random area and aspect ratio for one image of a folder.

    Up to ten attempts at an area of 8–100 % and a ratio of 3/4–4/3, then the largest central crop within those
    ratios: the distribution of torchvision's RandomResizedCrop.

    Returns:
        (top, left, height, width) in pixels of the original, and whether to mirror the crop.
    """
    root = key(seed, AUGMENT, epoch)
    mirrored = flip and hash_one(root, index, 0) % 2 == 1
    for attempt in range(_ATTEMPTS):
        area, ratio, down, right = (uniform_one(root, index, 1 + 4 * attempt + draw) for draw in range(4))
        target = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (int(down * (height - h + 1)), int(right * (width - w + 1)), h, w), mirrored
    w, h = width, height
    if width / height < _RATIO[0]:
        h = max(1, round(width / _RATIO[0]))
    elif width / height > _RATIO[1]:
        w = max(1, round(height * _RATIO[1]))
    return ((height - h) // 2, (width - w) // 2, h, w), mirrored
