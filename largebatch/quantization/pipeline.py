"""From a trained network to a network in integers: traced, calibrated, lowered; and layers taken back into floats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from largebatch.base.errors import UserError
from largebatch.data.file_batches import UNREADABLE
from largebatch.data.source import Source
from largebatch.data.stream import permutation
from largebatch.quantization.calibrate import Histogram, observe, ranges
from largebatch.quantization.lower import Lowered, Range, Recipe, lower, needed
from largebatch.quantization.network import HEAVY, Network
from largebatch.quantization.reference import IntegerNetwork
from largebatch.quantization.trace import trace

BATCH = 64  # calibration images a pass
IN_8_BITS = Recipe()


@dataclass(frozen=True)
class Quantized:
    """A network in integers, and what it was made from.

    Attributes:
        floats: The network's operators in floats, BatchNorm folded.
        lowered: The integers.
        histograms: Of the float tensors, by name.
        ranges: That were calibrated from them.
        recipe: How the integers were made.
    """

    floats: Network
    lowered: Lowered
    histograms: Mapping[str, Histogram]
    ranges: Mapping[str, Range]
    recipe: Recipe

    @property
    def network(self) -> Network:
        """The integers."""
        return self.lowered.network

    @property
    def layers(self) -> list[str]:
        """Names of the convolutions and matrix products in integers."""
        return [node.name for node in self.network if node.operator in HEAVY]

    def integer_share(self) -> float:
        """Return the share of the multiplications of a pass, in products of any kind, that are computed in integers."""
        outputs: dict[str, int] = {}
        images = torch.zeros(2, *self.floats.image)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            IntegerNetwork(self.floats).eval()(images, lambda name, value: outputs.update({name: _elements(value)}))
        every_product = counter.get_total_flops() / 2  # a multiplication and an addition each
        heavy = (node for node in self.network if node.operator in HEAVY)
        integers: int = sum(outputs[node.name] * node.tensors["weight"][0].numel() for node in heavy)
        return float(integers / max(every_product, 1))

    def size_ratio(self) -> float:
        """Return the bytes of the tensors over those of the network in floats."""
        ours, floats = (
            sum(tensor.nbytes for node in network for tensor in node.tensors.values())
            for network in (self.network, self.floats)
        )
        return ours / max(floats, 1)

    def keeping(self, layers: Collection[str]) -> Quantized:
        """Return the network with these layers in floats."""
        recipe = replace(self.recipe, keep=tuple(layers))
        return replace(self, recipe=recipe, lowered=lower(self.floats, self.ranges, recipe))


def quantize(
    model: nn.Module,
    image: tuple[int, int, int],
    batches: Iterable[Tensor],
    calibration: str = "minmax",
    recipe: Recipe = IN_8_BITS,
) -> Quantized:
    """Return a network in integers.

    Args:
        model: In evaluation mode, in float32, on the CPU: (batch, C, H, W) to (batch, classes).
        image: (C, H, W).
        batches: Calibration images, float32 (batch, C, H, W).
        calibration: ``minmax``, ``percentile`` or ``mse``.
        recipe: How integers are made.

    Raises:
        UserError: the network cannot be traced, has weights that are not finite, or the images calibrate nothing.
    """
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{len(broken)} tensors of this network, {broken[0]} first, hold NaN or infinite numbers: it has diverged, "
            "and no integers stand for those. Take other weights, such as weights=best."
        )
    floats = trace(model, image)
    histograms = observe(floats, batches, needed(floats, recipe))
    found = ranges(histograms, calibration, recipe.bits)
    return Quantized(floats, lower(floats, found, recipe), histograms, found, recipe)


def _elements(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def calibration_images(source: Source, seed: int, count: int) -> Iterator[Tensor]:
    """Yield batches of training images as validation would see them: the first of an order that the seed decides.

    Raises:
        UserError: there are fewer.
    """
    if count > source.train_images:
        raise UserError(f"images={count} is more than the {source.train_images:,} training images that there are.")
    order = permutation(source.train_images, seed, 0)[:count]
    for batch in source.plain(torch.split(order, BATCH)):
        images = batch.images[batch.labels != UNREADABLE]
        if len(images):
            yield images.float().cpu()
