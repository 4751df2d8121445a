import pytest
import torch
from examples import every_operator, images

from largebatch.compress.engines.onnxruntime import OnnxRuntime
from largebatch.compress.engines.x86 import X86
from largebatch.compress.network import Network, Node, Quantization, unfused
from largebatch.compress.reference import Reference

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
