# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The product of bytes on CUDA GPUs: matrix products and convolutions, in one Triton kernel.

A convolution is a matrix product whose rows are the pixels of its output and whose sum runs over places of the kernel,
then over channels; a matrix product is one with a single place. GPUs multiply signed bytes by signed bytes: x − 128 is
what is multiplied, and the rest of x − z, a constant of each output channel, is in the bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 · 2^23: in float32, what is added to it is rounded to a whole number, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def integer_product(
    x, weight, bias, multiplier, residual, y,
    rows, outputs, inputs, height, width, out_height, out_width,
    zero_x, zero_r, multiplier_r, zero_y, low, high,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr, STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr, PADDING_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr, DILATION_WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr, REAL: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write one tile of y, by :mod:`largebatch.quantization.network`'s arithmetic of ``conv``.

    x is uint8 (batch, height, width, inputs), weight int8 (outputs, kernel height, kernel width, inputs), bias int32
    and multiplier float32 (outputs,), residual and y uint8 (rows, outputs), y float32 where REAL; all of them dense.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = row % out_width
    line = (row // out_width) % out_height
    image = row // (out_width * out_height)
    sums = tl.zeros([ROWS, OUTPUTS], tl.int32)
    for place in range(KERNEL_HEIGHT * KERNEL_WIDTH):
        above = line * STRIDE_HEIGHT - PADDING_HEIGHT + (place // KERNEL_WIDTH) * DILATION_HEIGHT
        left = column * STRIDE_WIDTH - PADDING_WIDTH + (place % KERNEL_WIDTH) * DILATION_WIDTH
        inside = (row < rows) & (above >= 0) & (above < height) & (left >= 0) & (left < width)
        pixel = ((image * height + above).to(tl.int64) * width + left) * inputs
        kernel = (output * (KERNEL_HEIGHT * KERNEL_WIDTH) + place).to(tl.int64) * inputs
        for start in range(0, inputs, INPUTS):
            channel = start + tl.arange(0, INPUTS)
            there = channel < inputs
            # What lies outside the image is 0, and so its integer is the zero point.
            bytes_ = tl.load(x + pixel[:, None] + channel[None, :], mask=inside[:, None] & there[None, :], other=zero_x)
            signed = (bytes_.to(tl.int16) - 128).to(tl.int8)
            weights = tl.load(
                weight + kernel[None, :] + channel[:, None],
                mask=there[:, None] & (output < outputs)[None, :],
                other=0,
            )
            sums = tl.dot(signed, weights, acc=sums, out_dtype=tl.int32)
    known = output < outputs
    sums += tl.load(bias + output, mask=known, other=0)[None, :]
    real = sums.to(tl.float32) * tl.load(multiplier + output, mask=known, other=0)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    written = (row < rows)[:, None] & known[None, :]
    if REAL:
        tl.store(y + at, real, mask=written)
    else:
        if RESIDUAL:
            other = tl.load(residual + at, mask=written, other=0).to(tl.int32) - zero_r
            real += other.to(tl.float32) * multiplier_r
        real = tl.minimum(tl.maximum(real, -1024.0), 1024.0)  # far outside bytes: there the rounder is exact
        whole = ((real + ROUNDER) - ROUNDER).to(tl.int32) + zero_y
        tl.store(y + at, tl.minimum(tl.maximum(whole, low), high).to(tl.uint8), mask=written)
