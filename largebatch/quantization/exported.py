"""From an exported program to a list of float operators, in few forms that all mean the same.

Operators that depend on no image are computed here, once, and become tensors of the nodes that take them: standardized
weights, tables of relative positions, masks. Writes through views are resolved by PyTorch's own functionalization.
Forms that say the same become one: ``split``, ``chunk`` and ``unbind`` become slices, ``stack`` a concatenation, a view
whose first size is the batch's a ``reshape`` to −1, ``padding="same"`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from largebatch.base.errors import UserError
from largebatch.quantization.network import IMAGES, Network, Node, without_unused
from largebatch.quantization.reference import function

CONV, LINEAR, BATCH_NORM = "aten.conv2d.default", "aten.linear.default", "aten.batch_norm.default"
CAT = "aten.cat.default"
RESHAPE, SLICE, SELECT, PAD = (
    "aten.reshape.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.constant_pad_nd.default",
)
GETITEM = "operator.getitem"
# In evaluation they do nothing to values.
NOTHING = (
    *("aten.dropout.default", "aten.feature_dropout.default", "aten.detach.default", "aten.alias.default"),
    *("aten.clone.default", "aten.contiguous.default", "aten.lift_fresh_copy.default"),
)
CONVERSIONS = ("aten.to.", "aten._to_copy.", "aten.type_as.")
NEW = tuple(f"aten.new_{kind}.default" for kind in ("zeros", "ones", "full", "empty"))
VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.unflatten.int", RESHAPE)
PARTS = (
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.split.sizes",
    "aten.chunk.default",
    "aten.unbind.int",
)
# What has a block of operators as an argument, and where.
BLOCKS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# Positions of the tensors of products, which are known by these names.
OWN = {CONV: {1: "weight", 2: "bias"}, LINEAR: {1: "weight", 2: "bias"}}


def imported(program: ExportedProgram, model: str, image: tuple[int, int, int]) -> Network:
    """Return the operators of an exported program.

    Args:
        program: Its input is a batch of images, whose size is not fixed.
        model: The network's name, for messages.
        image: (C, H, W).

    Raises:
        UserError: an operator that has no place in such a list.
    """
    _inline(program, model)
    if _writes_through_views(program):
        program = program.run_decompositions({})
    return _Import(program, model).network(image)


def _inline(program: ExportedProgram, model: str) -> None:
    """Put what stands in a block without gradients or without autocast in the block's place: here they change nothing.

    Raises:
        UserError: autocast is switched on in the network, which then does not compute in float32.
    """
    graph, module = program.graph, program.graph_module
    while blocks := [node for node in graph.nodes if str(node.target) in BLOCKS]:
        for block in blocks:
            before = BLOCKS[str(block.target)]
            if before == 4 and block.args[2]:
                raise UserError(
                    f"{model} cannot be quantized: it switches autocast on for a part of its layers. What would do: "
                    "float32 throughout, with autocast where the network is called."
                )
            body: Any = block.args[before]
            inner: fx.Graph = getattr(module, body.target).graph
            places = [node for node in inner.nodes if node.op == "placeholder"]
            with graph.inserting_before(block):
                results: Any = graph.graph_copy(inner, dict(zip(places, block.args[before + 1 :], strict=True)))
            for taker in list(block.users):
                taker.replace_all_uses_with(results[taker.args[1]])
                graph.erase_node(taker)
            graph.erase_node(block)


def _writes_through_views(program: ExportedProgram) -> bool:
    """Whether a tensor is changed in place that others may share: a view, one with views, or a weight."""
    for node in program.graph.nodes:
        if _in_place(node) and _name(node.target) not in NOTHING:
            base = node.args[0]
            if base.op != "call_function" or _shares(base) or any(_shares(user) for user in base.users):
                return True
    return False


def _shares(node: fx.Node) -> bool:
    """Whether a node may give the very memory, or the very value, that it takes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    kinds = [result.alias_info for result in target._schema.returns]
    views = any(kind is not None and not kind.is_write for kind in kinds)
    return views or _name(target) in NOTHING


def _name(target: torch._ops.OpOverload) -> str:
    """Return the name of an operator, in place or not."""
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    if name.endswith("_") and hasattr(torch.ops.aten, name[:-1]):
        name = name[:-1]
    return f"aten.{name}.{overload}"


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@dataclass(frozen=True)
class _Made:
    """A tensor of the list, as an argument."""

    name: str


class _Import:
    """State of an import: the values of a program so far."""

    def __init__(self, program: ExportedProgram, model: str) -> None:
        self.program, self.model = program, model
        self.names: dict[str, str] = {}  # of the program's values: ours
        self.known: dict[str, Any] = {}  # values that depend on no image
        self.paths: dict[str, str] = {}  # of weights and buffers among them
        self.parts: dict[str, list[Callable[[fx.Node], str]]] = {}  # what makes each result of an operator with several
        self.nodes: dict[str, Node] = {}
        stored: dict[str, Any] = {**program.constants, **program.state_dict}
        for spec in program.graph_signature.input_specs:
            if spec.target is not None:
                self.known[spec.arg.name] = stored[spec.target]
                self.paths[spec.arg.name] = spec.target

    def network(self, image: tuple[int, int, int]) -> Network:
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name not in self.known:
                self.names[node.name] = IMAGES
            elif node.op == "call_function" and not any(
                word in str(node.target) for word in ("assert", "sym_constrain")
            ):
                self._take(node)
        outputs = self.program.graph_signature.output_specs
        changed = [spec.target for spec in outputs if spec.kind == OutputKind.BUFFER_MUTATION]
        if changed:
            raise UserError(
                f"{self.model} cannot be quantized: it changes its buffer {changed[0]} in every pass, and integers "
                "have no such state. What would do: a forward pass that in evaluation mode writes to no buffer."
            )
        given: Any = self.program.graph.output_node().args[0]
        pairs = zip(given, outputs, strict=True)
        results = [getattr(one, "name", "") for one, spec in pairs if spec.kind == OutputKind.USER_OUTPUT]
        if len(results) != 1 or self.names.get(results[0]) not in self.nodes:
            raise UserError(
                f"{self.model} cannot be quantized: it gives {len(results)} results instead of logits alone."
            )
        return without_unused(Network(tuple(self.nodes.values()), image), self.names[results[0]])

    def _take(self, node: fx.Node) -> None:
        """Take over one call."""
        target = self._target(node)
        first: Any = node.args[0] if node.args else None
        needs = node.all_input_nodes
        if all(one.name in self.known for one in needs) and not _draws(node):
            # Also what leaves values alone: a view may need the memory that it made contiguous.
            self.known[node.name] = self._computed(node, node.args)
        elif needs and needs[0] is first and _does_nothing(node, target):
            into: dict[str, Any] = self.known if first.name in self.known else self.names
            into[node.name] = into[first.name]
        elif target in NEW and needs == [first]:  # of the images, it takes the type alone
            alike = torch.empty(0, dtype=first.meta["val"].dtype)
            self.known[node.name] = self._computed(node, (alike, *node.args[1:]))
        elif needs and needs[0].name in self.parts and target == GETITEM:
            self.names[node.name] = self.parts[first.name][node.args[1]](node)  # type: ignore[index]
        elif target in PARTS and self._split(node, target):
            pass
        else:
            self._rewritten(node, target)

    def _rewritten(self, node: fx.Node, target: str) -> None:
        arguments: list[Any] = list(node.args)
        keywords, shape, sizes = dict(node.kwargs), _shape(node), _sizes(node)
        if target in VIEWS and sizes and sum(isinstance(size, torch.SymInt) for size in sizes) <= 1:
            target, keywords = RESHAPE, {}
            arguments = [arguments[0], [-1 if isinstance(size, torch.SymInt) else size for size in sizes]]
        elif target in VIEWS[:2]:
            target = RESHAPE  # of channels last too
        elif target == "aten.stack.default":
            arguments[0] = self._unsqueezed(node)
            target = CAT
        elif target == "aten.pad.default" and arguments[2:3] in ([], ["constant"]):
            target, arguments = PAD, [*arguments[:2], *([arguments[3]] if arguments[3:] and arguments[3] else [])]
        elif target == "aten.conv2d.padding":
            target, arguments = CONV, self._padded(node)
        elif target == "aten._native_batch_norm_legit_no_training.default":
            target, arguments = BATCH_NORM, [*arguments[:5], False, *arguments[5:], False]
            shape = _shape_of(node.meta["val"][0])
            self.parts[node.name] = [lambda taker: self.names[node.name]] * 3
        name = self._add(node, target, arguments, keywords, shape)
        if _in_place(node):  # what it was done to is from now on what came of it
            base: Any = node.args[0]
            before = self.names[base.name]
            self.names |= {key: name for key, value in self.names.items() if value == before}
        self.names[node.name] = name

    def _add(self, node: fx.Node, target: str, arguments: Any, keywords: Mapping[str, Any], shape: Any) -> str:
        """Add a node to the list, and return its name."""
        found = _Arguments(self, target)
        encoded = [found.encode(one, place) for place, one in enumerate(arguments)]
        named = {key: found.encode(value) for key, value in keywords.items()}
        layer = found.layer or (_module(node) if target in OWN else None)
        name = _unique(layer or _place(node, target), {IMAGES, *self.nodes})
        attributes = {"target": target, "arguments": encoded, "keywords": named, "shape": shape}
        self.nodes[name] = Node(name, "float", tuple(found.inputs), None, attributes, found.tensors)
        return name

    def _computed(self, node: fx.Node, given: tuple[Any, ...]) -> Any:
        """Return the value of a call that depends on no image."""
        arguments, keywords = fx.map_arg((given, node.kwargs), lambda one: self.known[one.name])
        assert callable(node.target)
        with torch.no_grad():
            return node.target(*arguments, **keywords)

    def _split(self, node: fx.Node, target: str) -> bool:
        """Prepare each part of a tensor as a slice, which only those parts become that are taken."""
        unbound = target == "aten.unbind.int"
        whole, *rest = _bound(node, {"dim": 0} if unbound else {"split_size": 1, "dim": 0})
        parts, dim = node.meta["val"], rest[-1] % whole.meta["val"].dim()
        sizes = [1 if unbound else part.shape[dim] for part in parts]
        if dim == 0 or not all(isinstance(size, int) for size in sizes):
            return False

        def make(number: int) -> Callable[[fx.Node], str]:
            start = sum(sizes[:number])
            how = (SELECT, [whole, dim, start]) if unbound else (SLICE, [whole, dim, start, start + sizes[number]])
            return lambda taker: self._add(taker, *how, {}, _shape(taker))

        self.parts[node.name] = [make(number) for number in range(len(parts))]
        return True

    def _unsqueezed(self, node: fx.Node) -> list[_Made]:
        """Return the tensors of a stack, each with the dimension along which they are concatenated."""
        several, dim = _bound(node, {"dim": 0})
        shape = _shape(node)
        dim %= len(_sizes(node))
        alone = None if shape is None or dim == 0 else [*shape[: dim - 1], 1, *shape[dim:]]
        return [_Made(self._add(node, "aten.unsqueeze.default", [one, dim], {}, alone)) for one in several]

    def _padded(self, node: fx.Node) -> list[Any]:
        """Return the arguments of a convolution whose padding is "same" or "valid", with numbers in its place."""
        defaults = {"weight": None, "bias": None, "stride": [1, 1], "padding": "", "dilation": [1, 1], "groups": 1}
        x, weight, bias, stride, how, dilation, groups = _bound(node, defaults)
        sizes = zip(dilation, weight.meta["val"].shape[2:], strict=True)
        total = [0 if how == "valid" else step * (size - 1) for step, size in sizes]
        bottom, right = (size % 2 for size in total)
        if bottom or right:  # an odd row or column lies at the end
            channels, height, width = x.meta["val"].shape[1:]
            shape = [channels, height + bottom, width + right]
            x = _Made(self._add(node, PAD, [x, [0, right, 0, bottom]], {}, shape))
        return [x, weight, bias, stride, [size // 2 for size in total], dilation, groups]

    def _target(self, node: fx.Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            return _name(target)
        python = f"operator.{getattr(target, '__name__', target)}"
        with suppress(KeyError):
            function(python)
            return python
        raise UserError(
            f"{self.model} cannot be quantized: its operator {target} is not one of PyTorch's own (aten). What would "
            "do: the same in functions of torch and torch.nn."
        )


class _Arguments:
    """Arguments of an operator, in JSON's types, with references to tensors."""

    def __init__(self, known: _Import, target: str) -> None:
        self._import, self._target = known, target
        self.inputs: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.layer: str | None = None  # the module whose weights are taken

    def encode(self, value: Any, place: int | None = None) -> Any:
        if isinstance(value, _Made):
            return self._input(value.name)
        if isinstance(value, fx.Node):
            if value.name not in self._import.known:
                return self._input(self._import.names[value.name])
            path = self._import.paths.get(value.name, "")
            return self._constant(self._import.known[value.name], path, place)
        return self._constant(value, "", None)

    def _constant(self, value: Any, path: str, place: int | None) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(path, value, OWN.get(self._target, {}).get(-1 if place is None else place))
        if isinstance(value, list | tuple):
            return [self.encode(one) for one in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": self._input(IMAGES)["input"]}
        if isinstance(value, torch.layout | torch.memory_format):
            return None  # a matter of memory alone
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(
            f"{self._target} of {self._import.model} cannot be quantized: it is given {value!r}, which a "
            "description of a network can't hold. Allowed are numbers and tensors."
        )

    def _tensor(self, path: str, value: Tensor, known_as: str | None) -> dict[str, str]:
        layer, _, kind = path.rpartition(".")
        kind = known_as or kind
        name = kind if kind and kind not in self.tensors else f"tensor{len(self.tensors)}"
        self.tensors[name] = value.detach()
        self.layer = self.layer or layer or None
        return {"tensor": name}

    def _input(self, name: str) -> dict[str, int]:
        if name not in self.inputs:
            self.inputs.append(name)
        return {"input": self.inputs.index(name)}


def _bound(node: fx.Node, defaults: Mapping[str, Any]) -> list[Any]:
    """Return the first argument of a call, and the others in order, with their defaults."""
    given = {**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
    return [node.args[0], *(given[name] for name in defaults)]


def _draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _does_nothing(node: fx.Node, target: str) -> bool:
    """Whether a call gives the values that it takes."""
    first: Any = node.args[0]
    if target == "aten.pad.default":
        sizes: Any = node.args[1]
        return not any(sizes)
    if target.startswith(CONVERSIONS):
        return bool(first.meta["val"].dtype == node.meta["val"].dtype)
    return target in NOTHING


def _module(node: fx.Node) -> str | None:
    """Return the path of the module that makes a call."""
    # Of what belongs to no module, such as the size of the batch, the key begins with an underscore.
    paths = [path for key, (path, _) in node.meta.get("nn_module_stack", {}).items() if not key.startswith("_")]
    return paths[-1] if paths else None


def _place(node: fx.Node, target: str) -> str:
    """Return where in the network an operator without weights is: its module's path and what it does."""
    name, path = target.split(".")[1], _module(node) or ""
    return path if path.rpartition(".")[2] == name else f"{path}.{name}".lstrip(".")


def _unique(name: str, taken: Collection[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _sizes(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def _shape(node: fx.Node) -> list[int] | None:
    return _shape_of(node.meta.get("val"))


def _shape_of(value: Any) -> list[int] | None:
    if not isinstance(value, Tensor) or not value.dim() or not all(isinstance(size, int) for size in value.shape[1:]):
        return None
    return list(value.shape[1:])


def pair(value: Any) -> list[int]:
    """Return (height, width) of what PyTorch takes one or two numbers for."""
    several = value if isinstance(value, list | tuple) else [value]
    return [several[0], several[-1]]
