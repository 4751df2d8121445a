"""From float operators to integers: which are fused, which stay in floats, and the integers of their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from largebatch.quantization.affine import integer_range, quantize, scale_and_zero_point
from largebatch.quantization.exported import CAT, CONV, LINEAR, PAD, pair
from largebatch.quantization.network import HEAVY, IMAGES, Network, Node, Quantization, without_unused
from largebatch.quantization.reference import function
from largebatch.quantization.saturation import safe_scale

# Functions of one value: a table of 256 entries.
FUNCTIONS = {
    f"aten.{name}"
    for name in (
        *("relu.default", "hardtanh.default", "relu6.default", "clamp.default", "leaky_relu.default", "elu.default"),
        *(
            "hardswish.default",
            "hardsigmoid.default",
            "silu.default",
            "sigmoid.default",
            "gelu.default",
            "tanh.default",
        ),
        *("mish.default", "softplus.default", "add.Tensor", "mul.Tensor", "sub.Tensor", "div.Tensor"),
    )
}
MOVES = {
    f"aten.{name}"
    for name in (
        *("flatten.using_ints", "reshape.default", "view.default", "permute.default", "transpose.int", "squeeze.dim"),
        *("unsqueeze.default", "slice.Tensor", "select.int", "pixel_shuffle.default", "squeeze.dims"),
        *("roll.default", "expand.default"),
    )
}
ADD, MULTIPLY = "aten.add.Tensor", "aten.mul.Tensor"
POOLS = ("aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.mean.dim")
LIKELY = {CONV, LINEAR, CAT, PAD, *FUNCTIONS, *MOVES, *POOLS}
# A bias may take a quarter of an accumulator's range.
BIAS_LIMIT = 2**29
Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """Options for lowering a network to integers.

    Attributes:
        bits: Of weights and activations, 2 to 8.
        per_channel: Whether every output channel of a weight has a scale of its own, or all have one.
        keep: Names of float operators that stay in floats.
        safe: Whether weights that could overflow 16 bits take less of their range: see
            :mod:`largebatch.quantization.saturation`.
    """

    bits: int = 8
    per_channel: bool = True
    keep: Collection[str] = ()
    safe: bool = False


@dataclass(frozen=True)
class Lowered:
    """A network in integers, and the float tensor that each of its tensors in integers stands for, by names."""

    network: Network
    stands_for: Mapping[str, str]


def lower(network: Network, ranges: Mapping[str, Range], recipe: Recipe) -> Lowered:
    """Return a list of float operators in integers.

    Convolutions and matrix products become integers, with a residual that is added and a ReLU behind them fused. Other
    operators do where everything that they take is in integers already, so that nothing is rounded only for them.

    Args:
        network: From :func:`largebatch.quantization.trace.trace`.
        ranges: (α, β) of float tensors by name, as calibrated.
        recipe: How.

    Raises:
        UserError: bits outside 2 … 8.
    """
    return _Lowering(network, ranges, recipe).lowered()


def needed(network: Network, recipe: Recipe) -> list[str]:
    """Return the names of the float tensors whose ranges :func:`lower` will ask for, whichever layers are kept."""

    class Asked(dict[str, Range]):
        def __missing__(self, name: str) -> Range:
            self[name] = (-1.0, 1.0)
            return self[name]

    asked = Asked()
    lower(network, asked, replace(recipe, keep=()))
    products = (node.inputs[0] for node in network if node.attributes["target"] in (CONV, LINEAR))
    return list(dict.fromkeys([*asked, *products]))  # behind a layer in floats, the next one's input is rounded


class _Lowering:
    """The integers made so far."""

    def __init__(self, network: Network, ranges: Mapping[str, Range], recipe: Recipe) -> None:
        self.floats, self.ranges, self.recipe = network, ranges, recipe
        self.high = integer_range(recipe.bits, signed=False)[1]
        self.consumers = network.consumers()
        self.shapes = {IMAGES: list(network.image), **{node.name: node.attributes["shape"] for node in network}}
        self.nodes: dict[str, Node] = {}
        self.whole: dict[str, str] = {}  # float tensors that there are in integers: the name of those
        self.real: dict[str, str] = {IMAGES: IMAGES}  # and in floats
        self.fused: set[str] = set()
        self.rectified: set[str] = set()
        self.expected: set[str] = set()  # float tensors that are likely to be made in integers
        for node in network:
            target, given = node.attributes["target"], {*node.inputs}
            if node.name not in recipe.keep and (target in (CONV, LINEAR) or (given and given <= self.expected)):
                self.expected |= {node.name} if target in LIKELY else set()

    def lowered(self) -> Lowered:
        for node in self.floats:
            if node.name in self.fused:
                continue
            if node.name in self.recipe.keep or not self._in_integers(node):
                self._stay(node)
        last = self.floats.nodes[-1].name
        final = self._floats(last)
        stands_for = {ours: theirs for theirs, ours in self.whole.items()}
        network = self._ending_in_floats(final)
        return Lowered(network, {name: stands_for[name] for name in network.outputs() if name in stands_for})

    def _in_integers(self, node: Node) -> bool:
        """Make a node in integers, if there is a way."""
        target = node.attributes["target"]
        if target in (CONV, LINEAR):
            return self._heavy(node, "conv" if target == CONV else "linear")
        if not node.inputs or any(name not in self.whole for name in node.inputs) or node.tensors:
            return False
        if target in FUNCTIONS and len(node.inputs) == 1:
            return self._lookup(node)
        if target in MOVES and len(node.inputs) == 1:
            return self._same(node, "move", _call(node))
        if target == PAD:
            return self._pad(node)
        ways: dict[str, Callable[[Node], bool]] = {
            ADD: self._add,
            MULTIPLY: self._multiply,
            CAT: self._concatenate,
            "aten.max_pool2d.default": self._max_pool,
            "aten.avg_pool2d.default": self._average_pool,
            "aten.adaptive_avg_pool2d.default": self._adaptive_pool,
            "aten.mean.dim": self._mean,
        }
        return target in ways and ways[target](node)

    def _heavy(self, node: Node, operator: str) -> bool:
        if "weight" not in node.tensors or not node.attributes["shape"]:
            return False
        x = self._integers(node.inputs[0])
        read = self.nodes[x].output
        assert read is not None
        tensors = self._weights(node, read)
        if tensors is None:
            return False
        attributes: dict[str, Any] = {}
        if operator == "conv":
            _, _, _, *how, groups = with_defaults(node, [None, None, None, 1, 0, 1, 1])
            attributes = dict(zip(("stride", "padding", "dilation"), map(pair, how), strict=True))
            attributes["groups"] = groups
        ends, inputs = node.name, [x]
        added = self._residual(node)
        if added is not None:
            branch = self._quantization(node.name)
            attributes["branch"] = [branch.scale, branch.zero_point, branch.low, branch.high]
            other = next(name for name in added.inputs if name != node.name)
            inputs.append(self.whole[other])
            ends = added.name
        self._made(Node(node.name, operator, tuple(inputs), None, attributes, tensors), ends)
        return True

    def _residual(self, node: Node) -> Node | None:
        """Return the addition that a product is fused with: of it alone and a tensor that is there in integers."""
        following = self._only_consumer(node.name)
        if following is None or not self._is_sum(following) or following.name in self.recipe.keep:
            return None
        others = [name for name in following.inputs if name != node.name]
        return following if others and others[0] in self.whole else None

    def _made(self, node: Node, ends: str) -> None:
        """Add a node that makes the float tensor ``ends``, and with it the ReLU behind it."""
        following = self._only_consumer(ends)
        self.fused.add(ends)
        if following is not None and _is_relu(following) and following.name not in self.recipe.keep:
            ends = following.name
            self.fused.add(ends)
            self.rectified.add(node.name)
        output = self._quantization(ends)
        if node.name in self.rectified:
            output = replace(output, low=output.zero_point)
        self.nodes[node.name] = replace(node, output=output)
        self.whole[ends] = node.name

    def _weights(self, node: Node, read: Quantization) -> dict[str, Tensor] | None:
        """Return integer weights, their scales and bias, or None where an accumulator could overflow."""
        weight = node.tensors["weight"].float()
        bias = node.tensors["bias"].double() if "bias" in node.tensors else torch.zeros(len(weight)).double()
        reach = weight.flatten(1).abs().amax(1)
        if not self.recipe.per_channel:
            reach = reach.max().expand_as(reach)
        scale, zero = scale_and_zero_point(-reach, reach, self.recipe.bits, signed=True, symmetric=True)
        if self.recipe.safe:
            scale = safe_scale(weight, scale, read.high)
            scale = scale if self.recipe.per_channel else scale.max().expand_as(scale)
        # Of a channel that is dead, or nearly, the bias decides, so that it is kept and fits into an accumulator.
        least = (bias.abs() / (read.scale * BIAS_LIMIT)).clamp(min=torch.finfo(torch.float32).tiny).float()
        scale = torch.where(bias != 0, torch.maximum(scale.where(reach > 0, 0), least), scale)
        integers = quantize(weight, scale, zero, self.recipe.bits, signed=True, axis=0)
        whole_bias = (bias / (read.scale * scale.double())).round()
        farthest = max(read.zero_point, 255 - read.zero_point)
        most = integers.flatten(1).double().abs().sum(1) * farthest + whole_bias.abs()
        if most.max() >= 2**31:
            return None
        return {"weight": integers, "weight_scale": scale, "bias": whole_bias.int()}

    def _lookup(self, node: Node) -> bool:
        x = self.whole[node.inputs[0]]
        read, output = self.nodes[x].output, self._quantization(node.name)
        assert read is not None
        values = (torch.arange(256) - read.zero_point).float() * read.scale
        arguments = [values if isinstance(one, dict) else one for one in node.attributes["arguments"]]
        reals = function(node.attributes["target"])(*arguments, **node.attributes["keywords"]).float()
        table = quantize(reals, torch.tensor(output.scale), torch.tensor(output.zero_point), self.recipe.bits)
        made = {"function": node.attributes["target"]}
        self.nodes[node.name] = Node(node.name, "lookup", (x,), output, made, {"table": table})
        self.whole[node.name] = node.name
        return True

    def _same(self, node: Node, operator: str, attributes: Mapping[str, Any]) -> bool:
        """Add an operator that leaves integers as they are."""
        x = self.whole[node.inputs[0]]
        self.nodes[node.name] = Node(node.name, operator, (x,), self.nodes[x].output, attributes)
        self.whole[node.name] = node.name
        return True

    def _add(self, node: Node) -> bool:
        if not self._is_sum(node):
            return False
        self._made(Node(node.name, "add", self._wholes(node)), node.name)
        return True

    def _multiply(self, node: Node) -> bool:
        self._made(Node(node.name, "multiply", self._wholes(node)), node.name)
        return True

    def _concatenate(self, node: Node) -> bool:
        several, *rest = node.attributes["arguments"]
        dim, shape = rest[0] if rest else 0, node.attributes["shape"]
        if shape is None or not all(map(_is_input, several)):
            return False
        dim %= len(shape) + 1
        if dim == 0:
            return False
        self._made(Node(node.name, "concatenate", self._wholes(node), None, {"dim": dim}), node.name)
        return True

    def _pad(self, node: Node) -> bool:
        """Pad with zeros of the real values."""
        x, pads, value = with_defaults(node, [None, None, 0])
        read = self.nodes[self.whole[node.inputs[0]]].output
        assert read is not None
        padded = {"target": PAD, "arguments": [x, pads, read.zero_point]}
        return not value and self._same(node, "move", padded)

    def _max_pool(self, node: Node) -> bool:
        _, kernel, stride, padding, dilation, ceil = with_defaults(node, [None, None, [], 0, 1, False])
        attributes = {"kernel": pair(kernel), "stride": pair(stride or kernel), "padding": pair(padding)}
        return self._same(node, "max_pool", {**attributes, "dilation": pair(dilation), "ceil": ceil})

    def _average_pool(self, node: Node) -> bool:
        _, kernel, stride, padding, ceil, include, divisor = with_defaults(node, [None, None, [], 0, False, True, None])
        attributes = {"kernel": pair(kernel), "stride": pair(stride or kernel), "padding": pair(padding)}
        attributes |= {"ceil": ceil, "include_padding": include}
        return divisor is None and self._pool(node, attributes)

    def _adaptive_pool(self, node: Node) -> bool:
        before, after = (shape and shape[1:] for shape in (self.shapes[node.inputs[0]], node.attributes["shape"]))
        if not (before and after):
            return False
        if before == after:
            self.whole[node.name] = self.whole[node.inputs[0]]
            return True
        if after == [1, 1]:
            return self._pool(node, {"kernel": None, "keep": True})
        kernel = [size // parts for size, parts in zip(before, after, strict=True)]
        attributes = {"kernel": kernel, "stride": kernel, "padding": [0, 0], "ceil": False, "include_padding": True}
        divides = [size % parts for size, parts in zip(before, after, strict=True)] == [0, 0]
        return divides and self._pool(node, attributes)

    def _mean(self, node: Node) -> bool:
        _, dims, keep = with_defaults(node, [None, None, False])
        maps = len(self.shapes[node.inputs[0]] or ()) == 3
        whole_map = maps and bool(dims) and sorted(dim % 4 for dim in dims) == [2, 3]
        return whole_map and self._pool(node, {"kernel": None, "keep": keep})

    def _pool(self, node: Node, attributes: Mapping[str, Any]) -> bool:
        self._made(Node(node.name, "average_pool", self._wholes(node), None, attributes), node.name)
        return True

    def _stay(self, node: Node) -> None:
        """Leave a node in floats."""
        inputs = tuple(self._floats(name) for name in node.inputs)
        self.nodes[node.name] = replace(node, inputs=inputs, attributes=_call(node))
        self.real[node.name] = node.name

    def _integers(self, name: str) -> str:
        """Return a float tensor in integers, quantized where it is not yet."""
        if name not in self.whole:
            quantized = f"{name}.quantized"
            self.nodes[quantized] = Node(quantized, "quantize", (self.real[name],), self._quantization(name))
            self.whole[name] = quantized
        return self.whole[name]

    def _floats(self, name: str) -> str:
        if name not in self.real:
            real = f"{name}.real"
            self.nodes[real] = Node(real, "dequantize", (self.whole[name],))
            self.real[name] = real
        return self.real[name]

    def _ending_in_floats(self, final: str) -> Network:
        """Return the network; products that are wanted in floats alone give them without a rounding."""
        network = without_unused(Network(tuple(self.nodes.values()), self.floats.image), final)
        consumers = network.consumers()
        renamed: dict[str, str] = {}
        nodes = {}
        for node in network:
            takers = consumers[node.name]
            plain = node.operator in HEAVY and len(node.inputs) == 1 and node.name not in self.rectified
            if plain and takers and all(taker.operator == "dequantize" for taker in takers):
                renamed |= {taker.name: node.name for taker in takers}
                nodes[node.name] = replace(node, output=None)
            elif node.name not in renamed:
                nodes[node.name] = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        return without_unused(replace(network, nodes=tuple(nodes.values())), renamed.get(final, final))

    def _quantization(self, name: str) -> Quantization:
        own = self.ranges[name]  # also where another one is taken: reports show it
        concatenated = self._concatenated(name)
        ends = own if concatenated is None else self.ranges[concatenated]
        low, high = (torch.tensor(end, dtype=torch.float64) for end in ends)
        scale, zero = scale_and_zero_point(low, high, self.recipe.bits)
        return Quantization(float(scale), int(zero), 0, self.high)

    def _concatenated(self, name: str) -> str | None:
        """Return the concatenation that alone takes a tensor, moved or not: with its range nothing is rounded twice."""
        found = None
        while (following := self._only_consumer(name)) is not None and following.name in self.expected:
            target, name = following.attributes["target"], following.name
            if target == CAT:
                found = name
            elif target not in MOVES:
                break
        return found

    def _wholes(self, node: Node) -> tuple[str, ...]:
        """Return the inputs in the order of the arguments, where one may come twice."""
        first = node.attributes["arguments"][0]
        places = first if isinstance(first, list) else [one for one in node.attributes["arguments"] if _is_input(one)]
        return tuple(self.whole[node.inputs[place["input"]]] for place in places)

    def _only_consumer(self, name: str) -> Node | None:
        takers = self.consumers[name]
        return takers[0] if len(takers) == 1 else None

    def _is_sum(self, node: Node) -> bool:
        """Whether a node adds two tensors of one shape."""
        attributes = node.attributes
        same = attributes["shape"] and all(self.shapes[name] == attributes["shape"] for name in node.inputs)
        two = len(node.inputs) == 2 and len(attributes["arguments"]) == 2 and not node.tensors
        return attributes["target"] == ADD and two and bool(same) and attributes["keywords"].get("alpha", 1) == 1


def _call(node: Node) -> dict[str, Any]:
    """Return what a call of PyTorch's operator takes."""
    return {key: node.attributes[key] for key in ("target", "arguments", "keywords") if node.attributes[key]}


def _is_relu(node: Node) -> bool:
    """Whether a node cuts off at 0; where it cuts off above, the range of its output says."""
    target, arguments = node.attributes["target"], node.attributes["arguments"]
    relu = target in ("aten.relu.default", "aten.relu6.default")
    return relu or (target == "aten.hardtanh.default" and len(arguments) > 1 and arguments[1] == 0)


def _is_input(argument: Any) -> bool:
    return isinstance(argument, dict) and "input" in argument


def with_defaults(node: Node, defaults: list[Any]) -> list[Any]:
    """Return all arguments of an operator, with their defaults."""
    arguments = node.attributes["arguments"]
    return [*arguments, *defaults[len(arguments) :]]
