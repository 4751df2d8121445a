"""Sums that overflow 16 bits inside kernels for bytes, on x86 processors without VNNI, and weights that cannot.

Before VNNI, the instruction for products of bytes (``vpmaddubsw``) adds two neighbouring products, unsigned × signed,
into 16 bits, and saturates: 255 · 127 + 255 · 127 = 64,770 becomes 32,767, and nothing says so. It happens where x of a
pair of inputs reaches h and h · (w₀ + w₁) is beyond 32,767: for h = 255 beyond a sum of 128. Neighbours are input
channels 2i and 2i + 1 at one place of the kernel, in oneDNN and wherever inputs are laid out with channels last; where
the channels are odd in number, such a layout also has the last one of a place beside the first one of the next.

A larger scale for the weights of a channel, by as much as its worst pair needs, makes it safe. Other channels, and all
activations, keep their 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.quantization.network import HEAVY, IMAGES, Network, Node, Program, Quantization

INT16 = 2**15 - 1
CPUINFO = Path("/proc/cpuinfo")
# For products of bytes and of bfloat16, best first.
INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "amx_bf16", "avx512_bf16")


def instructions() -> list[str]:
    """Return what this processor has for products of small numbers; empty where Linux does not tell."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return [name for name in INSTRUCTIONS if name in flags]


def largest_pairs(weight: Tensor) -> Tensor:
    """Return the largest |w₀ + w₁| of neighbours, of each output channel.

    Args:
        weight: (outputs, inputs) or (outputs, inputs / groups, kH, kW), real or whole numbers.

    Returns:
        float64 (outputs,); zeros for depthwise convolutions, whose kernels multiply in 32 bits.
    """
    if weight.dim() == 4 and weight.shape[1] == 1:
        return torch.zeros(len(weight), dtype=torch.float64)
    rows = weight.double().flatten(2) if weight.dim() == 4 else weight.double()[:, :, None]
    by_place = rows.transpose(1, 2)  # outputs, places, inputs
    return torch.maximum(_pairs(by_place), _pairs(by_place.flatten(1)[:, None]))


def _pairs(rows: Tensor) -> Tensor:
    even = torch.nn.functional.pad(rows, (0, rows.shape[-1] % 2))
    return (even[..., ::2] + even[..., 1::2]).abs().flatten(1).amax(1)


def most(high: int) -> int:
    """Return the largest |w₀ + w₁| that is safe for inputs of 0 … ``high``."""
    return INT16 // high


def safe_scale(weight: Tensor, scale: Tensor, high: int = 255) -> Tensor:
    """Return scales with which no pair of a channel's rounded weights can overflow; where none could, the given ones.

    Args:
        weight: Real weights, (outputs, inputs) or (outputs, inputs / groups, kH, kW).
        scale: (outputs,), or one for all.
        high: The largest integer of the inputs.
    """
    shape = (-1, *[1] * (weight.dim() - 1))
    unsafe = largest_pairs((weight / scale.reshape(shape)).round()) > most(high)
    # Rounding moves each of the two by half a unit at most, so that a pair gains one.
    needed = (largest_pairs(weight) / (most(high) - 1)).to(scale.dtype)
    if scale.numel() == 1:
        return torch.maximum(scale, needed.max()) if unsafe.any() else scale
    return torch.where(unsafe, torch.maximum(scale, needed), scale)


def audit(network: Network) -> dict[str, list[int]]:
    """Return the output channels whose sums can overflow 16 bits, by node; nodes without any are left out."""
    read, found = network.outputs(), {}
    for node in network:
        given = read[node.inputs[0]] if node.operator in HEAVY else None
        if given is not None:
            unsafe = largest_pairs(node.tensors["weight"]) > most(given.high)
            if unsafe.any():
                found[node.name] = unsafe.nonzero().flatten().tolist()
    return found


def saturates(load: Callable[[Network], Program]) -> bool:
    """Return whether an engine's kernels overflow on this machine: they are tried, whatever the processor is called.

    Args:
        load: An engine's way to make a network ready, without any check.
    """
    inputs, outputs = 16, 16
    product = 255 * 127 * inputs
    weights = {
        "weight": torch.full((outputs, inputs, 1, 1), 127, dtype=torch.int8),
        "weight_scale": torch.ones(outputs),
        "bias": torch.zeros(outputs, dtype=torch.int32),
    }
    how = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    mean = {"kernel": None, "keep": False}
    output = Quantization(product / 200, 0)
    probe = Network(
        (
            Node("bytes", "quantize", (IMAGES,), Quantization(1.0, 0)),
            Node("sums", "conv", ("bytes",), output, how, weights),
            Node("mean", "average_pool", ("sums",), output, mean),
            Node("real", "dequantize", ("mean",)),
        ),
        (inputs, 8, 8),
    )
    worst = load(probe)(torch.full((1, *probe.image), 255.0)) / product
    return bool((worst < 0.9).any())


def refuse_overflow(engine: str, network: Network, overflows: Callable[[], bool]) -> None:
    """Refuse a network that this machine would compute wrongly.

    Args:
        engine: Its name, for the message.
        network: What is to run.
        overflows: Whether this machine's kernels do; asked only where the network's weights could.

    Raises:
        UserError: which layers could overflow, and what would do.
    """
    unsafe = audit(network)
    if unsafe and overflows():
        channels = sum(map(len, unsafe.values()))
        raise UserError(
            f"engine={engine} would be silently wrong on this processor, which has no VNNI: sums of {channels} "
            f"channels in {len(unsafe)} layers ({next(iter(unsafe))}, …) can overflow 16 bits. Quantize with "
            "reduce_range=true, or use engine=reference."
        )
