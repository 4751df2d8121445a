"""Measure the loss of each layer of an integer network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.quantization.calibrate import Histogram
from largebatch.quantization.network import HEAVY, IMAGES
from largebatch.quantization.pipeline import Quantized
from largebatch.quantization.reference import IntegerNetwork


@dataclass(frozen=True)
class Layer:
    """One operator in integers.

    Attributes:
        name: Its name.
        operator: What it does.
        decibels: Signal to quantization noise of its output, where its inputs are those of the network in floats, but
            rounded to integers: what this layer alone adds. Infinite where it adds nothing.
        low: The range of its output, from here
        high: to here; both None for logits, which are in floats.
        clipped: The share of its output's values that lie outside.
        picture: The histogram of its output as a line of bars, zeros left out.
    """

    name: str
    operator: str
    decibels: float
    low: float | None
    high: float | None
    clipped: float | None
    picture: str


def measure_layers(quantized: Quantized, images: Tensor) -> list[Layer]:
    """Return what every layer adds, in the network's order.

    Args:
        quantized: The network.
        images: float32 (batch, C, H, W).
    """
    stands_for, network = quantized.lowered.stands_for, quantized.network
    wanted = {*stands_for.values(), IMAGES, *(node.name for node in network)}
    reals: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        if name in wanted:
            reals[name] = value

    layers = []
    module = IntegerNetwork(network).eval()
    with torch.inference_mode():
        IntegerNetwork(quantized.floats).eval()(images, keep)
        outputs = network.outputs()
        for node, step in zip(network, module.steps, strict=True):
            if node.operator in ("float", "dequantize", "move", "max_pool"):  # they add nothing
                continue
            given = []
            for name in node.inputs:
                read, real = outputs[name], reals[stands_for.get(name, name)]
                if read is not None:
                    real = (real / read.scale + read.zero_point).round().clamp(read.low, read.high).to(torch.uint8)
                given.append(real)
            real, value = reals[stands_for.get(node.name, node.name)], step(*given)
            if node.output is not None:
                value = (value.int() - node.output.zero_point) * node.output.scale
            layers.append(_layer(quantized, node.name, node.operator, decibels(real, value)))
    return layers


def _layer(quantized: Quantized, name: str, operator: str, noise: float) -> Layer:
    tensor = quantized.lowered.stands_for.get(name)
    if tensor is None or tensor not in quantized.histograms:
        return Layer(name, operator, noise, None, None, None, "")
    histogram: Histogram = quantized.histograms[tensor]
    low, high = quantized.ranges[tensor]
    return Layer(name, operator, noise, low, high, histogram.outside(low, high), histogram.picture())


def worst_first(layers: list[Layer]) -> list[Layer]:
    """Return the convolutions and matrix products, the one that adds the most noise first."""
    return sorted((layer for layer in layers if layer.operator in HEAVY), key=lambda layer: layer.decibels)


def decibels(signal: Tensor, other: Tensor) -> float:
    """Return the signal-to-noise ratio in dB: the power of the signal, its mean taken off, over that of the difference.

    Infinite where there is no difference.
    """
    noise = float((signal.double() - other.double()).pow(2).mean())
    power = float(signal.double().var(correction=0))
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
