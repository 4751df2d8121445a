"""A network in integers on disk: ``network.json``, what it is, and ``network.safetensors``, its numbers.

The same network has the same bytes. ``network.json`` holds

``schema``
    1: the version of this description and of the arithmetic in :mod:`largebatch.quantization.network`.
``tensors_sha256``
    Of ``network.safetensors``.
``source``
    What it was made of: ``weights_sha256`` of the file, ``model`` (its configuration) and ``classes``.
``recipe``
    How: ``calibration``, ``images``, ``granularity``, ``bits``, ``reduced`` (whether weights were kept from overflowing
    16 bits), ``keep`` (layers in floats by choice).
``image``, ``nodes``
    The network, a line a node; tensors are named ``node:tensor`` in ``network.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically
from largebatch.quantization.network import HEAVY, IMAGES, INTEGER, Network, Node, Quantization
from largebatch.quantization.reference import PYTHON, function

SCHEMA = 1
DESCRIPTION, TENSORS = "network.json", "network.safetensors"
# No operator that opens files.
TARGET = re.compile(rf"aten\.(?!from_file\.)[a-z]\w*\.[a-zA-Z]\w*|operator\.({'|'.join(PYTHON)})")


def sha256(path: Path) -> str:
    """Return the hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path, network: Network, source: Mapping[str, Any], recipe: Mapping[str, Any]) -> int:
    """Write a network, and return how many bytes it takes.

    Raises:
        OSError: it cannot be written.
    """
    numbers, text = encode(network, source, recipe)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / TENSORS, numbers)
    write_atomically(directory / DESCRIPTION, text)
    return size(directory)


def encode(network: Network, source: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Return the bytes of ``network.safetensors`` and of ``network.json``."""
    tensors = {
        f"{node.name}:{name}": value.clone().contiguous() for node in network for name, value in node.tensors.items()
    }
    numbers = save(tensors)
    description = {
        "schema": SCHEMA,
        "tensors_sha256": hashlib.sha256(numbers).hexdigest(),
        "source": dict(source),
        "recipe": dict(recipe),
        "image": network.image,
        "nodes": [_described(node) for node in network],
    }
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('{"name":', '\n{"name":')  # a line a node
    return numbers, text.encode()


def size(directory: Path) -> int:
    """Return the bytes of an artifact on disk."""
    return sum((directory / name).stat().st_size for name in (DESCRIPTION, TENSORS))


def _described(node: Node) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": node.name, "operator": node.operator, "inputs": node.inputs}
    if node.attributes:
        facts["attributes"] = dict(node.attributes)
    if node.output is not None:
        facts["output"] = list(asdict(node.output).values())
    return facts


def read(directory: Path, source: Mapping[str, Any]) -> tuple[Network, dict[str, Any]]:
    """Return a network and its recipe.

    Args:
        directory: Where it was written.
        source: What it must have been made of; see :func:`write`.

    Raises:
        UserError: there is none, it is not whole, or of another version, model or weights.
    """
    path = directory / DESCRIPTION
    again = "Make it again with `largebatch quantize`."
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        numbers = (directory / TENSORS).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no integer network: make it first, with `largebatch quantize run=…`."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). {again}") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else None
        raise UserError(f"{path} has schema {found}, and this version of largebatch reads {SCHEMA}. {again}")
    if hashlib.sha256(numbers).hexdigest() != description.get("tensors_sha256"):
        raise UserError(f"{directory / TENSORS} is not what {DESCRIPTION} was written with: it is damaged. {again}")
    made_of = description.get("source")
    for key, value in source.items():
        was = made_of.get(key) if isinstance(made_of, dict) else None
        if was != value:
            what = {"weights_sha256": "weights", "model": "model"}.get(key, key)
            raise UserError(
                f"{directory} was made of another {what} than the run has ({key} {was}, and here {value}). {again}"
            )
    try:
        tensors = load(numbers)
        of_nodes: dict[str, dict[str, Tensor]] = {one["name"]: {} for one in description["nodes"]}
        for name, tensor in tensors.items():
            node, _, kind = name.rpartition(":")
            of_nodes[node][kind] = tensor
        nodes = tuple(_node(one, of_nodes[one["name"]]) for one in description["nodes"])
        channels, height, width = description["image"]
        network = Network(nodes, (channels, height, width))
        _check(network)
        return network, description["recipe"]
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a network ({error!r}). {again}") from None


def _check(network: Network) -> None:
    """Raise :class:`ValueError` or :class:`KeyError` where an engine would read beyond a tensor, or a node before it.

    Engines trust what they are given: a bias that is too short is read beyond its end, and nothing says so.
    """
    read: dict[str, Quantization | None] = {IMAGES: None}
    for node in network:
        given = [read[name] for name in node.inputs]
        if node.operator in (*INTEGER, "dequantize") and (not given or None in given):
            raise ValueError(f"{node.name} does not take integers")
        if node.operator not in (*INTEGER, "quantize", "dequantize", "float") or node.name in read:
            raise ValueError(f"{node.name} is {node.operator}, or there twice")
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in node.tensors.items()}
        if node.operator in HEAVY:
            weight = node.tensors["weight"]
            outputs = (len(weight),)
            wanted = {
                "weight": (torch.int8, tuple(weight.shape)),
                "weight_scale": (torch.float32, outputs),
                "bias": (torch.int32, outputs),
            }
            if shapes != wanted or weight.dim() != {"conv": 4, "linear": 2}[node.operator]:
                raise ValueError(f"{node.name} has tensors of other shapes or types")
        if node.operator == "lookup" and shapes != {"table": (torch.uint8, (256,))}:
            raise ValueError(f"{node.name} has no table of 256 bytes")
        out = node.output
        if out is not None and not (
            0 < out.scale < math.inf and 0 <= out.low <= out.high <= 255 >= out.zero_point >= 0
        ):
            raise ValueError(f"{node.name} has integers that are no bytes")
        read[node.name] = out
    if not network.nodes or network.nodes[-1].output is not None:
        raise ValueError("it does not end in logits")


def _node(one: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Node:
    attributes = one.get("attributes", {})
    target = attributes.get("target")
    if target is not None and not TARGET.fullmatch(target):
        raise ValueError(f"{target} is no operator")
    if target is not None:
        function(target)  # there is one of this name
    return Node(
        name=one["name"],
        operator=one["operator"],
        inputs=tuple(one["inputs"]),
        output=Quantization(*one["output"]) if "output" in one else None,
        attributes=attributes,
        tensors=tensors,
    )
