"""A network in integers as pure data, and what an engine must do with it.

A :class:`Network` is a list of nodes in topological order. A node makes one tensor, which has the node's name. A tensor
is in integers where its node has an ``output`` :class:`Quantization`: real value = scale · (integer − zero_point),
stored as uint8. Elsewhere it is float32. A batch of images, float32 (batch, C, H, W), is the tensor ``images``.

**The arithmetic**, so that all engines can be compared. Notation: x and r are inputs with scales s_x, s_r and zero
points z_x, z_r; y is the output with s_y, z_y and the bounds ``low`` and ``high``, into which clip() brings a value; R
rounds to the nearest integer, ties to even. A multiplier m is computed in float64 and stored as float32, and what is
multiplied with it is a float32 before and after.

``quantize``
    y = clip(R(x / s_y + z_y)), from float32; in float32.
``dequantize``
    y = s_x · (x − z_x), to float32.
``conv``, ``linear``
    acc = Σ (x − z_x) · w + b, exact in int32, and y = clip(R(acc · m) + z_y), for output channel o with
    m = s_x · s_w[o] / s_y. Padding is with zeros of the real values, so with z_x. With a second input r, a residual:
    y = clip(R(acc · m + (r − z_r) · m_r) + z_y), m_r = s_r / s_y. Without an output quantization, as of the logits:
    y = acc · m, m = s_x · s_w[o], in float32; such a node has no residual.
``add``
    y = clip(R((x − z_x) · m_x + (r − z_r) · m_r) + z_y), m_x = s_x / s_y, m_r = s_r / s_y.
``multiply``
    y = clip(R((x − z_x) · (r − z_r) · m) + z_y), the product in int32, m = s_x · s_r / s_y; shapes are broadcast.
``average_pool``
    acc = Σ (x − z_x) over the window, exact in int32; y = clip(R(acc · m) + z_y), m = s_x / (s_y · divisor).
``concatenate``
    every input by itself: y = clip(R((x − z_x) · m) + z_y), m = s_x / s_y.
``lookup``
    y = table[x], any function of one value.
``max_pool``, ``move``
    integers are compared, or moved, as they are; y has the quantization of x.
``float``
    a PyTorch operator in float32.

Zero points are taken off as integers, before any multiplication by a float. R(a · m) + z and R(a · m + z) differ where
a · m is a tie and z is odd. An engine that does the latter, or fuses a multiplication and an addition, is one unit off
there, and may be. ReLU is no operator: it is the bound ``low`` = z_y of the node before it.

Attributes by operator:

``conv``
    ``stride``, ``padding``, ``dilation`` (pairs: height, width), ``groups``.
``average_pool``, ``max_pool``
    ``kernel``, ``stride``, ``padding`` (pairs), ``ceil`` (whether the last window may hang over); max_pool also
    ``dilation``. ``kernel`` None: the mean over the whole map, (batch, C, H, W) to (batch, C, 1, 1), or to (batch, C)
    where ``keep`` is false. ``include_padding``: whether the divisor counts the padding.
``concatenate``
    ``dim``.
``lookup``
    ``function``: its name, such as ``aten.hardswish.default``.
``conv``, ``linear`` with a residual
    ``branch``: the quantization (scale, zero point, low, high) of the product alone, for engines that cannot fuse:
    see :func:`unfused`.
``move``, ``float``
    ``target``, an operator of PyTorch such as ``aten.flatten.using_ints``; ``arguments``, in order, in which
    {"input": i} stands for the i-th input, {"tensor": name} for one of the node's tensors, {"dtype": name} for a type
    such as ``float32`` and {"device": i} for the device of the i-th input; ``keywords``, a mapping likewise, where
    there are any.

Tensors by operator:

``conv``
    ``weight`` int8 (outputs, inputs / groups, kH, kW), ``weight_scale`` float32 (outputs,), ``bias`` int32 (outputs,).
``linear``
    ``weight`` int8 (outputs, inputs), ``weight_scale``, ``bias`` likewise; x is (batch, …, inputs).
``lookup``
    ``table`` uint8 (256,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

IMAGES = "images"
# Their accumulators are sums of products: what the engines are measured by.
HEAVY = ("conv", "linear")
INTEGER = (*HEAVY, "add", "multiply", "average_pool", "concatenate", "lookup", "max_pool", "move")


@dataclass(frozen=True)
class Quantization:
    """Scale and zero point of a tensor: real value = scale · (integer − zero_point).

    Attributes:
        scale: Above 0; a number that float32 holds exactly.
        zero_point: The integer that stands for 0, itself within 0 … 255.
        low: The least integer: 0, or the zero point behind a ReLU.
        high: The greatest: 255, or 127 in a reduced range.
    """

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


@dataclass(frozen=True)
class Node:
    """One operator and the tensor that it makes.

    Attributes:
        name: The tensor's, unique: for layers with weights that of the module, such as ``layer1.0.conv1``.
        operator: One of the table's.
        inputs: Names of tensors; the second of a conv or linear, where there is one, is a residual.
        output: How its integers are read; None: the tensor is float32.
        attributes: See the list; JSON's types alone.
        tensors: Weights; see the list.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    output: Quantization | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network in integers.

    Attributes:
        nodes: In topological order; the last one makes the logits, float32 (batch, classes).
        image: Shape of an image, (C, H, W).
    """

    nodes: tuple[Node, ...]
    image: tuple[int, int, int]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def outputs(self) -> dict[str, Quantization | None]:
        """Return how every tensor is read, by name."""
        return {IMAGES: None, **{node.name: node.output for node in self.nodes}}

    def consumers(self) -> dict[str, list[Node]]:
        """Return which nodes take every tensor, by name."""
        found: dict[str, list[Node]] = {name: [] for name in self.outputs()}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found

    @property
    def integer_operators(self) -> list[str]:
        """Names of the nodes that compute in integers."""
        return [node.name for node in self.nodes if node.operator in INTEGER]

    @property
    def float_operators(self) -> list[str]:
        """Names of the nodes that compute in float32: what had no operator in integers, or was kept by choice."""
        return [node.name for node in self.nodes if node.operator == "float"]


def unfused(network: Network) -> Network:
    """Return the network with every residual addition as a node of its own: one rounding more, for other engines."""
    nodes: list[Node] = []
    for node in network:
        if node.operator in HEAVY and len(node.inputs) == 2:
            branch = f"{node.name}/branch"
            attributes = {key: value for key, value in node.attributes.items() if key != "branch"}
            alone = Quantization(*node.attributes["branch"])
            nodes.append(replace(node, name=branch, inputs=node.inputs[:1], output=alone, attributes=attributes))
            nodes.append(Node(node.name, "add", (branch, node.inputs[1]), node.output))
        else:
            nodes.append(node)
    return replace(network, nodes=tuple(nodes))


def without_unused(network: Network, last: str) -> Network:
    """Return what makes the tensor ``last``, which comes last."""
    wanted = {last}
    for node in reversed(network.nodes):
        wanted |= set(node.inputs) if node.name in wanted else set()
    nodes = {node.name: node for node in network if node.name in wanted}
    final = nodes.pop(last)
    return replace(network, nodes=(*nodes.values(), final))


Program = Callable[
    [Tensor], Tensor
]  # images float32 (batch, C, H, W) on any device, to logits float32 (batch, classes)


class Engine(Protocol):
    """Interface of an engine, which computes a network."""

    @property
    def name(self) -> str:
        """Return the name that users give."""

    def available(self) -> str | None:
        """Return None where it can run here, else why not and what would do, as a sentence."""

    def load(self, network: Network) -> Program:
        """Return the network ready to run.

        Raises:
            UserError: it holds a node that this engine cannot compute.
        """
