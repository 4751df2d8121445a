"""Measure the cost of integers: top-1 before and after on the same images, losses by layer, operators, size, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from largebatch.base.numbers import paired_difference
from largebatch.data.source import Batch
from largebatch.quantization.layers import decibels, measure_layers, worst_first
from largebatch.quantization.network import Engine, Network
from largebatch.quantization.pipeline import Quantized
from largebatch.quantization.proof import prove
from largebatch.quantization.reference import IntegerNetwork, Reference

SPEED_BATCH, TURNS = 32, 5
WORST = 3  # layers that are named


@dataclass(frozen=True)
class Answers:
    """Predictions of a network: ``predicted`` and ``labels``, int64 (images,)."""

    predicted: Tensor
    labels: Tensor

    @property
    def wrong(self) -> Tensor:
        """Return which predictions are wrong, bool (images,); images that cannot be read count as wrong."""
        return self.predicted != self.labels

    @property
    def error(self) -> float:
        """Top-1 error in %."""
        return 100 * float(self.wrong.double().mean())


@torch.inference_mode()
def answers(program: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Answers:
    """Return what a network says of batches of images, which it takes in float32."""
    said = [(program(batch.images.float()).argmax(1).cpu(), batch.labels.cpu()) for batch in batches]
    return Answers(*(torch.cat(parts) for parts in zip(*said, strict=True)))


@torch.inference_mode()
def noise(model: nn.Module, program: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the signal-to-noise ratio of the logits, in dB."""
    return decibels(model(images), program(images).cpu())


def compare(before: Answers, after: Answers) -> dict[str, Any]:
    """Return what two networks say of the same images.

    ``error_before`` and ``error_after`` (top-1, %), ``top1_drop`` (points, the second has more wrong by so much),
    ``top1_drop_interval`` (95 %, paired) and ``p_value`` (McNemar, exact), ``agreement`` (% of predictions that are the
    same), ``images``.
    """
    total = len(before.labels)
    worse, better = int((after.wrong & ~before.wrong).sum()), int((before.wrong & ~after.wrong).sum())
    low, high, p_value = paired_difference(better, worse, total)
    return {
        "error_before": before.error,
        "error_after": after.error,
        "top1_drop": 100 * (worse - better) / total,
        "top1_drop_interval": [100 * low, 100 * high],
        "p_value": p_value,
        "agreement": 100 * float((before.predicted == after.predicted).double().mean()),
        "images": total,
    }


def within(
    quantized: Quantized, most: float, images: Tensor, drop: Callable[[Network], float]
) -> tuple[Quantized, list[dict[str, Any]]]:
    """Take layers back into floats, the one that adds the most noise first, until top-1 falls by no more than ``most``.

    Args:
        quantized: Where to begin.
        most: Points.
        images: What noise is measured with, float32 (batch, C, H, W).
        drop: How many points a network loses.

    Returns:
        The network, and what each step came to: ``layer`` (null: none yet), ``decibels`` and ``top1_drop``. Where the
        last one is still above ``most``, there is no layer left.
    """
    order = worst_first(measure_layers(quantized, images))
    lost = drop(quantized.network)
    steps: list[dict[str, Any]] = [{"layer": None, "decibels": None, "top1_drop": lost}]
    for layer in order:
        if lost <= most:
            break
        quantized = quantized.keeping([*quantized.recipe.keep, layer.name])
        lost = drop(quantized.network)
        steps.append({"layer": layer.name, "decibels": layer.decibels, "top1_drop": lost})
    return quantized, steps


def layer_facts(quantized: Quantized, images: Tensor) -> dict[str, Any]:
    """Return ``layers``, a mapping each as :class:`~largebatch.quantization.layers.Layer`, and ``worst``, names."""
    layers = measure_layers(quantized, images)
    return {
        "layers": [asdict(layer) for layer in layers],
        "worst": [layer.name for layer in worst_first(layers)[:WORST]],
    }


def operators(network: Network, engine: Engine, images: Tensor) -> dict[str, Any]:
    """Return what computes in integers and what in floats.

    ``integer_operators`` and ``float_operators`` (how many of the network's), ``in_floats`` (names of the latter), and
    ``ran``: convolutions and matrix products by the profiler's names; null for the reference, which computes integers
    in floats, exactly.

    Raises:
        Fault: one that should have been in integers ran in floats.
    """
    return {
        "engine": engine.name,
        "integer_operators": len(network.integer_operators),
        "float_operators": len(network.float_operators),
        "in_floats": network.float_operators,
        "ran": None if engine.name == Reference.name else dict(prove(engine, network, images).operators),
    }


def speed(quantized: Quantized, engine: Engine, images: Tensor) -> dict[str, Any]:
    """Return images/s of the same batch in turns.

    ``int8``; ``fp32`` and ``bf16``, of the network with BatchNorm folded and channels last; ``batch``; and ``gain``, of
    int8 over fp32.
    """
    device = "cuda" if engine.name == "cuda" else "cpu"
    images = images[:SPEED_BATCH].to(device).contiguous(memory_format=torch.channels_last)
    floats = IntegerNetwork(quantized.floats).eval().to(device).to(memory_format=torch.channels_last)
    halves = IntegerNetwork(quantized.floats).eval().to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], Tensor]] = {}
    program, in_half = engine.load(quantized.network), images.bfloat16()
    sides = {"int8": lambda: program(images), "fp32": lambda: floats(images), "bf16": lambda: halves(in_half)}
    rates = _in_turns(sides, len(images), device)
    return {**rates, "batch": len(images), "gain": rates["int8"] / rates["fp32"]}


@torch.inference_mode()
def _in_turns(sides: Mapping[str, Callable[[], Tensor]], images: int, device: str) -> dict[str, float]:
    def seconds(work: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for work in sides.values():
        seconds(work)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, work in sides.items():
            times[name].append(seconds(work))
    return {name: images / statistics.median(taken) for name, taken in times.items()}


def float_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's weights and buffers, in such a file as its integers are in."""
    return len(save({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}))


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the facts for people; what was not asked for is not there."""
    recipe = facts["recipe"]
    reduced = ", reduced so that no sum overflows 16 bits" if recipe["reduced"] else ""
    rows = [
        ("network", facts["network"]),
        *([("written to", facts["directory"])] if "directory" in facts else []),
        ("integers", f"{recipe['bits']} bits, {recipe['granularity'].replace('_', ' ')}{reduced}"),
        ("calibration", f"{recipe['calibration']} of {recipe['images']} images"),
        ("size", f"{facts['bytes']:,} bytes, {facts['size_ratio']:.3f} of {facts['float_bytes']:,} in floats"),
        ("operators", _operators(facts)),
        ("logits", f"{facts['decibels']:.1f} dB over their change, on engine={facts['engine']}"),
    ]
    if "error_after" in facts:
        rows += _cost(facts)
    if "speed" in facts:
        rates = facts["speed"]
        numbers = ", ".join(f"{name} {rates[name]:,.0f}" for name in ("int8", "fp32", "bf16"))
        rows.append(("images/s", f"{numbers} on engine={facts['engine']}, batch {rates['batch']}, in turns"))
    rows += [("", step) for step in _steps(facts.get("steps", []))]
    text = "\n".join(f"{name:<12} {value}" for name, value in rows)
    return f"{text}\n\n{_layers(facts['layers'], facts['worst'])}" if "layers" in facts else text


def _operators(facts: Mapping[str, Any]) -> str:
    names = facts["in_floats"]
    floats = f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else "none"
    return f"{facts['integer_operators']} in integers, {facts['float_operators']} in floats: {floats}"


def _cost(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    low, high = facts["top1_drop_interval"]
    return [
        ("error", f"{facts['error_before']:.2f} % before, {facts['error_after']:.2f} % after"),
        (
            "top-1 drop",
            f"{facts['top1_drop']:+.2f} points [{low:+.2f}, {high:+.2f}] on {facts['images']:,} images, "
            f"p = {facts['p_value']:.2g}; {facts['agreement']:.2f} % of predictions are the same",
        ),
    ]


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{'in integers throughout' if step['layer'] is None else '+ ' + step['layer'] + ' in floats'}: "
        f"{step['top1_drop']:+.2f} points"
        for step in steps
    ]


def _layers(layers: Sequence[Mapping[str, Any]], worst: Sequence[str]) -> str:
    width = max(len(layer["name"]) for layer in layers)
    lines = [f"{'layer':<{width}}     dB          range         clipped  values"]
    for layer in layers:
        known = layer["low"] is not None
        span = f"{layer['low']:>9.3g} … {layer['high']:<9.3g} {100 * layer['clipped']:>8.3f} %" if known else " " * 32
        mark = " ← one of the worst" if layer["name"] in worst else ""
        lines.append(f"{layer['name']:<{width}}  {layer['decibels']:>5.1f}  {span}  {layer['picture']}{mark}")
    return "\n".join(lines)
