"""Networks in integers with random weights, small and of every operator, for tests of engines."""

from __future__ import annotations

import torch

from largebatch.quantization.network import IMAGES, Network, Node, Quantization

RECTIFIED = Quantization(0.03125, 0)
SIGNED = Quantization(0.046875, 113)


def heavy(name, inputs, shape, output, *, x_scale=0.03, stride=1, groups=1, seed=0, **more):
    """A convolution, or for a shape of two numbers a matrix product, whose outputs fill the range of ``output``."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
    size = weight[0].numel()
    scale = (torch.rand(shape[0], generator=draw) + 0.5) / (60 * size**0.5)
    bias = torch.randint(-2000, 2001, (shape[0],), generator=draw, dtype=torch.int32)
    tensors = {"weight": weight, "weight_scale": scale, "bias": bias}
    if len(shape) == 2:
        return Node(name, "linear", inputs, output, more, tensors)
    attributes = {"stride": [stride] * 2, "padding": [shape[2] // 2] * 2, "dilation": [1, 1], "groups": groups, **more}
    return Node(name, "conv", inputs, output, attributes, tensors)


def every_operator() -> Network:
    """Every operator of the table, with residuals, groups, strides, a ReLU6 and channels that fill no register."""
    pool = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil": False}
    branch = [0.05, 121, 0, 255]
    capped = Quantization(6 / 255 * 2, 0, 0, 127)
    table = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    nodes = (
        Node("in", "quantize", (IMAGES,), Quantization(0.02, 121)),
        heavy("stem", ("in",), (24, 3, 5, 5), RECTIFIED, stride=2),
        Node("max", "max_pool", ("stem",), RECTIFIED, {**pool, "dilation": [1, 1]}),
        heavy("wide", ("max",), (24, 24, 3, 3), RECTIFIED, seed=1),
        heavy("narrow", ("wide", "max"), (24, 24, 1, 1), SIGNED, seed=2, branch=branch),
        heavy("rectified", ("narrow", "max"), (24, 24, 1, 1), RECTIFIED, seed=3, branch=branch),
        heavy("deep", ("rectified",), (24, 1, 3, 3), capped, groups=24, seed=4),
        Node("any", "lookup", ("deep",), SIGNED, {"function": "aten.hardswish.default"}, {"table": table}),
        Node("sum", "add", ("any", "narrow"), Quantization(0.0625, 100, 100)),
        Node("squeeze", "average_pool", ("sum",), SIGNED, {"kernel": None, "keep": True}),
        heavy("excite", ("squeeze",), (24, 24, 1, 1), Quantization(1 / 255, 0), seed=5),
        Node("scaled", "multiply", ("sum", "excite"), Quantization(0.0625, 60)),
        Node("both", "concatenate", ("scaled", "narrow"), Quantization(0.0625, 90), {"dim": 1}),
        Node("mean", "average_pool", ("both",), SIGNED, {**pool, "include_padding": False}),
        Node("pooled", "average_pool", ("mean",), SIGNED, {"kernel": None, "keep": False}),
        heavy("fc", ("pooled",), (32, 48), Quantization(0.05, 128), seed=6),
        heavy("logits", ("fc",), (10, 32), None, seed=7),
    )
    return Network(nodes, (3, 37, 37))


def images(network: Network, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, *network.image, generator=torch.Generator().manual_seed(1))
