"""A network in integers as an ONNX graph of quantize and dequantize pairs, which any runtime of ONNX reads.

Standard operators alone (opset 17). A pair around an operator says that it may be computed in integers: runtimes find
the pairs and do. A bound that is not the type's own is a Clip of bytes behind the pair; with zero point 0, ReLU is the
type's own. QuantizeLinear is R(x / s) + z where ours is R(x / s + z): one unit apart at ties with an odd z.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.quantization.exported import CONV, LINEAR, RESHAPE, SLICE, pair
from largebatch.quantization.lower import ADD, with_defaults
from largebatch.quantization.network import IMAGES, Network, Node, Quantization, unfused
from largebatch.quantization.reference import IntegerNetwork
from largebatch.quantization.shuffle import PERMUTE, TRANSPOSE

OPSET = 17
IR_VERSION = 8  # of ONNX 1.12, which came with this opset
LOGITS = "logits"


def as_onnx(network: Network) -> onnx.ModelProto:
    """Return the network as a checked ONNX model: ``images`` float32 (batch, C, H, W) to ``logits``.

    Residuals are nodes of their own there, with one rounding more: see :func:`network.unfused`.

    Raises:
        UserError: an operator that has no counterpart in ONNX here; its name, and what would do.
    """
    network = unfused(network)
    graph = _Graph(network.outputs(), _shapes(network))
    for node in network:
        BUILDERS[node.operator](graph, node)
    last = graph.real(network.nodes[-1].name)
    graph.add("Identity", [last], LOGITS)
    classes = network.nodes[-1].tensors
    width = len(classes["bias"]) if "bias" in classes else "classes"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "largebatch",
            [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, ["batch", *network.image])],
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", width])],
            graph.constants,
        ),
        producer_name="largebatch",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, without the first dimension, from a pass of the oracle."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = tuple(value.shape[1:])

    with torch.inference_mode():
        IntegerNetwork(network).eval()(torch.zeros(1, *network.image), see)
    return found


class _Graph:
    """Nodes and constants so far. Tensors of the network have a slash before their names, so that none is taken."""

    def __init__(self, read: Mapping[str, Quantization | None], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.read, self.shapes = read, shapes
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._known: dict[tuple[str, str], str] = {}
        self._real: set[str] = set()

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}:{output}", **attributes))
        return output

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        """Return the name of a constant, one for all that are equal."""
        key = (f"{value.dtype}{value.shape}", hashlib.sha256(value.tobytes()).hexdigest())
        if key not in self._known:
            self._known[key] = f"constant/{len(self._known)}"
            self.constants.append(numpy_helper.from_array(value, self._known[key]))
        return self._known[key]

    def scale(self, given: Quantization) -> list[str]:
        return [self.constant(np.array(given.scale, np.float32)), self.constant(np.array(given.zero_point, np.uint8))]

    def stored(self, name: str) -> str:
        """Return the name of a tensor as it is: bytes, or float32."""
        return name if name == IMAGES else f"/{name}"

    def real(self, name: str) -> str:
        """Return the name of a tensor's real values."""
        stored, given = self.stored(name), self.read[name]
        if given is None:
            return stored
        if name not in self._real:
            self._real.add(name)
            self.add("DequantizeLinear", [stored, *self.scale(given)], f"{stored}/real")
        return f"{stored}/real"

    def settle(self, node: Node, real: str, name: str | None = None) -> str:
        """Bring real values to the node's output: its bytes, within their bounds. Return their name, the node's own."""
        output, name = node.output, name or f"/{node.name}"
        assert output is not None
        free = output.low == 0 and output.high == 255
        stored = self.add("QuantizeLinear", [real, *self.scale(output)], name if free else f"{name}/free")
        if not free:
            bounds = [self.constant(np.array(bound, np.uint8)) for bound in (output.low, output.high)]
            self.add("Clip", [stored, *bounds], name)
        return name

    def weights(self, node: Node) -> list[str]:
        """Return the names of real weights and bias, both made from integers."""
        given = self.read[node.inputs[0]]
        assert given is not None
        scale = node.tensors["weight_scale"].numpy()
        per_bias = (scale.astype(np.float64) * given.scale).astype(np.float32)
        names = []
        for key, by in (("weight", scale), ("bias", per_bias)):
            whole = node.tensors[key].numpy()
            inputs = [self.constant(each) for each in (whole, by, np.zeros(len(by), whole.dtype))]
            names.append(self.add("DequantizeLinear", inputs, f"/{node.name}/{key}", axis=0))
        return names


def _heavy(operator: str, attributes: Callable[[Node], dict[str, Any]]) -> Callable[[_Graph, Node], None]:
    def build(graph: _Graph, node: Node) -> None:
        inputs = [graph.real(node.inputs[0]), *graph.weights(node)]
        exact = node.output is None
        real = graph.add(operator, inputs, f"/{node.name}" if exact else f"/{node.name}/product", **attributes(node))
        if not exact:
            graph.settle(node, real)

    return build


def _convolution(node: Node) -> dict[str, Any]:
    how = node.attributes
    return {
        "strides": how["stride"],
        "pads": [*how["padding"], *how["padding"]],
        "dilations": how["dilation"],
        "group": how["groups"],
    }


def _conv(graph: _Graph, node: Node) -> None:
    """Add a convolution; one whose sums are wanted in floats as such, for which there is no pair."""
    if node.output is not None:
        return _heavy("Conv", _convolution)(graph, node)
    given = graph.read[node.inputs[0]]
    assert given is not None
    weight, scale, bias = (_array(node.tensors[key]) for key in ("weight", "weight_scale", "bias"))
    zero = graph.constant(np.array(given.zero_point, np.uint8))
    inputs = [graph.stored(node.inputs[0]), graph.constant(weight), zero]
    sums = graph.add("ConvInteger", inputs, f"/{node.name}/sums", **_convolution(node))
    sums = graph.add("Add", [sums, graph.constant(bias.reshape(-1, 1, 1))], f"/{node.name}/biased")
    real = graph.add("Cast", [sums], f"/{node.name}/real", to=TensorProto.FLOAT)
    multiplier = (scale.astype(np.float64) * given.scale).astype(np.float32).reshape(-1, 1, 1)
    graph.add("Mul", [real, graph.constant(multiplier)], f"/{node.name}")
    return None


def _together(operator: str, attributes: Callable[[Node], dict[str, Any]] = lambda node: {}) -> Callable[..., None]:
    def build(graph: _Graph, node: Node) -> None:
        inputs = [graph.real(name) for name in node.inputs]
        graph.settle(node, graph.add(operator, inputs, f"/{node.name}/{operator}", **attributes(node)))

    return build


def _window(graph: _Graph, node: Node) -> dict[str, Any]:
    """Return the windows of a pool. Those that overhang end in padding: runtimes differ in what ``ceil_mode`` says."""
    how = node.attributes
    dilation = how.get("dilation", [1, 1])
    maps = zip(graph.shapes[node.inputs[0]][-2:], graph.shapes[node.name][-2:], strict=True)
    ends = [
        max(padding, (after - 1) * stride + step * (kernel - 1) + 1 - before - padding)
        for (before, after), kernel, stride, padding, step in zip(
            maps, how["kernel"], how["stride"], how["padding"], dilation, strict=True
        )
    ]
    return {"kernel_shape": how["kernel"], "strides": how["stride"], "pads": [*how["padding"], *ends]}


def _overhang(graph: _Graph, node: Node) -> np.ndarray[Any, Any]:
    """Return by how much each mean is too small, float32 (H, W): PyTorch counts no pixel beyond the padding."""
    how, factors = node.attributes, []
    for axis, kernel in enumerate(how["kernel"]):
        size, padding = graph.shapes[node.inputs[0]][axis - 2], how["padding"][axis]
        begins = np.arange(graph.shapes[node.name][axis - 2]) * how["stride"][axis] - padding
        factors.append(kernel / (np.minimum(begins + kernel, size + padding) - begins))
    return np.asarray(np.outer(*factors), np.float32)


def _average_pool(graph: _Graph, node: Node) -> None:
    how, real, mean = node.attributes, graph.real(node.inputs[0]), f"/{node.name}/mean"
    if how["kernel"] is not None:
        counted = bool(how["include_padding"])
        real = graph.add("AveragePool", [real], mean, **_window(graph, node), count_include_pad=int(counted))
        factors = _overhang(graph, node)
        if counted and (factors != 1).any():
            real = graph.add("Mul", [real, graph.constant(factors)], f"{mean}/counted")
        graph.settle(node, real)
    elif how["keep"]:
        graph.settle(node, graph.add("GlobalAveragePool", [real], mean))
    else:
        square = graph.settle(node, graph.add("GlobalAveragePool", [real], mean), f"/{node.name}/square")
        graph.add("Flatten", [square], f"/{node.name}")


def _max_pool(graph: _Graph, node: Node) -> None:
    """Add a maximum; where windows overhang by more than ONNX allows, the least number is put there."""
    x, window = graph.stored(node.inputs[0]), _window(graph, node)
    ends = window["pads"][2:]
    if any(end >= kernel for end, kernel in zip(ends, window["kernel_shape"], strict=True)):
        least = np.array(0, np.uint8) if graph.read[node.inputs[0]] else np.array(-np.inf, np.float32)
        pads = graph.constant(np.array([0, 0, 0, 0, 0, 0, *ends]))
        x = graph.add("Pad", [x, pads, graph.constant(least)], f"/{node.name}/padded")
        window["pads"] = [*window["pads"][:2], 0, 0]
    graph.add("MaxPool", [x], f"/{node.name}", **window, dilations=node.attributes["dilation"])


def _linear(graph: _Graph, node: Node) -> None:
    """Add a matrix product; of more than two dimensions, one of its rows."""
    inner = graph.shapes[node.inputs[0]]
    build = _heavy("Gemm", lambda node: {"transB": 1})
    if len(inner) == 1:
        return build(graph, node)
    rows, products = f"{node.name}/rows", f"{node.name}/products"
    shape = graph.constant(np.array([-1, inner[-1]]))
    graph.add("Reshape", [graph.stored(node.inputs[0]), shape], f"/{rows}")
    graph.read = {**graph.read, rows: graph.read[node.inputs[0]]}
    build(graph, replace(node, name=products, inputs=(rows,)))
    back = graph.constant(np.array([-1, *graph.shapes[node.name]]))
    graph.add("Reshape", [f"/{products}", back], f"/{node.name}")
    return None


def _lookup(graph: _Graph, node: Node) -> None:
    places = graph.add("Cast", [graph.stored(node.inputs[0])], f"/{node.name}/places", to=TensorProto.INT32)
    graph.add("Gather", [graph.constant(_array(node.tensors["table"])), places], f"/{node.name}")


def _quantize(graph: _Graph, node: Node) -> None:
    graph.settle(node, graph.real(node.inputs[0]))


def _dequantize(graph: _Graph, node: Node) -> None:
    graph.add("Identity", [graph.real(node.inputs[0])], f"/{node.name}")


def _call(graph: _Graph, node: Node) -> None:
    target, how = node.attributes["target"], node.attributes["arguments"][1:]
    x, name = graph.stored(node.inputs[0]), f"/{node.name}"
    rank = len(graph.shapes[node.inputs[0]]) + 1
    if target in UNCHANGED:
        graph.add("Identity", [x], name)
    elif target in RESHAPED and how == [1]:
        graph.add("Flatten", [x], name)
    elif target == RESHAPE and how[0][0] == -1:
        graph.add("Reshape", [x, graph.constant(np.array(how[0]))], name)
    elif target in (PERMUTE, TRANSPOSE):
        order = list(how[0]) if target == PERMUTE else list(range(rank))
        if target == TRANSPOSE:
            order[how[0]], order[how[1]] = order[how[1]], order[how[0]]
        graph.add("Transpose", [x], name, perm=[axis % rank for axis in order])
    elif target == SLICE:
        axis, start, end, step = with_defaults(node, [None, 0, None, None, 1])[1:]
        bounds = (start or 0, np.iinfo(np.int64).max if end is None else end, axis % rank, step)
        graph.add("Slice", [x, *(graph.constant(np.array([bound])) for bound in bounds)], name)
    else:
        raise _not_written(node)


def _not_written(node: Node) -> UserError:
    return UserError(
        f"{node.name} is {node.attributes['target']}, which is not written to ONNX: engine=x86 computes it, and "
        "engine=reference where there is no x86 processor."
    )


def _real(graph: _Graph, node: Node) -> None:
    """Add an operator that is kept in floats: those of networks of convolutions with residuals."""
    target, inputs = node.attributes["target"], [graph.real(name) for name in node.inputs]
    if target not in REAL or node.attributes.get("keywords") or len(inputs) != (2 if target == ADD else 1):
        return _real_max_pool(graph, node) if target == MAX_POOL else _call(graph, node)
    own = [graph.constant(_array(node.tensors[name])) for name in ("weight", "bias") if name in node.tensors]
    operator, attributes = REAL[target](node)
    if target == LINEAR:  # its weight the other way round, and images in any number of dimensions
        own[0] = graph.add("Transpose", [own[0]], f"/{node.name}/weight")
        product = graph.add(operator, [*inputs, own[0]], f"/{node.name}/product" if own[1:] else f"/{node.name}")
        inputs, own, operator = [product], own[1:], "Add"
        if not own:
            return None
    graph.add(operator, [*inputs, *own], f"/{node.name}", **attributes)
    return None


def _real_convolution(node: Node) -> tuple[str, dict[str, Any]]:
    *_, stride, padding, dilation, groups = with_defaults(node, [None, None, None, 1, 0, 1, 1])
    how = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation), "groups": groups}
    return "Conv", _convolution(replace(node, attributes=how))


def _real_max_pool(graph: _Graph, node: Node) -> None:
    _, kernel, stride, padding, dilation, _ = with_defaults(node, [None, None, [], 0, 1, False])
    how = {"kernel": pair(kernel), "stride": pair(stride or kernel), "padding": pair(padding)}
    _max_pool(graph, replace(node, attributes={**how, "dilation": pair(dilation)}))


def _real_adaptive_pool(node: Node) -> tuple[str, dict[str, Any]]:
    if pair(node.attributes["arguments"][1]) != [1, 1]:
        raise _not_written(node)
    return "GlobalAveragePool", {}


def _real_mean(node: Node) -> tuple[str, dict[str, Any]]:
    _, dims, keep = with_defaults(node, [None, None, False])
    return "ReduceMean", {"axes": dims, "keepdims": int(keep)}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


MAX_POOL = "aten.max_pool2d.default"
UNCHANGED = ("aten.dropout.default", "aten.clone.default", "aten.contiguous.default")
RESHAPED = ("aten.flatten.using_ints",)
REAL: Mapping[str, Callable[[Node], tuple[str, dict[str, Any]]]] = {
    CONV: _real_convolution,
    LINEAR: lambda node: ("MatMul", {}),
    ADD: lambda node: ("Add", {}),
    "aten.relu.default": lambda node: ("Relu", {}),
    "aten.adaptive_avg_pool2d.default": _real_adaptive_pool,
    "aten.mean.dim": _real_mean,
}
BUILDERS: Mapping[str, Callable[[_Graph, Node], None]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv": _conv,
    "linear": _linear,
    "add": _together("Add"),
    "multiply": _together("Mul"),
    "concatenate": _together("Concat", lambda node: {"axis": node.attributes["dim"]}),
    "average_pool": _average_pool,
    "max_pool": _max_pool,
    "lookup": _lookup,
    "move": _call,
    "float": _real,
}
