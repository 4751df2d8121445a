"""The oracle: a network in integers computed exactly as :mod:`~.quantization.network` says, plainly and anywhere.

Sums of products are exact: of whole numbers in float32 as long as none can reach 2^24, else in float64, where the bound
of int32 is reached first. It is an ordinary module whose buffers are the integers, so that it can be offloaded too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.quantization.affine import quantize
from largebatch.quantization.network import HEAVY, IMAGES, Network, Node, Program, Quantization

EXACT_IN_FLOAT32 = 2**24
CONVOLUTION = ("stride", "padding", "dilation", "groups")
DTYPES = {str(one).removeprefix("torch."): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
PYTHON = {name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv")}


class Reference:
    """The engine that needs nothing but PyTorch."""

    name = "reference"

    def available(self) -> str | None:
        """Return None: it runs everywhere."""
        return None

    def load(self, network: Network) -> Program:
        """Return the network ready to run on the CPU."""
        module = IntegerNetwork(network).eval()
        return torch.inference_mode()(lambda images: module(images.cpu()))


class IntegerNetwork(nn.Module):
    """A network in integers, or one of float operators alone; each node is a submodule that holds its tensors."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        reads = network.outputs()
        self.steps = nn.ModuleList(Step(node, [reads[name] for name in node.inputs]) for node in network)
        last = {name: node.name for node in network for name in node.inputs}
        self._done = [[name for name in dict.fromkeys(node.inputs) if last[name] == node.name] for node in network]

    def forward(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Return logits, float32 (batch, classes).

        Args:
            images: float32 (batch, C, H, W).
            watch: Is told the name and value of every tensor, ``images`` among them, as soon as it is there.
        """
        values = {IMAGES: images}
        with torch.autocast(images.device.type, enabled=False):
            if watch:
                watch(IMAGES, images)
            for node, step, done in zip(self.network, self.steps, self._done, strict=True):
                values[node.name] = step(*(values[name] for name in node.inputs))
                if watch:
                    watch(node.name, values[node.name])
                for name in done:
                    del values[name]
        return values[self.network.nodes[-1].name]


class Step(nn.Module):
    """One node."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    table: Tensor

    def __init__(self, node: Node, given: Sequence[Quantization | None]) -> None:
        super().__init__()
        self.node, self.given = node, given
        for name, tensor in node.tensors.items():
            self.register_buffer(name, tensor)
        if node.operator in HEAVY:
            self._dtype = exact_type(node.tensors["weight"], self._read(0))

    def forward(self, *inputs: Any) -> Any:
        """Return the node's tensor."""
        return getattr(self, f"_{self.node.operator}")(*inputs)

    def accumulators(self, x: Tensor) -> Tensor:
        """Return Σ (x − z_x) · w + b of a convolution or matrix product, int32, from the integers x."""
        # A GPU may use other algorithms for float32, and fewer bits.
        dtype = self._dtype if x.device.type == "cpu" else torch.float64
        values, weight = self._centred(x, 0).to(dtype), self.weight.to(dtype)
        if self.node.operator == "linear":
            return F.linear(values, weight).int() + self.bias
        stride, padding, dilation, groups = (self.node.attributes[key] for key in CONVOLUTION)
        sums = torch.conv2d(values, weight, None, stride, padding, dilation, groups)
        return sums.int() + self._channels(self.bias)

    def _conv(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        sums = self.accumulators(x)
        scale = self.weight_scale.double() * self._read(0).scale
        if self.node.output is None:
            return sums.float() * self._channels(scale.float())
        real = sums.float() * self._channels((scale / self.node.output.scale).float())
        return self._settle(real if residual is None else real + self._rescaled(residual, 1))

    _linear = _conv

    def _quantize(self, x: Tensor) -> Tensor:
        output = self._output()
        return quantize(x, torch.tensor(output.scale), torch.tensor(output.zero_point)).clamp(output.low, output.high)

    def _dequantize(self, x: Tensor) -> Tensor:
        return self._centred(x, 0).float() * self._read(0).scale

    def _add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._settle(self._rescaled(x, 0) + self._rescaled(other, 1))

    def _multiply(self, x: Tensor, other: Tensor) -> Tensor:
        scale = self._read(0).scale * self._read(1).scale / self._output().scale
        return self._settle((self._centred(x, 0) * self._centred(other, 1)).float() * _single(scale))

    def _average_pool(self, x: Tensor) -> Tensor:
        attributes, scale = self.node.attributes, self._read(0).scale / self._output().scale
        if attributes["kernel"] is None:
            count = math.prod(x.shape[2:])
            sums = x.sum((2, 3), dtype=torch.int32, keepdim=attributes["keep"]) - count * self._read(0).zero_point
            return self._settle(sums.float() * _single(scale / count))
        values = self._centred(x, 0)
        windows = {"kernel_size": attributes["kernel"], "stride": attributes["stride"]}
        windows |= {"padding": attributes["padding"], "ceil_mode": attributes["ceil"]}
        sums = F.avg_pool2d(values.double(), **windows, divisor_override=1)
        shares = F.avg_pool2d(
            torch.ones_like(values[:1, :1], dtype=torch.float64),
            **windows,
            count_include_pad=attributes["include_padding"],
        )
        ones = F.avg_pool2d(torch.ones_like(values[:1, :1], dtype=torch.float64), **windows, divisor_override=1)
        return self._settle(sums.float() * (scale / (ones / shares).round()).float())

    def _concatenate(self, *several: Tensor) -> Tensor:
        moved = [self._settle(self._rescaled(x, place)) for place, x in enumerate(several)]
        return torch.cat(moved, self.node.attributes["dim"])

    def _lookup(self, x: Tensor) -> Tensor:
        return self.table[x.int()]

    def _max_pool(self, x: Tensor) -> Tensor:
        attributes = self.node.attributes
        windows = {"kernel_size": attributes["kernel"], "stride": attributes["stride"]}
        windows |= {"padding": attributes["padding"], "dilation": attributes["dilation"]}
        pooled: Tensor = F.max_pool2d(x.float(), **windows, ceil_mode=attributes["ceil"])
        return pooled.to(torch.uint8)

    def _float(self, *inputs: Any) -> Any:
        target, attributes = self.node.attributes["target"], self.node.attributes
        arguments = self._filled(attributes["arguments"], inputs)
        keywords = {name: self._filled(value, inputs) for name, value in attributes.get("keywords", {}).items()}
        return function(target)(*arguments, **keywords)

    _move = _float

    def _filled(self, argument: Any, inputs: Sequence[Any]) -> Any:
        if isinstance(argument, dict):
            kind, which = next(iter(argument.items()))
            read: dict[str, Callable[[], Any]] = {
                "input": lambda: inputs[which],
                "tensor": lambda: getattr(self, which),
                "dtype": lambda: DTYPES[which],
                "device": lambda: inputs[which].device,
            }
            return read[kind]()
        return [self._filled(one, inputs) for one in argument] if isinstance(argument, list | tuple) else argument

    def _read(self, place: int) -> Quantization:
        given = self.given[place]
        assert given is not None, f"input {place} of {self.node.name} is in floats"
        return given

    def _output(self) -> Quantization:
        assert self.node.output is not None, f"{self.node.name} has no output quantization"
        return self.node.output

    def _centred(self, x: Tensor, place: int) -> Tensor:
        return x.int() - self._read(place).zero_point

    def _rescaled(self, x: Tensor, place: int) -> Tensor:
        return self._centred(x, place).float() * _single(self._read(place).scale / self._output().scale)

    def _channels(self, values: Tensor) -> Tensor:
        """Return a value an output channel so that it meets the maps of a convolution."""
        return values.view(-1, 1, 1) if self.node.operator == "conv" else values

    def _settle(self, real: Tensor) -> Tensor:
        output = self._output()
        return (real.round() + output.zero_point).clamp(output.low, output.high).to(torch.uint8)


def exact_type(weight: Tensor, of_x: Quantization) -> torch.dtype:
    """Return the type of floats in which the sums of Σ (x − z_x) · w are exact, whatever x is."""
    reach = max(of_x.zero_point, 255 - of_x.zero_point)
    largest = int(weight.flatten(1).long().abs().sum(1).max()) * reach
    return torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64


def function(target: str) -> Callable[..., Any]:
    """Return PyTorch's operator of a name such as ``aten.relu.default``, or Python's such as ``operator.getitem``."""
    kind, _, name = target.partition(".")
    found: Callable[..., Any] = PYTHON[name] if kind == "operator" else operator.attrgetter(name)(torch.ops.aten)
    return found


def _single(value: float) -> float:
    """Return the nearest float32."""
    return float(torch.tensor(value, dtype=torch.float32))
