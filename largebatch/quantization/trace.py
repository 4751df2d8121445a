"""From a PyTorch network to a list of float operators, with BatchNorm folded into the convolutions.

The list is a :class:`~largebatch.quantization.network.Network` whose nodes all are ``float``: what is calibrated, what
integers are compared with, and what they are made from. Its nodes have one more attribute, ``shape``: that of the
tensor without the batch, or None where it has none.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.utils.fusion import fuse_conv_bn_weights

from largebatch.base.errors import Fault, UserError
from largebatch.quantization.network import IMAGES, Network, Node, without_unused
from largebatch.quantization.reference import IntegerNetwork, function

CONV, LINEAR, BATCH_NORM = "aten.conv2d.default", "aten.linear.default", "aten.batch_norm.default"
# In evaluation they do nothing.
NOTHING = ("aten.dropout.default", "aten.feature_dropout.default", "aten.detach.default")
CHECKED = 4  # images that the list and the network must agree on
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError)


def trace(model: nn.Module, image: tuple[int, int, int]) -> Network:
    """Return a network's operators in order, in float32.

    Args:
        model: In evaluation mode, in float32, on the CPU: (batch, C, H, W) to (batch, classes).
        image: (C, H, W).

    Raises:
        UserError: its way through its layers depends on its inputs, or it does what has no place in such a list.
        Fault: the list computes something else than the network.
    """
    assert not model.training
    images = torch.randn((CHECKED, *image), generator=torch.Generator().manual_seed(0))
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # what it warns of is in the error too
        program = export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except REFUSALS as error:
        raise UserError(_cannot_export(model, error)) from error
    finally:
        logger.setLevel(level)
    network = _folded(_imported(program, type(model).__name__, image))
    with torch.inference_mode():
        expected, got = model(images), IntegerNetwork(network)(images)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise Fault(
            f"{type(model).__name__} was traced to operators that compute something else (logits differ by "
            f"{float((got - expected).abs().max()):g}): it changes tensors behind their back, or draws random numbers."
        )
    return network


def _cannot_export(model: nn.Module, error: Exception) -> str:
    """Say which line of the network cannot be traced, and what would do."""
    library = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(library)]
    last = frames[-1]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = f" at `{last.line}` ({Path(last.filename).name}, line {last.lineno})" if last.filename != __file__ else ""
    return (
        f"{type(model).__name__} cannot be quantized: its operators cannot be listed once for all images{where}: "
        f"{reason[:300]} What would do: no if, loop or number that depends on the values of a tensor (torch.where "
        "chooses without an if), and no operator outside PyTorch."
    )


def _imported(program: ExportedProgram, model: str, image: tuple[int, int, int]) -> Network:
    """Return the operators of an exported program as they are there."""
    tensors = _tensors(program)
    names: dict[str, str] = {}  # of the program's values: ours
    nodes: dict[str, Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in tensors:
            names[node.name] = IMAGES
        if node.op != "call_function" or "assert" in str(node.target) or "sym_constrain" in str(node.target):
            continue
        target = _target(node, model)
        if target in NOTHING:
            names[node.name] = names[node.args[0].name]
            continue
        found = _Arguments(names, tensors, f"{target} of {model}")
        arguments = [found.encode(one) for one in node.args]
        keywords = {key: found.encode(value) for key, value in node.kwargs.items()}
        name = _unique(found.layer or _place(node, target), {IMAGES, *nodes})
        attributes = {"target": target, "arguments": arguments, "keywords": keywords, "shape": _shape(node)}
        nodes[name] = Node(name, "float", tuple(found.inputs), None, attributes, found.tensors)
        names[node.name] = name
        if _in_place(node):  # what it was done to is from now on what came of it
            before = names[node.args[0].name]
            names |= {key: name for key, value in names.items() if value == before}
    results = [names[node.name] for node in program.graph.output_node().args[0] if node.name in names]
    if len(results) != 1 or results[0] not in nodes:
        raise UserError(f"{model} cannot be quantized: it gives {len(results)} results instead of logits alone.")
    return without_unused(Network(tuple(nodes.values()), image), results[0])


class _Arguments:
    """What an operator is given, in JSON's types, with references to tensors."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, tuple[str, Tensor]], whose: str) -> None:
        self._names, self._known, self._whose = names, tensors, whose
        self.inputs: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.layer: str | None = None  # the module whose weights are taken

    def encode(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._tensor(*self._known[value.name]) if value.name in self._known else self._input(value)
        if isinstance(value, list | tuple):
            return [self.encode(one) for one in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(
            f"{self._whose} cannot be quantized: it is given {value!r}, which has no place in the description of a "
            "network. What would do: float32 on one device throughout."
        )

    def _tensor(self, path: str, value: Tensor) -> dict[str, str]:
        layer, _, kind = path.rpartition(".")
        name = kind if kind and kind not in self.tensors else f"tensor{len(self.tensors)}"
        self.tensors[name] = value.detach()
        self.layer = self.layer or layer or None
        return {"tensor": name}

    def _input(self, value: fx.Node) -> dict[str, int]:
        name = self._names[value.name]
        if name not in self.inputs:
            self.inputs.append(name)
        return {"input": self.inputs.index(name)}


def _tensors(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Return weights, buffers and constants by the name of their placeholder: path and value."""
    values: dict[str, Any] = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    return {spec.arg.name: (spec.target, values[spec.target]) for spec in specs if spec.target is not None}


def _target(node: fx.Node, model: str) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name, _, overload = str(target).removeprefix("aten.").partition(".")
        if name.endswith("_") and hasattr(torch.ops.aten, name[:-1]):
            name = name[:-1]
        return f"aten.{name}.{overload}"
    python = f"operator.{getattr(target, '__name__', target)}"
    with suppress(KeyError):
        function(python)
        return python
    raise UserError(
        f"{model} cannot be quantized: its operator {target} is not one of PyTorch's own (aten). What would do: the "
        "same in functions of torch and torch.nn."
    )


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _place(node: fx.Node, target: str) -> str:
    """Return where in the network an operator without weights is: its module's path and what it does."""
    name = target.split(".")[1]
    # Of what belongs to no module, such as the size of the batch, the key begins with an underscore.
    paths = [path for key, (path, _) in node.meta.get("nn_module_stack", {}).items() if not key.startswith("_")]
    path = paths[-1] if paths else ""
    return path if path.rpartition(".")[2] == name else f"{path}.{name}".lstrip(".")


def _unique(name: str, taken: Collection[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _shape(node: fx.Node) -> list[int] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or not all(isinstance(size, int) for size in value.shape[1:]):
        return None
    return list(value.shape[1:])


def _folded(network: Network) -> Network:
    """Fold every BatchNorm into the convolution that it follows; any other becomes a 1×1 convolution by channel."""
    consumers = network.consumers()
    done: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in network:
        moved = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        done[node.name] = moved
        if not _is_norm(node):
            continue
        before = done.get(moved.inputs[0])
        if before is not None and before.attributes["target"] == CONV and len(consumers[node.inputs[0]]) == 1:
            done[before.name] = _convolution(before.inputs, before, _argument(before, 1), _argument(before, 2), node)
            renamed[node.name] = before.name
            del done[node.name]
        else:
            identity = torch.ones(node.attributes["shape"][0], 1, 1, 1)
            done[node.name] = _convolution(moved.inputs, moved, identity, None, node)
    last = network.nodes[-1].name
    return without_unused(replace(network, nodes=tuple(done.values())), renamed.get(last, last))


def _is_norm(node: Node) -> bool:
    """Whether a node is a BatchNorm of maps that does not look at its batch."""
    attributes = node.attributes
    return attributes["target"] == BATCH_NORM and not attributes["arguments"][5] and len(attributes["shape"] or ()) == 3


def _convolution(inputs: tuple[str, ...], like: Node, weight: Tensor | None, bias: Tensor | None, norm: Node) -> Node:
    """Return a convolution with a BatchNorm folded in; ``like`` is the convolution, or the BatchNorm alone."""
    mean, variance = _argument(norm, 3), _argument(norm, 4)
    assert weight is not None
    assert mean is not None
    assert variance is not None
    eps = norm.attributes["arguments"][7]
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, eps, _argument(norm, 1), _argument(norm, 2))
    tensors = {"weight": fused[0].detach(), "bias": fused[1].detach()}
    how = like.attributes["arguments"][3:] if like is not norm and like.attributes["target"] == CONV else None
    rest = [[1, 1], [0, 0], [1, 1], len(weight)] if how is None else how
    arguments = [{"input": 0}, {"tensor": "weight"}, {"tensor": "bias"}, *rest]
    attributes = {"target": CONV, "arguments": arguments, "keywords": {}, "shape": norm.attributes["shape"]}
    return Node(like.name, "float", inputs, None, attributes, tensors)


def _argument(node: Node, place: int) -> Tensor | None:
    """Return a tensor that a node is given of its own, or None."""
    arguments = node.attributes["arguments"]
    value = arguments[place] if place < len(arguments) else None
    return None if value is None else node.tensors[value["tensor"]]
