"""The GPU's kernel, run by Triton's interpreter where there is no GPU: the same arithmetic, tile by tile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import RECTIFIED, SIGNED, every_operator, heavy, images

from largebatch.quantization.engines.cuda import Cuda, in_floats
from largebatch.quantization.network import IMAGES, Network, Node, Quantization
from largebatch.quantization.proof import prove
from largebatch.quantization.reference import Reference

pytest.importorskip("triton", reason="Triton is made for Linux")
from interpreted import MARKS

pytestmark = MARKS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_logits_are_the_reference_s():
    network = every_operator()
    expected = Reference().load(network)(images(network))
    got = Cuda().load(network, DEVICE)(images(network)).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert in_floats(network) == ["deep"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "more"),
    [
        (64, 64, 1, {}),  # whole tiles alone
        (130, 70, 1, {"stride": 2}),  # a bit more than two tiles of inputs and one of outputs
        (5, 3, 3, {"dilation": [2, 2], "padding": [2, 1]}),
    ],
)
def test_tiles_that_are_not_full_add_nothing(inputs, outputs, kernel, more):
    nodes = (
        Node("in", "quantize", (IMAGES,), Quantization(0.02, 77)),
        heavy("conv", ("in",), (outputs, inputs, kernel, kernel), SIGNED, **more),
        heavy("one", ("conv",), (outputs, outputs, 1, 1), RECTIFIED),
        Node("real", "dequantize", ("one",)),
    )
    network = Network(nodes, (inputs, 13, 11))
    expected = Reference().load(network)(images(network))
    assert expected.std() > 0.1
    assert torch.equal(Cuda().load(network, DEVICE)(images(network)).cpu(), expected)


def test_long_sums_of_few_groups_are_exact_too():
    """Sums beyond 2^24, and odd, which float32 cannot tell apart."""
    convolution = heavy("conv", ("in",), (4, 1024, 3, 3), None, groups=2)
    convolution.tensors["weight"].copy_(126 + torch.arange(9).reshape(3, 3) % 2)
    network = Network((Node("in", "quantize", (IMAGES,), Quantization(0.005, 0)), convolution), (2048, 5, 5))
    given = images(network, 1).abs()
    assert torch.equal(Cuda().load(network, DEVICE)(given).cpu(), Reference().load(network)(given))


def test_without_a_gpu_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in Cuda().available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_all_but_grouped_convolutions_run_in_integers():
    network = every_operator()
    proof = prove(Cuda(), network, images(network))
    assert (proof.integer, proof.floating) == (7, 1)


def test_the_machine_code_multiplies_bytes_and_copies_ahead():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_product.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in found
    assert any(word.startswith("cp.async.cg.shared.global") for word in found)  # while the tensor cores work
