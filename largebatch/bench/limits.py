"""Count the operations and bytes of a step, and measure this machine's speed at each alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from largebatch.bench.compare import Side

LAYERS = (_ConvNd, nn.Linear, _BatchNorm, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
# Of every weight: read forward and backward; its gradient written and read; momentum read and written; weight written.
WEIGHT_VISITS = 7


@dataclass(frozen=True)
class Work:
    """Cost of a forward and backward pass: ``operations`` and ``bytes`` per image, and the bytes of the weights.

    Bytes are those that no fusion saves: every convolution, linear layer, BatchNorm and pooling reads its input and
    writes its output, and on the way back reads both that input and its output's gradient, and writes its input's.
    ReLUs and additions are free. Caches that hold a whole tensor would need fewer.
    """

    operations: float
    bytes: float
    weight_bytes: int

    def step_bytes(self, images: int) -> float:
        """Return the bytes of a step over so many images, with its update."""
        return images * self.bytes + WEIGHT_VISITS * self.weight_bytes


def work_of(
    model: nn.Module, images: Tensor, labels: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Work:
    """Count the work of one pass of a plain network."""
    moved = 0

    def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += 3 * inputs[0].nbytes + 2 * output.nbytes

    handles = [m.register_forward_hook(seen) for m in model.modules() if isinstance(m, LAYERS)]
    with FlopCounterMode(display=False) as counter:
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Work(counter.get_total_flops() / len(images), moved / len(images), weights)


def limit_sides(device: torch.device, dtype: torch.dtype) -> dict[str, Side]:
    """Return a plain matrix product and a plain copy, whose "images" are operations and bytes.

    Args:
        device: Where.
        dtype: Of the product: what the network's convolutions are computed in.
    """
    on_gpu = device.type == "cuda"
    size, length = (8192, 2**28) if on_gpu else (512, 2**23)
    times = 10 if on_gpu else 1
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(length, device=device)
    target = torch.empty_like(source)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right, out=product)
        _wait(device)

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)
        _wait(device)

    return {"matmul": Side(multiply, times * 2 * size**3), "copy": Side(copy, times * 2 * source.nbytes)}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
