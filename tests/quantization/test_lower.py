import dataclasses

import pytest
import torch
import torch.nn.functional as F
from quantization.networks import mixed, photographs, settled, small_resnet
from torch import nn

from largebatch.base.errors import UserError
from largebatch.quantization.engines import x86
from largebatch.quantization.lower import Recipe, lower, needed
from largebatch.quantization.network import Network, Node, Quantization
from largebatch.quantization.pipeline import quantize
from largebatch.quantization.reference import IntegerNetwork
from largebatch.quantization.trace import trace


def ranges_of(network, images):
    found = {}
    IntegerNetwork(network)(images, watch=lambda name, x: found.update({name: (float(x.min()), float(x.max()))}))
    return found


def decibels(signal, other):
    return float(10 * torch.log10(signal.var() / (signal - other).var()))


@pytest.fixture(scope="module")
def traced():
    """Two networks in floats, with the ranges of their tensors and logits."""
    found = {}
    for make in (small_resnet, mixed):
        network, images = trace(make(), (3, 16, 16)), photographs(16)
        found[make.__name__] = (network, ranges_of(network, images), images, IntegerNetwork(network)(images))
    return found


@pytest.mark.parametrize(("name", "least"), [("small_resnet", 30), ("mixed", 25)])
def test_integers_compute_nearly_what_floats_do(traced, name, least):
    network, ranges, images, logits = traced[name]
    whole = IntegerNetwork(lower(network, ranges, Recipe()).network)(images)
    assert decibels(logits, whole) > least
    fewer = IntegerNetwork(lower(network, ranges, Recipe(bits=5)).network)(images)
    assert decibels(logits, fewer) < decibels(logits, whole) - 10  # 6 dB a bit


def test_a_residual_network_is_in_integers_throughout(traced):
    network, ranges, _, _ = traced["small_resnet"]
    lowered = lower(network, ranges, Recipe()).network
    assert lowered.float_operators == []
    assert [node.operator for node in lowered if node.operator != "conv"] == [
        *("quantize", "average_pool", "move", "linear")
    ]
    nodes = {node.name: node for node in lowered}
    # The later one of two convolutions that are added takes the other's result.
    assert nodes["layer2.0.downsample.0"].inputs == ("layer1.0.conv2", "layer2.0.conv2")
    assert nodes["layer1.0.conv2"].inputs == ("layer1.0.conv1", "conv1")
    assert nodes["layer1.0.conv2"].attributes["branch"][1] > 0  # before the ReLU: of both signs
    assert nodes["fc"].output is None


def test_what_has_no_integers_is_named_and_nothing_is_rounded_for_it(traced):
    network, ranges, _, _ = traced["mixed"]
    lowered = lower(network, ranges, Recipe())
    assert lowered.network.float_operators == ["norm"]
    operators = [node.operator for node in lowered.network]
    assert operators.count("conv") == 5  # the BatchNorm alone is one
    assert {"lookup", "multiply", "concatenate", "max_pool", "average_pool", "add"} <= {*operators}
    assert lowered.stands_for["left"] == "relu6" or lowered.stands_for["left"].startswith(("relu", "hardtanh"))


def test_layers_are_kept_in_floats(traced):
    network, ranges, images, logits = traced["small_resnet"]
    lowered = lower(network, ranges, Recipe(keep={"layer1.0.conv2"})).network
    assert lowered.float_operators == ["layer1.0.conv2", "layer1.0.add", "layer1.0.relu_2"]
    everything = lower(network, ranges, Recipe(keep={node.name for node in network})).network
    assert IntegerNetwork(everything)(images).equal(logits)
    assert everything.integer_operators == []


def test_only_ranges_that_are_needed_are_asked_for(traced):
    network, ranges, _, _ = traced["small_resnet"]
    names = needed(network, Recipe())
    assert "conv1" not in names  # its ReLU's is enough
    assert "layer1.0.conv2" in names  # for engines that cannot fuse
    lower(network, {name: ranges[name] for name in names}, Recipe())
    for layer in (node.name for node in network if node.tensors):  # enough whichever is kept in floats
        lower(network, {name: ranges[name] for name in names}, Recipe(keep={layer}))
    with pytest.raises(KeyError):
        lower(network, {name: ranges[name] for name in names[1:]}, Recipe())


def one_layer(weight, bias):
    arguments = [{"input": 0}, {"tensor": "weight"}, {"tensor": "bias"}]
    attributes = {"target": "aten.linear.default", "arguments": arguments, "keywords": {}, "shape": [len(weight)]}
    node = Node("fc", "float", ("images",), None, attributes, {"weight": weight, "bias": bias})
    return Network((node,), (weight.shape[1], 1, 1))


def tensors_of(network, **recipe):
    return lower(network, {"images": (-1.0, 1.0), "fc": (-1.0, 1.0)}, Recipe(**recipe)).network.nodes[1].tensors


def test_integer_weights_by_hand():
    layer = one_layer(torch.tensor([[1.27, -0.1], [0.5, 0.254]]), torch.tensor([0.3, -0.2]))
    found = tensors_of(layer)
    assert found["weight"].tolist() == [[127, -10], [127, 65]]  # 0.254 / 0.5 · 127 = 64.5, a bit above in float32
    torch.testing.assert_close(found["weight_scale"], torch.tensor([0.01, 0.5 / 127]))
    assert found["bias"].tolist() == [round(0.3 * 127.5 / 0.01), round(-0.2 * 127.5 * 127 / 0.5)]  # s_x = 2 / 255
    assert tensors_of(layer, per_channel=False)["weight"].tolist() == [[127, -10], [50, 25]]
    assert tensors_of(layer, bits=4)["weight"].abs().max() == 7
    # 127 + 65 is more than the 128 that a pair may have: 0.5 + 0.254 becomes 127, and other channels stay.
    assert tensors_of(layer, safe=True)["weight"].tolist() == [[127, -10], [84, 43]]


def test_dead_channels_keep_their_bias():
    layer = one_layer(torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1.0, 1.0]]), torch.tensor([0.75, -0.75, 0.0]))
    lowered = lower(layer, {"images": (-1.0, 1.0), "fc": (-1.0, 1.0)}, Recipe()).network
    logits = IntegerNetwork(lowered)(torch.zeros(1, 2))
    torch.testing.assert_close(logits, torch.tensor([[0.75, -0.75, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("inputs", "in_floats"), [(140_000, ["fc"]), (60_000, [])])
def test_sums_that_could_overflow_stay_in_floats(inputs, in_floats):
    layer = one_layer(torch.ones(1, inputs), torch.zeros(1))
    assert lower(layer, {"images": (0.0, 1.0), "fc": (0.0, 1.0)}, Recipe()).network.float_operators == in_floats


def test_bits_out_of_reach(traced):
    network, ranges, _, _ = traced["small_resnet"]
    with pytest.raises(UserError, match="bits=9"):
        lower(network, ranges, Recipe(bits=9))


def test_a_relu_is_a_bound(traced):
    network, ranges, _, _ = traced["small_resnet"]
    wider = {**ranges, "relu": (-1.0, 3.0)}  # no ReLU gives that: its zero point is not 0, and its bound is
    node = lower(network, wider, Recipe()).network.nodes[1]
    assert node.output == dataclasses.replace(Quantization(node.output.scale, 64), low=64)


class Shuffling(nn.Module):
    """Parts of channels that are convolved, concatenated, normalized and shuffled, as in ShuffleNet and Res2Net."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(10), nn.Linear(10, 5)

    def forward(self, x):
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = F.silu(self.norm(torch.cat([self.left(left), self.right(right)], 1)))
        x = x.view(-1, 2, 5, *x.shape[2:]).transpose(1, 2).contiguous().view(-1, 10, *x.shape[2:])
        first, *rest = x.split([2, 4, 4], 1)
        x = torch.cat([*rest, first], 1)
        x = torch.stack([x, x + 1], 1).view(x.size(0), 20, -1)
        return self.last(x.view(x.size(0), 2, 10, -1).permute(0, 2, 1, 3).mean((2, 3)))


@pytest.fixture(scope="module")
def shuffling():
    torch.manual_seed(0)
    model = settled(Shuffling())
    return model, quantize(model, (3, 16, 16), [photographs(16)])


def test_parts_and_shuffles_stay_in_integers(shuffling):
    model, made = shuffling
    assert made.network.float_operators == []
    assert [node.operator for node in made.network].count("quantize") == 1
    assert decibels(model(photographs(8)), IntegerNetwork(made.network)(photographs(8))) > 30
    # The BatchNorm behind the first concatenation is in the convolutions before it.
    assert [node.name for node in made.network if node.operator == "conv"] == ["stem", "left", "right"]


def test_what_is_only_concatenated_takes_the_range_of_the_concatenation(shuffling):
    _, made = shuffling
    outputs = made.network.outputs()
    both = next(node for node in made.network if node.operator == "concatenate")
    assert both.inputs == ("left", "right")
    assert outputs["left"] == outputs["right"] == outputs[both.name]
    low, high = made.ranges[both.name]
    assert outputs["left"].scale == pytest.approx((high - low) / 255, rel=1e-6)


def test_every_engine_of_the_processor_shuffles_alike(shuffling):
    _, made = shuffling
    images = photographs(8)
    expected = IntegerNetwork(made.network)(images)
    got = x86.load_unchecked(made.network)(images)
    assert decibels(expected, got) > 40
