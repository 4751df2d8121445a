from dataclasses import replace

import pytest
from examples import every_operator, images

from largebatch.base.errors import Fault
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.engines.x86 import X86
from largebatch.quantization.network import IMAGES, Network, Node
from largebatch.quantization.proof import prove
from largebatch.quantization.reference import Reference


@pytest.mark.parametrize("engine", [X86(), OnnxRuntime()], ids=lambda engine: engine.name)
def test_all_convolutions_and_products_run_in_integers(engine):
    network = every_operator()
    proof = prove(engine, network, images(network))
    assert (proof.integer, proof.floating) == (8, 0)
    assert sum(proof.operators.values()) == 8


def test_a_convolution_in_floats_by_choice_is_counted():
    network = every_operator()
    kernel = next(node for node in network if node.name == "stem").tensors["weight"].float()
    words = [{"input": 0}, {"tensor": "weight"}, None, [2, 2], [2, 2], [1, 1], 1]
    kept = Node(
        "kept", "float", (IMAGES,), None, {"target": "aten.conv2d.default", "arguments": words}, {"weight": kernel}
    )
    stem = Node("stem", "quantize", ("kept",), replace(network.nodes[1].output, scale=200.0))
    mixed = Network((kept, stem, *network.nodes[2:]), network.image)
    proof = prove(X86(), mixed, images(mixed))
    assert (proof.integer, proof.floating) == (7, 1)


def test_a_simulation_is_no_proof():
    network = every_operator()
    with pytest.raises(Fault, match="engine=reference ran 0 of 8 convolutions and matrix products in integers"):
        prove(Reference(), network, images(network))
