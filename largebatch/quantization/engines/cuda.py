"""Networks in integers on CUDA GPUs: products of bytes in a Triton kernel of our own.

PyTorch has no convolution of bytes for GPUs. Grouped convolutions, where a GPU's units for products of bytes have
nothing to multiply, are computed by PyTorch in float32, which holds their short sums exactly (long ones in float64):
see :func:`in_floats`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.quantization.engines.plain import Step, program
from largebatch.quantization.network import Network, Node, Program, Quantization
from largebatch.quantization.reference import exact_type

KERNEL = "integer_product"  # the name under which the profiler knows it
ROWS, OUTPUTS, INPUTS = 128, 64, 64  # of a tile


@dataclass(frozen=True)
class Cuda:
    """Our Triton kernel, on an NVIDIA GPU with units for products of bytes (compute capability 7.5 or later)."""

    name: str = "cuda"

    def available(self) -> str | None:
        """Return None where there is such a GPU and Triton, else what is missing."""
        if not torch.cuda.is_available():
            return "engine=cuda needs an NVIDIA GPU, and PyTorch sees none here: use engine=x86 or engine=reference."
        if torch.cuda.get_device_capability() < (7, 5):
            return "engine=cuda needs a GPU of compute capability 7.5 or later: use engine=x86 or engine=reference."
        if importlib.util.find_spec("triton") is None:
            return "engine=cuda needs Triton, which comes with PyTorch for Linux: use engine=reference."
        return None

    def load(self, network: Network, device: str = "cuda") -> Program:
        """Return the network ready to run, its weights on the GPU."""
        where = torch.device(device)
        moved = replace(network, nodes=tuple(_on(node, where) for node in network))
        run = program(moved, {"conv": _convolution, "linear": _linear, "max_pool": _max_pool})
        return lambda images: run(images.to(where))


def in_floats(network: Network) -> list[str]:
    """Return the names of convolutions that have no integer kernel here."""
    return [node.name for node in network if node.operator == "conv" and node.attributes["groups"] > 1]


def _on(node: Node, device: torch.device) -> Node:
    return replace(node, tensors={name: tensor.to(device) for name, tensor in node.tensors.items()})


def _convolution(node: Node, given: Sequence[Quantization]) -> Step:
    if node.attributes["groups"] > 1:
        return _grouped(node, given)
    product = _Product(node, given, node.tensors["weight"].permute(0, 2, 3, 1).contiguous())

    def step(x: Tensor, r: Tensor | None = None) -> Tensor:
        last = [one.permute(0, 2, 3, 1).contiguous() for one in (x, r) if one is not None]
        return product(*last).permute(0, 3, 1, 2)

    return step


def _linear(node: Node, given: Sequence[Quantization]) -> Step:
    weight = node.tensors["weight"]
    attributes = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    product = _Product(replace(node, attributes=attributes), given, weight[:, None, None, :].contiguous())

    def step(x: Tensor, r: Tensor | None = None) -> Tensor:
        rows = [one.reshape(-1, 1, 1, one.shape[-1]) for one in (x, r) if one is not None]
        return product(*rows).reshape(*x.shape[:-1], len(weight))

    return step


class _Product:
    """One launch of the kernel, with all that does not depend on the images prepared.

    ``weight`` is (outputs, kernel height, kernel width, inputs); so are x and the residual laid out.
    """

    def __init__(self, node: Node, given: Sequence[Quantization], weight: Tensor) -> None:
        self.weight, self.output, self.given = weight, node.output, given
        of_x, step = given[0], 1.0 if node.output is None else node.output.scale
        self.multiplier = (node.tensors["weight_scale"].double() * of_x.scale / step).float()
        # The kernel multiplies x − 128: what is missing of x − z.
        missing = (128 - of_x.zero_point) * weight.flatten(1).long().sum(1)
        self.bias = (node.tensors["bias"].long() + missing).int()
        how = [node.attributes[key] for key in ("stride", "padding", "dilation")]
        self.stride, self.padding, self.dilation = how
        words = zip(("STRIDE", "PADDING", "DILATION"), how, strict=True)
        self.words: dict[str, Any] = {
            f"{word}_{axis}": pair[place] for word, pair in words for place, axis in enumerate(("HEIGHT", "WIDTH"))
        }

    def __call__(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        from largebatch.quantization.engines.kernels import integer_product

        batch, *size, inputs = x.shape
        outputs, *kernel, _ = self.weight.shape
        shape = [
            (size[axis] + 2 * self.padding[axis] - self.dilation[axis] * (kernel[axis] - 1) - 1) // self.stride[axis]
            + 1
            for axis in (0, 1)
        ]
        rows = batch * math.prod(shape)
        y = x.new_empty((batch, *shape, outputs), dtype=torch.float32 if self.output is None else torch.uint8)
        output = self.output or Quantization(1.0, 0)
        of_r = self.given[1] if r is not None else output
        integer_product[(math.ceil(rows / ROWS), math.ceil(outputs / OUTPUTS))](
            *(x, self.weight, self.bias, self.multiplier, y if r is None else r, y),
            *(rows, outputs, inputs, *size, *shape),
            *(self.given[0].zero_point, of_r.zero_point, of_r.scale / output.scale),
            *(output.zero_point, output.low, output.high),
            **{"KERNEL_HEIGHT": kernel[0], "KERNEL_WIDTH": kernel[1], **self.words},
            RESIDUAL=r is not None,
            REAL=self.output is None,
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            INPUTS=INPUTS,
            enable_fp_fusion=False,  # a product and a sum are rounded one after the other, as everywhere
        )
        return y


def _grouped(node: Node, given: Sequence[Quantization]) -> Step:
    output, of_x, how = node.output, given[0], node.attributes
    dtype = exact_type(node.tensors["weight"], of_x)
    weight, bias = node.tensors["weight"].to(dtype), node.tensors["bias"][:, None, None]
    multiplier = (node.tensors["weight_scale"].double() * of_x.scale / (output.scale if output else 1.0)).float()
    words = {key: how[key] for key in ("stride", "padding", "dilation", "groups")}

    def step(x: Tensor, r: Tensor | None = None) -> Tensor:
        sums = F.conv2d(x.to(dtype) - of_x.zero_point, weight, **words)
        real = (sums.int() + bias).float() * multiplier[:, None, None]
        if output is None:
            return real
        if r is not None:
            real = real + (r.float() - given[1].zero_point) * (given[1].scale / output.scale)
        return (real.round_() + output.zero_point).clamp_(output.low, output.high).to(torch.uint8)

    return step


def _max_pool(node: Node, given: Sequence[Quantization]) -> Step:
    kernel, stride, padding, dilation = (
        list(node.attributes[key]) for key in ("kernel", "stride", "padding", "dilation")
    )
    ceil = bool(node.attributes["ceil"])
    # Bytes are whole in float16.
    return lambda x: F.max_pool2d(x.half(), kernel, stride, padding, dilation, ceil).to(torch.uint8)
