"""The ranges of a network's tensors, from images: one histogram a tensor, whatever the number of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.quantization.affine import dequantize, quantize, scale_and_zero_point
from largebatch.quantization.lower import Range
from largebatch.quantization.network import Network
from largebatch.quantization.reference import IntegerNetwork

BINS = 2048
SAMPLE = 2**16  # values of a tensor that a batch adds to its histogram; its least and greatest are always exact
PERCENTILE = 99.99
NARROWEST, STEPS = 0.1, 91  # ranges that the mean squared error is tried with, as shares of the whole one
BARS = " ▁▂▃▄▅▆▇█"


class Histogram:
    """Counts of values in bins of equal width, of which it never has more than 2048.

    Bins begin at whole multiples of their width, which is a power of two: where values reach farther, the width is
    doubled and bins are merged by pairs, exactly. So what is counted does not depend on the order of the batches.

    Attributes:
        low: The least value of all, or 0 where that is above.
        high: The greatest of all, or 0 where that is below.
        zeros: How many counted values were 0: they are exact in any quantization.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.zeros = 0
        self._width, self._first = 0.0, 0
        self._counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count values, of which a large tensor gives an evenly spread sample.

        Raises:
            ValueError: one of them is not finite.
        """
        low, high = (float(end) for end in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("not finite")
        self._cover(min(low, self.low), max(high, self.high))
        sample = _sample(values)
        others = sample[sample != 0]
        self.zeros += len(sample) - len(others)
        if len(others):
            places = (others.double() / self._width).floor().long() - self._first
            self._counts += torch.bincount(places, minlength=BINS)

    def _cover(self, low: float, high: float) -> None:
        if low == high or (low, high) == (self.low, self.high):
            return
        width = self._width or math.ldexp(1.0, max(math.frexp((high - low) / BINS)[1] - 1, -126))
        while math.floor(high / width) - math.floor(low / width) >= BINS:
            width *= 2
        first = math.floor(low / width)
        if self._width:
            places = torch.arange(self._first, self._first + BINS)
            # From BINS² on all that was counted lies in the two bins beside 0, however much wider bins are now.
            times = round(min(width / self._width, BINS**2))
            merged = torch.div(places, times, rounding_mode="floor") - first
            inside = self._counts > 0
            counts = torch.zeros_like(self._counts)
            self._counts = counts.index_add_(0, merged[inside], self._counts[inside])
        self.low, self.high, self._width, self._first = low, high, width, first

    @property
    def count(self) -> int:
        """Return the number of values that were counted."""
        return self.zeros + int(self._counts.sum())

    def bins(self) -> tuple[Tensor, Tensor]:
        """Return the middles of the bins that hold anything, float64, and their counts, int64; zeros are left out."""
        filled = self._counts.nonzero().flatten()
        middles = (filled + self._first + 0.5).double() * self._width
        return middles.clamp(self.low, self.high), self._counts[filled]

    def outside(self, low: float, high: float) -> float:
        """Return the share of values below ``low`` or above ``high``."""
        middles, counts = self.bins()
        return int(counts[(middles < low) | (middles > high)].sum()) / max(self.count, 1)

    def picture(self, columns: int = 32) -> str:
        """Return the histogram as a line of bars, from the least value to the greatest; zeros are left out."""
        middles, counts = self.bins()
        if not len(middles):
            return " " * columns
        places = ((middles - self.low) / (self.high - self.low) * columns).long().clamp(max=columns - 1)
        heights = torch.bincount(places, weights=counts.double(), minlength=columns).sqrt()
        steps = (heights / heights.max() * (len(BARS) - 1)).ceil().int()
        return "".join(BARS[step] for step in steps.tolist())


def _sample(values: Tensor) -> Tensor:
    """Return up to SAMPLE values, evenly spread, by a step that falls into no row or column of a map."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    step = -(-values.numel() // SAMPLE)
    while step > 1 and math.gcd(step, 2 * 3 * 5 * 7) > 1:
        step += 1
    return values.reshape(-1)[::step]


def observe(network: Network, batches: Iterable[Tensor], names: Collection[str]) -> dict[str, Histogram]:
    """Return the histograms of float tensors over images.

    Args:
        network: From :func:`largebatch.quantization.trace.trace`.
        batches: Images float32 (batch, C, H, W).
        names: Which tensors.

    Raises:
        UserError: there are no images, they have another shape, or something in them or in the network is not finite.
    """
    histograms = {name: Histogram() for name in names}
    module = IntegerNetwork(network).eval()

    def watch(name: str, value: Tensor) -> None:
        try:
            if name in histograms:
                histograms[name].add(value)
        except ValueError:
            raise UserError(
                f"a calibration image makes {name} infinite or NaN in float32: the network has diverged, or it takes "
                "other images (look at their mean and std)."
            ) from None

    seen = 0
    with torch.inference_mode():
        for images in batches:
            if tuple(images.shape[1:]) != network.image:
                raise UserError(
                    f"calibration images have the shape {_shape(images.shape[1:])}, and the network takes "
                    f"{_shape(network.image)}: give images as it was trained on."
                )
            if not images.isfinite().all():
                broken = seen + int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
                raise UserError(f"calibration image {broken} has NaN or infinite values: leave it out, or correct it.")
            module(images, watch)
            seen += len(images)
    if not seen:
        raise UserError("there are no calibration images, and without any no range is known: give images=1 or more.")
    return histograms


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


def ranges(histograms: Mapping[str, Histogram], calibration: str, bits: int = 8) -> dict[str, Range]:
    """Return a range for every tensor.

    Args:
        histograms: From :func:`observe`.
        calibration: ``minmax``, all that was seen; ``percentile``, without 0.01 % of the values at either end; ``mse``,
            the range that gives the least mean squared error.
        bits: Of the integers.
    """
    return {name: CALIBRATIONS[calibration](one, bits) for name, one in histograms.items()}


def _minmax(histogram: Histogram, bits: int) -> Range:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, bits: int) -> Range:
    middles, counts = histogram.bins()
    cut = histogram.count * (1 - PERCENTILE / 100)
    below, above = middles[counts.cumsum(0) > cut], middles[counts.flip(0).cumsum(0).flip(0) > cut]
    if not (len(below) and len(above)):  # next to all are 0
        return histogram.low, histogram.high
    return min(float(below[0]), 0.0), max(float(above[-1]), 0.0)


def _mse(histogram: Histogram, bits: int) -> Range:
    """Move the upper end, then the lower one, to where the error is least."""
    low, high = histogram.low, histogram.high
    shares = torch.linspace(NARROWEST, 1, STEPS, dtype=torch.float64)
    high = float(shares[_errors(histogram, low * torch.ones(STEPS), high * shares, bits).argmin()]) * high
    low = float(shares[_errors(histogram, low * shares, high * torch.ones(STEPS), bits).argmin()]) * low
    return low, high


def _errors(histogram: Histogram, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the squared error of every range (ranges,), summed over the values."""
    middles, counts = histogram.bins()
    scale, zero = scale_and_zero_point(low, high, bits)
    values = middles.expand(len(scale), -1)
    restored = dequantize(quantize(values, scale, zero, bits, axis=0), scale, zero, axis=0)
    return ((restored - values) ** 2 * counts).sum(1)


CALIBRATIONS: Mapping[str, Callable[[Histogram, int], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
}
