"""BatchNorm folded into the products that it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from largebatch.quantization.exported import BATCH_NORM, CAT, CONV, LINEAR, RESHAPE
from largebatch.quantization.network import Network, Node, without_unused

# They may stand between a matrix product and its BatchNorm, where they leave the last dimension as it is.
RESHAPES = ("aten.flatten.using_ints", RESHAPE)


def folded(network: Network) -> Network:
    """Fold every BatchNorm into the product that it follows, or those whose channels are concatenated before it.

    Another one of maps becomes a 1×1 convolution by channel.

    Args:
        network: From :func:`largebatch.quantization.exported.imported`.
    """
    consumers = network.consumers()
    done: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in network:
        moved = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        done[node.name] = moved
        shape = _normalized(node)
        if shape is None:
            continue
        if len(shape) == 3 and (several := _concatenated(done, moved.inputs[0], consumers)) is not None:
            channels = [one.attributes["shape"][0] for one in several]
            for one, part in zip(several, _parts(node, channels), strict=True):
                done[one.name] = _into(one, part)
            renamed[node.name] = moved.inputs[0]
            del done[node.name]
            continue
        product = _product(done, moved.inputs[0], consumers, LINEAR if len(shape) == 1 else CONV)
        if product is not None:
            done[product.name] = _into(product, node)
            renamed[node.name] = moved.inputs[0]
            del done[node.name]
        elif len(shape) == 3:
            done[node.name] = _alone(moved, shape)
    last = network.nodes[-1].name
    return without_unused(replace(network, nodes=tuple(done.values())), renamed.get(last, last))


def _normalized(node: Node) -> list[int] | None:
    """Return the shape of a BatchNorm's output where it doesn't look at its batch; (C, H, W) or (C,)."""
    attributes = node.attributes
    if attributes["target"] != BATCH_NORM or attributes["arguments"][5] or len(node.inputs) != 1:
        return None
    shape: list[int] | None = attributes["shape"]
    return shape if shape is not None and len(shape) in (1, 3) else None


def _product(done: Mapping[str, Node], name: str, consumers: Mapping[str, list[Node]], target: str) -> Node | None:
    """Return the product that makes a tensor that the BatchNorm alone takes; of vectors, behind reshapes too."""
    while (node := done.get(name)) is not None and len(consumers[name]) == 1:
        if node.attributes["target"] == target:
            return node if "weight" in node.tensors else None
        shape = node.attributes["shape"]
        before = done.get(node.inputs[0]) if node.inputs else None
        if target != LINEAR or node.attributes["target"] not in RESHAPES or len(node.inputs) != 1 or before is None:
            return None
        shapes = [shape, before.attributes["shape"]]
        if not all(shapes) or shapes[0][-1] != shapes[1][-1]:
            return None
        name = before.name
    return None


def _concatenated(done: Mapping[str, Node], name: str, consumers: Mapping[str, list[Node]]) -> list[Node] | None:
    """Return the convolutions whose channels a BatchNorm takes one behind the other, where nobody else takes them."""
    both = done.get(name)
    if both is None or both.attributes["target"] != CAT or both.attributes["arguments"][1:] not in ([1], [-3]):
        return None
    found = [_product(done, one, consumers, CONV) for one in both.inputs]
    whole = len(both.inputs) == len(both.attributes["arguments"][0]) and len(consumers[name]) == 1
    return [one for one in found if one is not None] if whole and all(found) else None


def _parts(norm: Node, channels: list[int]) -> list[Node]:
    """Return a BatchNorm of each of several groups of channels."""
    split = {name: torch.split(tensor, channels) for name, tensor in norm.tensors.items()}
    return [
        replace(norm, tensors={name: parts[place] for name, parts in split.items()}) for place in range(len(channels))
    ]


def _into(product: Node, norm: Node) -> Node:
    """Return a product with a BatchNorm folded in."""
    # Of matrix products too: their weight has outputs first, and no dimensions of a kernel.
    weight, bias = fuse_conv_bn_weights(product.tensors["weight"], product.tensors.get("bias"), *_statistics(norm))
    arguments = [{"input": 0}, {"tensor": "weight"}, {"tensor": "bias"}, *product.attributes["arguments"][3:]]
    tensors = {"weight": weight.detach(), "bias": bias.detach()}
    return replace(product, attributes={**product.attributes, "arguments": arguments}, tensors=tensors)


def _alone(norm: Node, shape: list[int]) -> Node:
    mean, variance, eps, scale, shift = _statistics(norm)
    identity = torch.ones(shape[0], 1, 1, 1, dtype=mean.dtype)
    weight, bias = fuse_conv_bn_weights(identity, None, mean, variance, eps, scale, shift)
    arguments = [{"input": 0}, {"tensor": "weight"}, {"tensor": "bias"}, [1, 1], [0, 0], [1, 1], shape[0]]
    attributes = {"target": CONV, "arguments": arguments, "keywords": {}, "shape": shape}
    return replace(norm, attributes=attributes, tensors={"weight": weight.detach(), "bias": bias.detach()})


def _statistics(norm: Node) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
    """Return mean, variance, ε, scale and shift of a BatchNorm."""
    scale, shift, mean, variance = (
        None if one is None else norm.tensors[one["tensor"]] for one in norm.attributes["arguments"][1:5]
    )
    assert mean is not None
    assert variance is not None
    return mean, variance, norm.attributes["arguments"][7], scale, shift
