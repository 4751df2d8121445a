import dataclasses

import pytest
import torch
import torch.nn.functional as F
from quantization.examples import RECTIFIED, SIGNED, every_operator, heavy, images

from largebatch.quantization.network import IMAGES, Network, Node, Quantization, unfused
from largebatch.quantization.reference import IntegerNetwork, Reference, Step

SHAPES = [((8, 4, 3, 3), 2, 1), ((6, 1, 3, 3), 1, 6), ((5, 12, 1, 1), 1, 1)]


def integers(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("shape", "stride", "groups"), SHAPES)
def test_sums_of_products_are_those_of_integers(shape, stride, groups):
    node = heavy("x", ("in",), shape, SIGNED, stride=stride, groups=groups)
    x = integers(2, shape[1] * groups, 9, 9)
    weight, bias = node.tensors["weight"].long(), node.tensors["bias"].long()
    expected = F.conv2d(x.long() - 113, weight, bias, stride, shape[2] // 2, groups=groups)
    assert Step(node, [SIGNED]).accumulators(x).long().equal(expected)


def test_sums_that_float32_cannot_hold_are_exact():
    node = heavy("x", ("in",), (2, 4096), None)
    extreme = dataclasses.replace(node, tensors={**node.tensors, "weight": torch.full((2, 4096), -127).to(torch.int8)})
    x = integers(3, 4096)
    x[:, 0] |= 1  # an odd sum above 2^24
    expected = x.long() @ extreme.tensors["weight"].long().T + node.tensors["bias"]
    step = Step(extreme, [Quantization(1.0, 0)])
    assert expected.abs().min() > 2**24
    assert step.accumulators(x).long().equal(expected)


def one_step(operator, given, output, *inputs, **attributes):
    return Step(Node("y", operator, tuple("abc"[: len(inputs)]), output, attributes), given)(*inputs)


def test_requantization_by_hand():
    # One weight of 1 and a scale of 1/2: acc · m ends in halves, which go to the even side; then z = 3 is added.
    tensors = {"weight": torch.ones(1, 1, dtype=torch.int8), "weight_scale": torch.tensor([0.5])}
    tensors["bias"] = torch.zeros(1, dtype=torch.int32)
    output = Quantization(1.0, 3, 1, 9)
    step = Step(Node("y", "linear", ("x",), output, {}, tensors), [Quantization(1.0, 10)])
    x = torch.tensor([[10], [11], [12], [13], [9], [0], [255]], dtype=torch.uint8)
    assert step(x).flatten().tolist() == [3, 3, 4, 5, 3, 1, 9]
    floats = Step(Node("y", "linear", ("x",), None, {}, tensors), [Quantization(0.25, 10)])
    assert floats(x).flatten().tolist()[:4] == [0, 0.125, 0.25, 0.375]


def test_a_residual_is_added_before_the_one_rounding():
    tensors = {"weight": torch.ones(1, 1, dtype=torch.int8), "weight_scale": torch.tensor([0.5])}
    tensors["bias"] = torch.zeros(1, dtype=torch.int32)
    node = Node("y", "linear", ("x", "r"), Quantization(1.0, 0), {}, tensors)
    step = Step(node, [Quantization(1.0, 0), Quantization(0.25, 4)])
    x, r = torch.tensor([[1], [5]], dtype=torch.uint8), torch.tensor([[6], [7]], dtype=torch.uint8)
    assert step(x, r).flatten().tolist() == [1, 3]  # 0.5 + 0.5; 2.5 + 0.75


def test_the_small_operators_by_hand():
    x, r = torch.tensor([[10, 20, 30]]).byte(), torch.tensor([[4, 0, 8]]).byte()
    unit, half = Quantization(1.0, 10), Quantization(0.5, 4)
    assert one_step("add", [unit, half], Quantization(2.0, 5), x, r).tolist() == [[5, 9, 16]]
    assert one_step("multiply", [unit, half], Quantization(1.0, 50, 50), x, r).tolist() == [[50, 50, 90]]
    joined = one_step("concatenate", [unit, half], Quantization(1.0, 0), x, r, dim=1)
    assert joined.tolist() == [[0, 10, 20, 0, 0, 2]]
    assert one_step("dequantize", [half], None, r).tolist() == [[0.0, -2.0, 2.0]]
    squares = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    mean = one_step("average_pool", [unit], Quantization(0.5, 100), squares, kernel=None, keep=False)
    assert mean.tolist() == [[95]]  # (7.5 - 10) / 0.5
    windows = {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 1], "ceil": False}
    pooled = one_step("average_pool", [unit], unit, squares, **windows, include_padding=False)
    assert pooled[0, 0].tolist() == [[0, 2, 3], [6, 8, 9], [12, 14, 15]]  # 1.5 and 13.5 are ties, taken from z: -8.5
    largest = one_step("max_pool", [unit], unit, squares, **windows, dilation=[1, 1])
    assert largest[0, 0].tolist() == [[0, 2, 3], [8, 10, 11], [12, 14, 15]]


def test_a_sum_apart_is_one_rounding_more():
    fused = every_operator()
    apart = unfused(fused)
    assert len(apart.nodes) == len(fused.nodes) + 2
    assert all(len(node.inputs) == 1 for node in apart if node.operator in ("conv", "linear"))
    seen = [{}, {}]
    for network, values in zip((fused, apart), seen, strict=True):
        IntegerNetwork(network)(images(fused), watch=values.__setitem__)
    # The sum itself: the branch's rounding is half of its unit, 0.05, and the sum's unit is 0.047.
    difference = seen[0]["narrow"].int() - seen[1]["narrow"].int()
    assert 1 <= difference.abs().max() <= 2
    assert seen[0]["wide"].equal(seen[1]["wide"])


def test_the_engine_runs_where_pytorch_does():
    network = Network((heavy("logits", ("in",), (3, 4), None),), (4, 1, 1))
    quantized = Node("in", "quantize", ("flat",), RECTIFIED)
    flat = {"target": "aten.flatten.using_ints", "arguments": [{"input": 0}, 1]}
    nodes = (Node("flat", "float", (IMAGES,), None, flat), quantized, *network.nodes)
    logits = Reference().load(Network(nodes, network.image))(torch.rand(2, 4, 1, 1))
    assert (logits.shape, logits.dtype, Reference().available()) == ((2, 3), torch.float32, None)
