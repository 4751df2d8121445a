import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples import RECTIFIED, heavy
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.base.errors import UserError
from largebatch.quantization.network import IMAGES, Network, Node, Quantization
from largebatch.quantization.saturation import audit, largest_pairs, most, refuse_overflow, safe_scale

BYTES = Quantization(1 / 128, 0)


def adversarial(safe: bool) -> tuple[Network, torch.Tensor]:
    """A convolution whose real weights are all near their maximum, and images near theirs."""
    real = 0.1 + 0.01 * torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = real.abs().amax((1, 2, 3)) / 127
    scale = safe_scale(real, scale) if safe else scale
    node = heavy("conv", ("in",), (32, 16, 3, 3), replace(RECTIFIED, scale=0.25))
    weight = (real / scale[:, None, None, None]).round().to(torch.int8)
    tensors = {"weight": weight, "weight_scale": scale, "bias": torch.zeros(32, dtype=torch.int32)}
    nodes = (
        Node("in", "quantize", (IMAGES,), BYTES),
        replace(node, tensors=tensors),
        Node("mean", "average_pool", ("conv",), Quantization(0.25, 0), {"kernel": None, "keep": False}),
        Node("logits", "dequantize", ("mean",)),
    )
    images = 1.5 + 0.49 * torch.rand(2, 16, 12, 12, generator=torch.Generator().manual_seed(1))
    return Network(nodes, (16, 12, 12)), images


def test_pairs_are_neighbouring_channels_at_one_place():
    weight = torch.zeros(4, 3, 2, 1)
    weight[0, 0, 0], weight[0, 1, 0] = 100, 27  # a pair
    weight[1, 1, 0], weight[1, 2, 0] = 100, 27  # in two pairs
    weight[2, 2, 0], weight[2, 0, 1] = -100, -27  # neighbours where three channels follow three
    weight[3, 0, 0], weight[3, 0, 1] = 100, 27  # two places
    assert largest_pairs(weight).tolist() == [127, 100, 127, 100]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([127, 200, 255]), st.booleans())
def test_safe_scales_leave_no_pair_that_overflows(seed, inputs, high, one_scale):
    weight = torch.randn(6, inputs, 3, 3, generator=torch.Generator().manual_seed(seed)) + 1
    scale = weight.abs().amax((1, 2, 3)) / 127
    scale = scale.max() if one_scale else scale
    safe = safe_scale(weight, scale, high)
    rounded = (weight / safe.reshape(-1, 1, 1, 1)).round()
    assert (largest_pairs(rounded) * high <= 2**15 - 1).all()
    assert (safe >= scale).all()
    assert (safe <= 2.02 * scale).all()  # at worst, one bit of a channel's weights
    before = largest_pairs((weight / scale.reshape(-1, 1, 1, 1)).round())
    if not one_scale:
        assert torch.equal(safe[before <= most(high)], scale[before <= most(high)])


def test_the_audit_names_layers_and_channels():
    network, _ = adversarial(safe=False)
    assert audit(network) == {"conv": list(range(32))}
    assert audit(adversarial(safe=True)[0]) == {}
    narrow = replace(network, nodes=(replace(network.nodes[0], output=replace(BYTES, high=127)), *network.nodes[1:]))
    assert audit(narrow) == {}


def test_a_network_that_would_overflow_is_refused():
    network, _ = adversarial(safe=False)
    refuse_overflow("x86", network, lambda: False)
    refuse_overflow("x86", adversarial(safe=True)[0], lambda: True)
    with pytest.raises(UserError, match=r"engine=x86 would be silently wrong .* 32 channels in 1 layers \(conv, …\)"):
        refuse_overflow("x86", network, lambda: True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's kernels without VNNI are those of x86")
def test_kernels_without_vnni_overflow_and_safe_scales_help():
    """oneDNN itself, told to use no more than AVX2: the numbers are the processor's, not a simulation's."""
    program = Path(__file__).with_name("overflowing.py")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(program.parent)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["overflows"] == "True"
    assert "reduce_range=true" in found["refused"]
    assert float(found["unsafe_difference"]) > 20  # silently wrong, were it not refused
    assert float(found["safe_difference"]) <= 1
