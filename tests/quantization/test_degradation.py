import pytest
import torch
from quantization.networks import photographs, small_resnet

from largebatch.base.errors import UserError
from largebatch.data.source import Batch
from largebatch.quantization.degradation import Answers, answers, compare, within
from largebatch.quantization.layers import decibels, measure_layers, worst_first
from largebatch.quantization.lower import Recipe
from largebatch.quantization.network import IMAGES
from largebatch.quantization.pipeline import quantize


@pytest.fixture(scope="module")
def quantized():
    return quantize(small_resnet(), (3, 16, 16), photographs(32).split(8))


def test_two_networks_on_the_same_images():
    labels = torch.arange(10)
    before, after = labels.clone(), labels.clone()
    before[0] = after[0] = 7  # wrong in the same way
    before[1] = 9  # wrong before alone
    after[2], after[3], after[4] = 9, 9, 9
    found = compare(Answers(before, labels), Answers(after, labels))
    assert (found["error_before"], found["error_after"], found["images"]) == (20, 40, 10)
    assert found["top1_drop"] == pytest.approx(20)
    assert found["agreement"] == pytest.approx(60)
    assert found["p_value"] == pytest.approx(2 * (1 + 4) / 2**4)


def test_images_of_a_run_in_fp64_are_given_in_float32():
    seen = []
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1]))
    found = answers(lambda images: seen.append(images.dtype) or torch.eye(2), [batch])
    assert (seen, found.error) == ([torch.float32], 0)


def test_noise_by_hand():
    signal = torch.tensor([1.0, -1.0, 3.0, -3.0])  # of power 5
    assert decibels(signal, signal + 0.5) == pytest.approx(13.0103)
    assert decibels(signal, signal) == float("inf")


def test_every_layer_adds_little(quantized):
    layers = measure_layers(quantized, photographs(8))
    assert [layer.name for layer in layers][:2] == ["images.quantized", "conv1"]
    assert all(layer.decibels > 30 for layer in layers)
    assert all(layer.clipped == 0 for layer in layers if layer.clipped is not None)
    assert (layers[0].low, layers[0].high) == quantized.ranges[IMAGES]
    worst = worst_first(layers)
    assert worst[0].decibels == min(layer.decibels for layer in worst)
    assert {layer.operator for layer in worst} == {"conv", "linear"}


def test_a_layer_that_loses_much_is_the_worst(quantized):
    wide = dict(quantized.ranges)
    low, high = wide["layer2.0.relu"]
    wide["layer2.0.relu"] = (low, 30 * high)
    spoiled = type(quantized)(**{**vars(quantized), "ranges": wide}).keeping([])
    assert worst_first(measure_layers(spoiled, photographs(8)))[0].name == "layer2.0.conv1"


def test_layers_go_back_into_floats_one_by_one(quantized):
    images, losses = photographs(8), iter([2.0, 1.0, 1.2, 0.2, 0.1])
    found, steps = within(quantized, 0.3, images, lambda network: next(losses))
    assert [step["top1_drop"] for step in steps] == [2.0, 1.0, 1.2, 0.2]
    order = [layer.name for layer in worst_first(measure_layers(quantized, images))]
    assert [step["layer"] for step in steps] == [None, *order[:3]]
    assert {*order[:3]} <= {*found.network.float_operators}
    assert set(found.layers) == set(order[3:])


def test_a_drop_that_no_layer_mends(quantized):
    found, steps = within(quantized, 0.3, photographs(8), lambda network: 5.0)
    assert found.network.integer_operators == []
    assert len(steps) == len(quantized.layers) + 1


def test_calibrations_and_bits(quantized):
    mse = quantize(small_resnet(), (3, 16, 16), photographs(32).split(8), "mse", Recipe(bits=4))
    assert mse.ranges["relu"][1] < quantized.ranges["relu"][1]
    assert max(node.output.high for node in mse.network if node.output) == 15


def test_a_network_that_has_diverged():
    model = small_resnet()
    model.fc.weight[3] = torch.inf
    with pytest.raises(UserError, match=r"1 tensors of this network, fc\.weight first, hold NaN or infinite"):
        quantize(model, (3, 16, 16), photographs(8).split(8))
