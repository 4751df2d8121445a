"""Affine quantization of numbers: scale, zero point, and back.

A number x of a range [α, β] becomes an integer of b bits, x_q = clip(round(x / s + z), α_q, β_q), which is read as
s · (x_q − z), with s = (β − α) / (β_q − α_q) and z = round((β · α_q − α · β_q) / (β − α)), an integer within
[α_q, β_q]. Rounding is to the nearest integer, ties to even. The range is widened to hold 0, which is then exact:
padding and ReLU add no error.

A tie is where x / s lies half-way between two integers. There round(x / s + z), which is used here, and
round(x / s) + z, as PyTorch and ONNX compute it, go to different sides if z is odd, since adding z turns even into odd.
They are one unit apart, and both have the error s / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from largebatch.base.errors import UserError

FEWEST_BITS, MOST_BITS = 2, 8
LARGEST = 2**30


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the least and the greatest integer of ``bits`` bits: α_q and β_q.

    Raises:
        UserError: bits outside 2 … 8.
    """
    if not FEWEST_BITS <= bits <= MOST_BITS:
        raise UserError(f"bits={bits} is not possible: integers have {FEWEST_BITS} to {MOST_BITS} bits.")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def scale_and_zero_point(
    low: Tensor, high: Tensor, bits: int = 8, signed: bool = False, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return how numbers of a range are quantized, element by element: a scalar per tensor, a vector per channel.

    Symmetric ranges reach as far to both sides of 0, and leave the least integer unused: z is 0 if signed, else
    2^(b−1). A range of 0 alone has scale 1.

    Args:
        low: α, of any shape.
        high: β, of the same shape, nowhere below α.
        bits: b, from 2 to 8.
        signed: Whether integers are signed.
        symmetric: Whether the range is made symmetric.

    Returns:
        s, float32 and above 0, and z, int32.

    Raises:
        UserError: bits outside 2 … 8, a range that is not finite or too wide for float32, or one that ends before it
            begins.
    """
    least, greatest = integer_range(bits, signed)
    low, high = low.double(), high.double()
    if not (low.isfinite() & high.isfinite()).all():
        raise UserError(
            "a range of values that are not finite (NaN or infinite) has no scale: look where they come from."
        )
    if (low > high).any():
        raise UserError(f"a range from {low.max():g} to {high.min():g} ends before it begins.")
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
        least += 1
    width = high - low
    if (width > torch.finfo(torch.float32).max).any():
        raise UserError(f"a range of width {width.max():g} is too wide: float32 ends at 3.4e38.")
    point = width == 0
    # Below the least normal float32 a scale would lose its bits, or be 0.
    scale = (width / (greatest - least)).clamp(min=torch.finfo(torch.float32).tiny).float()
    zero = (high * least - low * greatest) / width.where(~point, 1)
    zero = zero.where(~point, (least + greatest) // 2 if symmetric else max(least, 0))
    return scale.where(~point, 1), zero.round().clamp(least, greatest).int()


def quantize(
    values: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8, signed: bool = False, axis: int | None = None
) -> Tensor:
    """Return the integers of numbers: uint8, or int8 if signed. Numbers beyond the range become its ends, however far.

    Args:
        values: Any shape, finite.
        scale: s, a scalar; with ``axis`` a vector, an element a channel; finite and above 0.
        zero_point: z, likewise; an integer of ``bits`` bits.
        bits: b, from 2 to 8.
        signed: Whether integers are signed.
        axis: The dimension of the channels; None: one scale for all.

    Raises:
        UserError: bits outside 2 … 8, values that are not finite, or a scale or zero point that is none.
    """
    least, greatest = integer_range(bits, signed)
    _check(scale, zero_point, least, greatest)
    if not values.isfinite().all():
        raise UserError("values that are not finite (NaN or infinite) have no integers: look where they come from.")
    scaled = values / _along(scale, values, axis) + _along(zero_point, values, axis)
    return scaled.round().clamp(least, greatest).to(torch.int8 if signed else torch.uint8)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Return what integers stand for, s · (x_q − z), in float32.

    Args:
        integers: Any shape, of magnitude at most 2^30, so that a zero point can be taken off in int32.
        scale: s, as in :func:`quantize`.
        zero_point: z, likewise.
        axis: The dimension of the channels, likewise.

    Raises:
        UserError: integers beyond that, or a scale or zero point that is none.
    """
    _check(scale, zero_point, -128, 255)
    if integers.dtype not in (torch.int8, torch.uint8) and integers.numel():
        least, greatest = (int(end) for end in integers.aminmax())
        if max(-least, greatest) > LARGEST:
            raise UserError(f"integers from {least} to {greatest} are too large: 8 bits need no more than 255.")
    return (integers.int() - _along(zero_point, integers, axis)) * _along(scale, integers, axis)


def _check(scale: Tensor, zero_point: Tensor, least: int, greatest: int) -> None:
    """Refuse scales by which nothing can be divided, and zero points that are no integers of the range."""
    if not ((scale > 0) & scale.isfinite()).all():
        worst = scale[~((scale > 0) & scale.isfinite())].flatten()[0]
        raise UserError(f"a scale of {float(worst):g} is not allowed: it must be a finite number above 0.")
    if ((zero_point < least) | (zero_point > greatest) | (zero_point != zero_point.round())).any():
        low, high = (float(end) for end in zero_point.aminmax())
        raise UserError(f"zero points from {low:g} to {high:g} are not integers from {least} to {greatest}.")


def _along(per_channel: Tensor, values: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return per_channel
    shape = [1] * values.dim()
    shape[axis] = -1
    return per_channel.view(shape)
