"""A network in integers on disk: ``network.json``, what it is, and ``network.safetensors``, its numbers.

The same network has the same bytes. ``network.json`` holds

``schema``
    1: the version of this description and of the arithmetic in :mod:`largebatch.compress.network`.
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
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from largebatch.compress.network import Network, Node, Quantization
from largebatch.compress.reference import PYTHON
from largebatch.config import UserError
from largebatch.files import write_atomically

SCHEMA = 1
DESCRIPTION, TENSORS = "network.json", "network.safetensors"
TARGET = re.compile(rf"aten\.[a-z]\w*\.[a-zA-Z]\w*|operator\.({'|'.join(PYTHON)})")


def sha256(path: Path) -> str:
    """Return the hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path, network: Network, source: Mapping[str, Any], recipe: Mapping[str, Any]) -> int:
    """Write a network, and return how many bytes it takes.

    Raises:
        OSError: it cannot be written.
    """
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
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / TENSORS, numbers)
    write_atomically(directory / DESCRIPTION, text.encode())
    return size(directory)


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
            f"{directory} holds no network in integers: make it first, with `largebatch quantize run=…`."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). {again}") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else None
        raise UserError(f"{path} has schema {found}, and this version of largebatch reads {SCHEMA}. {again}")
    if hashlib.sha256(numbers).hexdigest() != description["tensors_sha256"]:
        raise UserError(f"{directory / TENSORS} is not what {DESCRIPTION} was written with: it is damaged. {again}")
    for key, value in source.items():
        if description["source"].get(key) != value:
            what = {"weights_sha256": "weights", "model": "model"}.get(key, key)
            raise UserError(
                f"{directory} was made of another {what} than the run has ({key} {description['source'].get(key)}, and "
                f"here {value}). {again}"
            )
    try:
        tensors = load(numbers)
        of_nodes: dict[str, dict[str, Tensor]] = {one["name"]: {} for one in description["nodes"]}
        for name, tensor in tensors.items():
            node, _, kind = name.rpartition(":")
            of_nodes[node][kind] = tensor
        nodes = tuple(_node(one, of_nodes[one["name"]]) for one in description["nodes"])
        return Network(nodes, tuple(description["image"])), description["recipe"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a network ({error!r}). {again}") from None


def _node(one: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Node:
    attributes = one.get("attributes", {})
    target = attributes.get("target")
    if target is not None and not TARGET.fullmatch(target):
        raise ValueError(f"{target} is no operator")
    return Node(
        name=one["name"],
        operator=one["operator"],
        inputs=tuple(one["inputs"]),
        output=Quantization(*one["output"]) if "output" in one else None,
        attributes=attributes,
        tensors=tensors,
    )
