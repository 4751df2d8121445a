"""BatchNorm for groups of samples, with what follows it in a residual network, in one pass over memory.

Two Triton kernels on the way forward and two on the way back do, for all groups at once, what PyTorch's BatchNorm, an
addition and a ReLU do. The next layer's input is written once. Where no shortcut is added, what the ReLU has cut off is
computed again rather than read. Sums are added in one fixed order, without atomics: equal input gives equal bits.

Inputs are seen as a matrix of rows (a pixel of a sample) and channels, whichever of the two lies dense in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a tile that a program holds in registers
CHANNELS = 64  # of a tile, where channels lie side by side
PROGRAMS = 1024  # of a kernel: several for every multiprocessor of any GPU


@triton.jit
def _row_offsets(row, positions, stride_sample, stride_position):
    """Return where rows of a group lie: row r is pixel r % positions of sample r // positions."""
    return (row // positions) * stride_sample + (row % positions) * stride_position


@triton.jit
def _sum_kernel(
    x, sums, rows, span, channels, positions, stride_sample, stride_position, stride_channel,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum x − p and (x − p)² over a span of a group's rows, p the channel's first value in the group."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)  # a group is a worker: no sum leaves it (section 2.3)
    inside = channel < channels
    start = group.to(tl.int64) * (rows // positions) * stride_sample
    column = x + start + channel * stride_channel
    # Squares of differences from a value nearby lose no digits to a mean that is large beside the deviation.
    pivot = tl.load(column, mask=inside, other=0).to(WIDE)
    first = tl.zeros([ROWS, CHANNELS], WIDE)
    second = tl.zeros([ROWS, CHANNELS], WIDE)
    end = tl.minimum((split + 1) * span, rows)
    for begin in range(split * span, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        here = (row < end)[:, None] & inside[None, :]
        offset = _row_offsets(row, positions, stride_sample, stride_position)
        value = tl.load(column[None, :] + offset[:, None], mask=here, other=0).to(WIDE)
        value = tl.where(here, value - pivot[None, :], 0)
        first += value
        second += value * value
    place = sums + (split * tl.num_programs(2) + group) * channels + channel
    tl.store(place, tl.sum(first, 0), mask=inside)
    tl.store(place + tl.num_programs(1) * tl.num_programs(2) * channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _normalise_kernel(
    x, residual, weight, bias, sums, y, statistics,
    rows, span, channels, positions, stride_sample, stride_position, stride_channel,
    EPS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write y = (x − mean) · weight / √(variance + eps) + bias (+ residual, then ReLU), mean and variance."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    start = group.to(tl.int64) * (rows // positions) * stride_sample
    column = start + channel * stride_channel
    pivot = tl.load(x + column, mask=inside, other=0).to(WIDE)
    place = group * channels + channel
    half = tl.num_programs(2) * channels
    shift = tl.load(sums + place, mask=inside, other=0) / rows
    variance = tl.load(sums + half + place, mask=inside, other=0) / rows - shift * shift
    variance = tl.where(variance < 0, 0, variance)
    mean = pivot + shift
    if split == 0:
        tl.store(statistics + place, mean, mask=inside)
        tl.store(statistics + half + place, variance, mask=inside)
    # Written as in the gradient's kernels, which must come to the same sign.
    inverse = 1 / tl.sqrt(variance + EPS)
    scale = tl.load(weight + channel, mask=inside, other=0).to(WIDE) * inverse
    offset_by = tl.load(bias + channel, mask=inside, other=0).to(WIDE)
    end = tl.minimum((split + 1) * span, rows)
    for begin in range(split * span, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        here = (row < end)[:, None] & inside[None, :]
        at = column[None, :] + _row_offsets(row, positions, stride_sample, stride_position)[:, None]
        value = tl.load(x + at, mask=here, other=0).to(WIDE)
        value = (value - mean[None, :]) * scale[None, :] + offset_by[None, :]
        if RESIDUAL:
            value += tl.load(residual + at, mask=here, other=0).to(WIDE)
        if RELU:
            value = tl.where(value < 0, 0, value)  # a maximum would turn NaN into 0, and hide that a run diverged
        tl.store(y + at, value, mask=here)


@triton.jit
def _gradient_sum_kernel(
    x, y, dy, weight, bias, statistics, sums,
    rows, span, channels, positions, stride_sample, stride_position, stride_channel,
    EPS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum dz and dz · x̂ over a span of a group's rows, dz the gradient before the ReLU."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    start = group.to(tl.int64) * (rows // positions) * stride_sample
    column = start + channel * stride_channel
    place = group * channels + channel
    half = tl.num_programs(2) * channels
    mean = tl.load(statistics + place, mask=inside, other=0)
    inverse = 1 / tl.sqrt(tl.load(statistics + half + place, mask=inside, other=0) + EPS)
    scale = tl.load(weight + channel, mask=inside, other=0).to(WIDE) * inverse
    offset_by = tl.load(bias + channel, mask=inside, other=0).to(WIDE)
    first = tl.zeros([ROWS, CHANNELS], WIDE)
    second = tl.zeros([ROWS, CHANNELS], WIDE)
    end = tl.minimum((split + 1) * span, rows)
    for begin in range(split * span, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        here = (row < end)[:, None] & inside[None, :]
        at = column[None, :] + _row_offsets(row, positions, stride_sample, stride_position)[:, None]
        dz = tl.load(dy + at, mask=here, other=0).to(WIDE)
        centred = tl.load(x + at, mask=here, other=0).to(WIDE) - mean[None, :]
        if RELU:
            if RESIDUAL:
                dz = tl.where(tl.load(y + at, mask=here, other=0) <= 0, 0, dz)
            else:  # one read less: the same arithmetic again says what the ReLU has cut off
                dz = tl.where(centred * scale[None, :] + offset_by[None, :] <= 0, 0, dz)
        first += dz
        second += dz * centred * inverse[None, :]
    store = sums + (split * tl.num_programs(2) + group) * channels + channel
    tl.store(store, tl.sum(first, 0), mask=inside)
    tl.store(store + tl.num_programs(1) * half, tl.sum(second, 0), mask=inside)


@triton.jit
def _gradient_kernel(
    x, y, dy, weight, bias, statistics, sums, dx, dz_out,
    rows, span, channels, positions, stride_sample, stride_position, stride_channel,
    EPS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write dx = weight / √(variance + eps) · (dz − mean of dz − x̂ · mean of dz · x̂), and dz for the residual."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split, group = tl.program_id(1), tl.program_id(2)
    inside = channel < channels
    start = group.to(tl.int64) * (rows // positions) * stride_sample
    column = start + channel * stride_channel
    place = group * channels + channel
    half = tl.num_programs(2) * channels
    mean = tl.load(statistics + place, mask=inside, other=0)
    inverse = 1 / tl.sqrt(tl.load(statistics + half + place, mask=inside, other=0) + EPS)
    scale = tl.load(weight + channel, mask=inside, other=0).to(WIDE) * inverse
    offset_by = tl.load(bias + channel, mask=inside, other=0).to(WIDE)
    # Mean and variance depend on every sample of the group: both means below are how the gradient passes through them.
    mean_dz = tl.load(sums + place, mask=inside, other=0) / rows
    slope = tl.load(sums + half + place, mask=inside, other=0) / rows * inverse
    end = tl.minimum((split + 1) * span, rows)
    for begin in range(split * span, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        here = (row < end)[:, None] & inside[None, :]
        at = column[None, :] + _row_offsets(row, positions, stride_sample, stride_position)[:, None]
        dz = tl.load(dy + at, mask=here, other=0).to(WIDE)
        centred = tl.load(x + at, mask=here, other=0).to(WIDE) - mean[None, :]
        if RELU:
            if RESIDUAL:
                dz = tl.where(tl.load(y + at, mask=here, other=0) <= 0, 0, dz)
            else:
                dz = tl.where(centred * scale[None, :] + offset_by[None, :] <= 0, 0, dz)
        if RESIDUAL:
            tl.store(dz_out + at, dz, mask=here)
        tl.store(dx + at, scale[None, :] * (dz - mean_dz[None, :] - centred * slope[None, :]), mask=here)


@dataclass(frozen=True)
class _Plan:
    """Memory layout of a batch, and its division among the kernels."""

    format: torch.memory_format
    grid: tuple[int, int, int]  # channel tiles, spans of rows, groups
    sizes: tuple[int, ...]  # rows, span, channels, positions, and the strides of a sample, a position, a channel
    tile: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, groups: int) -> _Plan:
        samples, channels = x.shape[0] // groups, x.shape[1]
        positions = x[0, 0].numel()
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        wide = min(CHANNELS, triton.next_power_of_2(channels)) if last or positions == 1 else 1
        tall = ELEMENTS // wide
        rows, tiles = samples * positions, triton.cdiv(channels, wide)
        splits = min(triton.cdiv(PROGRAMS, tiles * groups), triton.cdiv(rows, tall))
        span = triton.cdiv(rows, splits * tall) * tall
        strides = (positions * channels, channels, 1) if last else (positions * channels, 1, positions)
        dtype = tl.float64 if x.dtype == torch.float64 else tl.float32
        return cls(
            torch.channels_last if last else torch.contiguous_format,
            (tiles, triton.cdiv(rows, span), groups),
            (rows, span, channels, positions, *strides),
            {"ROWS": tall, "CHANNELS": wide, "WIDE": dtype, "enable_fp_fusion": True},
        )

    def partial_sums(self, x: Tensor) -> Tensor:
        """Return room for two sums: (2, spans, groups, channels), in float32 or for float64 in that."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty((2, *self.grid[1:], x.shape[1]), dtype=wide, device=x.device)


class _Normalise(torch.autograd.Function):
    """:func:`normalise` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor]:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        x = x if last else x.contiguous()
        plan = _Plan.of(x, groups)
        if residual is not None:
            residual = residual.contiguous(memory_format=plan.format)
        partial = plan.partial_sums(x)
        _sum_kernel[plan.grid](x, partial, *plan.sizes, **plan.tile)
        sums = partial.sum(1)
        y, statistics = torch.empty_like(x), torch.empty_like(sums)
        switches = {"EPS": eps, "RESIDUAL": residual is not None, "RELU": relu}
        _normalise_kernel[plan.grid](
            x, residual, weight, bias, sums, y, statistics, *plan.sizes, **switches, **plan.tile
        )
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, statistics)
        ctx.plan, ctx.eps, ctx.relu, ctx.residual = plan, eps, relu, None if residual is None else residual.dtype
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, statistics = ctx.saved_tensors
        plan = ctx.plan
        dy = dy.contiguous(memory_format=plan.format)
        partial = plan.partial_sums(x)
        switches = {"EPS": ctx.eps, "RESIDUAL": ctx.residual is not None, "RELU": ctx.relu}
        _gradient_sum_kernel[plan.grid](
            x, y, dy, weight, bias, statistics, partial, *plan.sizes, **switches, **plan.tile
        )
        sums = partial.sum(1)
        dx = torch.empty_like(x)
        dz = torch.empty_like(x, dtype=ctx.residual) if ctx.residual else None
        _gradient_kernel[plan.grid](
            x, y, dy, weight, bias, statistics, sums, dx, dz, *plan.sizes, **switches, **plan.tile
        )
        of_bias, of_weight = sums.sum(1).to(weight.dtype)
        return dx, dz, of_weight, of_bias, None, None, None


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every group of samples by its own statistics, then add and clamp where asked to.

    Args:
        x: (groups · n, C, …) in float32, bfloat16, float16 or float64. In channels_last format the kernels are
            fast; any other is seen as contiguous.
        weight: γ, (C,).
        bias: β, (C,).
        groups: Consecutive, of equal size.
        eps: Added to the variance.
        residual: Of x's shape, added to the result.
        relu: Whether max(·, 0) is taken of that.

    Returns:
        The result in x's dtype and format; each group's mean and biased variance, (groups, C), in float32 (of
        float64: in that).
    """
    y, statistics = _Normalise.apply(x, residual, weight, bias, groups, eps, relu)
    return y, statistics[0], statistics[1]
