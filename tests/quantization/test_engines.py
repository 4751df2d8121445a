from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from examples import SIGNED, every_operator, heavy, images
from torch import nn

from largebatch.base.errors import UserError
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.engines.x86 import X86
from largebatch.quantization.network import IMAGES, Network, Node, Quantization, unfused
from largebatch.quantization.pipeline import quantize
from largebatch.quantization.proof import prove
from largebatch.quantization.reference import Reference

ENGINES = {"x86": (X86(), lambda network: network), "onnxruntime": (OnnxRuntime(), unfused)}


def integers(network: Network, name: str) -> Network:
    """Cut a network behind a node, and give its integers as float32 (batch, values)."""
    names = [node.name for node in network]
    nodes = network.nodes[: names.index(name) + 1]
    flat = {"target": "aten.flatten.using_ints", "arguments": [{"input": 0}, 1]}
    whole = Quantization(1.0, 0)
    return Network(
        (*nodes, Node("flat", "move", (name,), whole, flat), Node("end", "dequantize", ("flat",))), (3, 37, 37)
    )


@pytest.mark.parametrize("name", ENGINES)
def test_every_node_is_the_reference_s_up_to_one_unit(name):
    engine, as_computed = ENGINES[name]
    network = every_operator()
    given = images(network)
    for node in network.nodes[:-1]:
        cut = integers(network, node.name)
        expected = Reference().load(as_computed(cut))(given)
        assert expected.std() > 10  # the integers are spread over their range
        difference = (engine.load(cut)(given) - expected).abs()
        assert difference.max() <= 1, node.name
        assert difference.mean() < 1e-3, node.name  # ties alone


@pytest.mark.parametrize("name", ENGINES)
def test_logits_are_the_reference_s(name):
    engine, as_computed = ENGINES[name]
    network = every_operator()
    expected = Reference().load(as_computed(network))(images(network))
    torch.testing.assert_close(engine.load(network)(images(network)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", [Reference(), X86(), OnnxRuntime()], ids=lambda engine: engine.name)
def test_images_may_be_on_another_device(engine):
    network = every_operator()
    there = SimpleNamespace(cpu=lambda: images(network))  # all that can be done with them is to bring them here
    program = engine.load(network)
    assert torch.equal(program(there), program(images(network)))


def test_layers_in_floats_are_float32_also_where_training_was_in_bf16():
    network = every_operator()
    stem = network.nodes[1]
    words = [{"input": 0}, {"tensor": "weight"}, None, [2, 2], [2, 2]]
    attributes, weight = {"target": "aten.conv2d.default", "arguments": words}, stem.tensors["weight"] * 0.01
    kept = Node("kept", "float", (IMAGES,), None, attributes, {"weight": weight})
    again = Node("stem", "quantize", ("kept",), Quantization(0.1, 0))
    program = X86().load(Network((kept, again, *network.nodes[2:]), network.image))
    expected = program(images(network))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(program(images(network)), expected)


def test_what_has_no_counterpart_in_onnx_is_named():
    network = every_operator()
    moved = {"target": "aten.pixel_shuffle.default", "arguments": [{"input": 0}, 1]}
    first = network.nodes[0]
    odd = Network((first, Node("shuffled", "move", ("in",), first.output, moved)), network.image)
    with pytest.raises(UserError, match=r"shuffled is aten\.pixel_shuffle\.default, which is not written to ONNX"):
        OnnxRuntime().load(odd)


class Residual(nn.Module):
    """What networks of convolutions are made of, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.middle, self.last = nn.Linear(8, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, padding=1)
        x = F.relu(x + self.deep(x))
        logits: torch.Tensor = self.last(self.middle(x.mean((2, 3))))
        return logits


@pytest.mark.parametrize("kept", [["stem"], ["deep"], ["last"], ["deep", "last"], ["stem", "deep", "middle", "last"]])
def test_layers_that_are_kept_in_floats_are_written_to_onnx(kept):
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16)
    network = quantize(Residual().eval(), (3, 16, 16), [images]).keeping(kept).network
    assert {*kept} <= {*network.float_operators}
    expected, found = Reference().load(network)(images), OnnxRuntime().load(network)(images)
    assert (found - expected).abs().max() < 0.03 * expected.std()
    assert prove(OnnxRuntime(), network, images).floating == len(kept)


def test_sums_that_are_wanted_in_floats_are_sums_of_integers():
    """As those before a layer that is kept in floats: no rounding is between them."""
    words = {"arguments": [{"input": 0}, [2, 3]]}
    network = Network(
        (
            Node("in", "quantize", (IMAGES,), Quantization(0.02, 121)),
            heavy("conv", ("in",), (8, 3, 3, 3), None, stride=2),
            Node("logits", "float", ("conv",), None, {"target": "aten.mean.dim", **words}),
        ),
        (3, 9, 9),
    )
    expected = Reference().load(network)(images(network))
    torch.testing.assert_close(OnnxRuntime().load(network)(images(network)), expected, rtol=1e-5, atol=1e-6)
    assert prove(OnnxRuntime(), network, images(network)).operators == {"ConvInteger": 1}


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("largebatch.quantization.engines.onnxruntime.PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package: .*pip install .*no_such_package$"):
        OnnxRuntime().load(every_operator())


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("platform.machine", "aarch64", "this is aarch64"),
        ("torch.backends.cpu.get_cpu_capability", "DEFAULT", "needs a processor with AVX2"),
    ],
)
def test_processors_without_the_kernels_are_sent_elsewhere(monkeypatch, where, value, words):
    assert X86().available() is None
    monkeypatch.setattr(where, lambda: value)
    assert words in X86().available()


def test_a_residual_that_is_read_again_is_not_written_over():
    residual, pool = {"branch": [0.05, 121, 0, 255]}, {"kernel": None, "keep": False}
    nodes = (
        Node("in", "quantize", (IMAGES,), Quantization(0.02, 121)),
        heavy("one", ("in",), (8, 3, 3, 3), SIGNED),
        heavy("two", ("one", "one"), (8, 8, 1, 1), SIGNED, seed=1, **residual),
        heavy("three", ("two", "one"), (8, 8, 1, 1), SIGNED, seed=2, **residual),
        Node("view", "move", ("three",), SIGNED, {"target": "aten.slice.Tensor", "arguments": [{"input": 0}, 1, 0, 8]}),
        heavy("four", ("two", "three"), (8, 8, 1, 1), SIGNED, seed=3, **residual),
        Node("pooled", "average_pool", ("four",), SIGNED, pool),
        Node("viewed", "average_pool", ("view",), SIGNED, pool),
        Node("both", "concatenate", ("viewed", "pooled"), SIGNED, {"dim": 1}),
        Node("real", "dequantize", ("both",)),
    )
    network = Network(nodes, (3, 9, 9))
    expected = Reference().load(network)(images(network))
    assert torch.equal(X86().load(network)(images(network)), expected)
