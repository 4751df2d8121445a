"""All operators but convolutions and matrix products, and the way through a network: for engines made of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.compress.network import IMAGES, Network, Node, Program, Quantization

Step = Callable[..., Tensor]  # a node: its inputs to its output


def program(network: Network, heavy: Mapping[str, Callable[[Node, Sequence[Quantization]], Step]]) -> Program:
    """Return a network ready to run, one step a node; a tensor is let go behind its last consumer.

    Args:
        network: What to run.
        heavy: Builders of the steps for operators that this module does not know, ``conv`` and ``linear`` first of all:
            from a node and how its inputs are read.
    """
    read = network.outputs()
    last = {name: node.name for node in network for name in node.inputs}
    steps = []
    for node in network:
        build = heavy.get(node.operator) or PLAIN[node.operator]
        done = [name for name in dict.fromkeys(node.inputs) if last[name] == node.name]
        given = cast(list[Quantization], [read[name] for name in node.inputs])  # None where a step won't look
        steps.append((node, build(node, given), done))

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        values = {IMAGES: images.contiguous(memory_format=torch.channels_last)}
        for node, step, done in steps:
            value = step(*(values[name] for name in node.inputs))
            for name in done:
                del values[name]
            values[node.name] = value
        return value

    return run


def settle(real: Tensor, output: Quantization) -> Tensor:
    """Bring float32 multiples of the output's scale, in place, to its integers: R(real) + z, clipped, uint8."""
    return real.round_().add_(output.zero_point).clamp_(output.low, output.high).to(torch.uint8)


def centred(x: Tensor, given: Quantization) -> Tensor:
    """Return x − z in float32, where it is exact."""
    return x.float().sub_(given.zero_point)


def single(value: float) -> float:
    """Return the float32 that is nearest."""
    return torch.tensor(value, dtype=torch.float32).item()


def _of(node: Node) -> Quantization:
    assert node.output is not None
    return node.output


def _quantize(node: Node, given: Sequence[Quantization]) -> Step:
    output = _of(node)

    def step(x: Tensor) -> Tensor:
        real = (x / output.scale).add_(output.zero_point).round_()
        return real.clamp_(output.low, output.high).to(torch.uint8)

    return step


def _dequantize(node: Node, given: Sequence[Quantization]) -> Step:
    (of_x,) = given
    return lambda x: centred(x, of_x).mul_(of_x.scale)


def _add(node: Node, given: Sequence[Quantization]) -> Step:
    output = _of(node)
    of_x, of_r = given
    by_x, by_r = single(of_x.scale / output.scale), single(of_r.scale / output.scale)
    return lambda x, r: settle(centred(x, of_x).mul_(by_x) + centred(r, of_r).mul_(by_r), output)


def _multiply(node: Node, given: Sequence[Quantization]) -> Step:
    output = _of(node)
    of_x, of_r = given
    by = single(of_x.scale * of_r.scale / output.scale)
    # Products of two bytes are exact in float32.
    return lambda x, r: settle((centred(x, of_x) * centred(r, of_r)).mul_(by), output)


def _average_pool(node: Node, given: Sequence[Quantization]) -> Step:
    output, (of_x,), attributes = _of(node), given, node.attributes
    by = of_x.scale / output.scale

    def whole(x: Tensor) -> Tensor:
        size = x.shape[2] * x.shape[3]
        total = x.sum((2, 3), dtype=torch.int32, keepdim=bool(attributes["keep"])) - size * of_x.zero_point
        return settle(total.float().mul_(single(by / size)), output)

    def windows(x: Tensor) -> Tensor:
        words = {key: attributes[key] for key in ("stride", "padding")}
        words |= {"kernel_size": attributes["kernel"], "ceil_mode": attributes["ceil"]}
        total = F.avg_pool2d(centred(x, of_x), **words, divisor_override=1)  # sums, exact in float32
        ones = torch.ones_like(x[:1, :1], dtype=torch.float32)
        mean = F.avg_pool2d(ones, **words, count_include_pad=attributes["include_padding"])
        divisor = (F.avg_pool2d(ones, **words, divisor_override=1) / mean).round()
        return settle(total * (by / divisor.double()).float(), output)

    return whole if attributes["kernel"] is None else windows


def _concatenate(node: Node, given: Sequence[Quantization]) -> Step:
    output, dim = _of(node), node.attributes["dim"]

    def moved(x: Tensor, of_x: Quantization) -> Tensor:
        if of_x == output:
            return x
        return settle(centred(x, of_x).mul_(single(of_x.scale / output.scale)), output)

    return lambda *several: torch.cat([moved(x, of_x) for x, of_x in zip(several, given, strict=True)], dim)


def _lookup(node: Node, given: Sequence[Quantization]) -> Step:
    table = node.tensors["table"]
    return lambda x: table.to(x.device)[x.int()]


def _max_pool(node: Node, given: Sequence[Quantization]) -> Step:
    kernel, stride, padding, dilation = (
        list(node.attributes[key]) for key in ("kernel", "stride", "padding", "dilation")
    )
    ceil = bool(node.attributes["ceil"])

    def step(x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # aten::max_pool2d counts the pixels of a map in the type of its elements: 255 at most.
            y: Tensor = torch.ops.quantized.max_pool2d(x, kernel, stride, padding, dilation, ceil)
            return y
        return F.max_pool2d(x.half(), kernel, stride, padding, dilation, ceil).to(torch.uint8)

    return step


def _call(node: Node, given: Sequence[Quantization]) -> Step:
    """Return an operator of PyTorch's own, with tensors where its arguments name them."""
    operator: Any = torch.ops
    for part in node.attributes["target"].split("."):
        operator = getattr(operator, part)

    def fill(argument: Any, inputs: Sequence[Tensor]) -> Any:
        if isinstance(argument, Mapping):
            if "input" in argument:
                return inputs[argument["input"]]
            return node.tensors[argument["tensor"]].to(inputs[0].device)
        return [fill(each, inputs) for each in argument] if isinstance(argument, list | tuple) else argument

    def step(*inputs: Tensor) -> Tensor:
        arguments = [fill(each, inputs) for each in node.attributes["arguments"]]
        keywords = {key: fill(each, inputs) for key, each in node.attributes.get("keywords", {}).items()}
        return operator(*arguments, **keywords)  # type: ignore[no-any-return]

    return step


PLAIN: Mapping[str, Callable[[Node, Sequence[Quantization]], Step]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "add": _add,
    "multiply": _multiply,
    "average_pool": _average_pool,
    "concatenate": _concatenate,
    "lookup": _lookup,
    "max_pool": _max_pool,
    "move": _call,
    "float": _call,
}
