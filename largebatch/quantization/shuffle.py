"""Shuffles of channels, written for maps in channels-last order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from largebatch.quantization.exported import RESHAPE
from largebatch.quantization.network import Network, Node

TRANSPOSE, PERMUTE = "aten.transpose.int", "aten.permute.default"


def shuffled(network: Network) -> Network:
    """Return a list of operators in which every shuffle of channels gives maps in channels-last order.

    A shuffle splits the channels into groups, transposes groups and channels, and joins them. With channels before
    pixels the result would lie in memory as it is counted, and every convolution behind it would first reorder its
    maps; with pixels before channels it is one copy.
    """
    shapes = {node.name: node.attributes["shape"] for node in network}
    consumers = network.consumers()
    earlier = {node.name: node for node in network}
    nodes: dict[str, Node] = {}
    for node in network:
        nodes[node.name] = node
        chain = _shuffle(node, earlier, shapes, consumers)
        if chain is None:
            continue
        split, transposed = chain
        channels, height, width = shapes[node.name]
        pixels = [height, width]
        steps: list[tuple[str, str, list[Any], list[int]]] = [
            (f"{split.name}.last", PERMUTE, [[0, 2, 3, 1]], [*pixels, channels]),
            (split.name, RESHAPE, [[-1, *pixels, *shapes[split.name][:2]]], [*pixels, *shapes[split.name][:2]]),
            (transposed.name, TRANSPOSE, [3, 4], [*pixels, *shapes[transposed.name][:2]]),
            (f"{node.name}.last", RESHAPE, [[-1, *pixels, channels]], [*pixels, channels]),
            (node.name, PERMUTE, [[0, 3, 1, 2]], [channels, *pixels]),
        ]
        for one in (split, transposed, node):
            del nodes[one.name]
        before = split.inputs[0]
        for name, target, arguments, shape in steps:
            nodes[name] = Node(name, "float", (before,), None, _attributes(target, arguments, shape))
            before = name
    return replace(network, nodes=tuple(nodes.values()))


def _attributes(target: str, arguments: list[Any], shape: list[int]) -> dict[str, Any]:
    return {"target": target, "arguments": [{"input": 0}, *arguments], "keywords": {}, "shape": shape}


def _shuffle(
    node: Node,
    earlier: Mapping[str, Node],
    shapes: Mapping[str, list[int] | None],
    consumers: Mapping[str, list[Node]],
) -> tuple[Node, Node] | None:
    """Return what stands before the last reshape of a shuffle: the first reshape and the transposition."""
    transposed = earlier.get(node.inputs[0]) if node.attributes["target"] == RESHAPE and node.inputs else None
    if transposed is None or transposed.attributes["target"] != TRANSPOSE:
        return None
    split = earlier.get(transposed.inputs[0])
    swapped = sorted(transposed.attributes["arguments"][1:])
    if split is None or split.attributes["target"] != RESHAPE or swapped != [1, 2]:
        return None
    whole, parts, joined = (shapes.get(name) for name in (split.inputs[0], split.name, node.name))
    if not (whole and parts and joined) or len(parts) != 4 or whole != joined or whole[1:] != parts[2:]:
        return None
    return (split, transposed) if all(len(consumers[one.name]) == 1 for one in (split, transposed)) else None
