"""GPU kernels, run by Triton's interpreter where there is no GPU: the same arithmetic, tile by tile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

from largebatch.base.errors import UserError
from largebatch.models import SmallResNet
from largebatch.models.batchnorm import RunningStatistics, batchnorms, choose_kernel
from largebatch.models.fuse_batchnorm import fuse

pytest.importorskip("triton", reason="Triton is made for Linux")
from interpreted import MARKS

from largebatch.models.batchnorm_kernels import normalise

pytestmark = MARKS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def batch(shape, layout, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    return values.to(device, dtype).contiguous(memory_format=layout).requires_grad_()


def parameters(channels, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(2, channels, generator=generator, dtype=torch.float64) + 0.5
    return [one.to(device, dtype).detach().requires_grad_() for one in values]


def plain(x, weight, bias, groups, residual, relu):
    """Return what PyTorch computes, one group after another."""
    y = torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, 1e-5) for part in x.chunk(groups)])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@pytest.mark.parametrize(
    ("shape", "layout", "groups", "residual", "relu"),
    [
        ((8, 5, 3, 4), LAST, 4, False, False),
        ((8, 5, 3, 4), LAST, 2, False, True),
        ((8, 5, 3, 4), CONTIGUOUS, 2, True, True),
        ((4, 70, 9, 9), LAST, 2, True, True),  # more channels than a tile has, in several spans of rows
        ((4, 2, 50, 50), CONTIGUOUS, 1, True, True),  # more rows than a tile has
        ((8, 70), CONTIGUOUS, 4, False, True),
        ((6, 3, 5), CONTIGUOUS, 3, True, False),
    ],
)
def test_in_float64_the_kernels_are_pytorchs_batchnorm_of_each_group(shape, layout, groups, residual, relu):
    x, (weight, bias) = batch(shape, layout, device=DEVICE), parameters(shape[1], device=DEVICE)
    added = batch(shape, CONTIGUOUS, device=DEVICE).detach().flip(0).sub(5).requires_grad_() if residual else None
    y, mean, variance = normalise(x, weight, bias, groups, 1e-5, added, relu)
    expected = plain(x, weight, bias, groups, added, relu)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert y.stride() == x.stride()
    for number, part in enumerate(x.detach().transpose(0, 1).flatten(2).chunk(groups, 1) if x.dim() > 2 else ()):
        torch.testing.assert_close(mean[number], part.flatten(1).mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance[number], part.flatten(1).var(1, correction=0), rtol=1e-11, atol=1e-12)

    inputs = [x, weight, bias, *([added] if residual else [])]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype).to(DEVICE)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)  # the interpreter truncates
def test_lower_precision_keeps_statistics_in_float32(dtype, tolerance):
    x, exact = batch((4, 6, 8, 8), LAST, dtype, DEVICE), parameters(6, device=DEVICE)
    wide = x.detach().double().requires_grad_()
    weight, bias = (one.detach().float().requires_grad_() for one in exact)
    y, mean, _ = normalise(x, weight, bias, 2, 1e-5, relu=True)
    expected = plain(wide, *exact, 2, None, True)
    assert (y.dtype, mean.dtype) == (dtype, torch.float32)
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
    ours = torch.autograd.grad(y.float().square().sum(), [x, weight, bias])
    theirs = torch.autograd.grad(expected.square().sum(), [wide, *exact])
    assert [one.dtype for one in ours] == [dtype, torch.float32, torch.float32]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).abs().max() <= 4 * tolerance * other.abs().max()


def test_a_mean_far_from_zero_costs_no_digits():
    x = batch((4, 2, 8, 8), LAST, torch.float32, DEVICE).detach() + 1000
    _, _, variance = normalise(x, *parameters(2, torch.float32, DEVICE), 1, 1e-5)
    torch.testing.assert_close(variance[0], x.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


def test_what_is_not_a_number_stays_so():
    x = batch((4, 2, 3, 3), LAST, device=DEVICE).detach()
    x[0, 1] = torch.nan
    y, _, _ = normalise(x, *parameters(2, device=DEVICE), 2, 1e-5, relu=True)
    assert y[:2, 1].isnan().all()
    assert not y[2:].isnan().any()


def bottlenecks() -> nn.Module:
    shape = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(Bottleneck(3, 2, downsample=shape), Bottleneck(8, 2))


@pytest.mark.parametrize(
    ("make", "kernel", "policy"),
    [
        (lambda: SmallResNet(8, 5), "fused", "worker0"),
        (lambda: SmallResNet(8, 5), "joint", "worker0"),
        (bottlenecks, "fused", "mean"),
        (bottlenecks, "joint", "mean"),
    ],
)
def test_a_network_learns_the_same_by_every_kernel(make, kernel, policy):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    results = []
    for way in ("separate", kernel):
        torch.manual_seed(0)
        net = make().to(DEVICE, torch.float64).train()
        for norm in batchnorms(net):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        running = RunningStatistics(net, policy, 0.1, groups=2, first=True, kernel=way)
        names = list(net.state_dict())
        if way == "fused":
            fuse(net)
        assert list(net.state_dict()) == names
        running.before_pass(0)
        logits = net(images.contiguous(memory_format=LAST))
        logits.square().sum().backward()
        running.after_pass(0)
        running.after_step()
        shown = {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
        results.append(shown | {"logits": logits.detach(), "evaluated": net.eval()(images).detach()})
    for name, expected in results[0].items():
        if name.endswith("num_batches_tracked"):
            continue
        torch.testing.assert_close(results[1][name], expected, rtol=1e-7, atol=1e-8, msg=name)


def test_what_the_kernels_cannot_count_is_refused():
    norm = nn.BatchNorm2d(64)
    RunningStatistics(nn.Sequential(norm), "worker0", 0.1, groups=2, first=True, kernel="fused").before_pass(0)
    with pytest.raises(UserError, match=r"a batch of 4096 has 3,288,334,336 of them in one layer: use bn\.kernel=sep"):
        norm(torch.empty(8192, 64, 112, 112, device="meta"))


def test_only_blocks_of_converted_batchnorms_are_fused():
    net = resnet50(num_classes=5)
    before = [type(module) for module in net.modules()]
    fuse(net)
    assert [type(module) for module in net.modules()] == before
    RunningStatistics(net, "worker0", 0.1, groups=2, first=True, kernel="fused")
    fuse(net)
    assert sum(type(module).__name__ == "FusedBottleneck" for module in net.modules()) == 16
    assert sum(isinstance(module, nn.ReLU) for module in net.children()) == 0


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (("auto", "cpu", False, False), "separate"),
        (("auto", "cuda", False, False), "fused"),
        (("auto", "cuda", False, False, False), "separate"),
        (("auto", "cuda", True, False), "joint"),
        (("auto", "cuda", False, True), "separate"),
        (("separate", "cuda", False, False), "separate"),
        (("joint", "cpu", False, False), "joint"),
    ],
)
def test_the_kernel_is_chosen_by_the_device(monkeypatch, words, chosen):
    monkeypatch.setattr("largebatch.models.batchnorm._lacking", lambda: "")
    assert choose_kernel(*words) == chosen


def test_kernels_that_cannot_be_made_are_refused_or_passed_over(monkeypatch):
    with pytest.raises(UserError, match="there is device=cpu"):
        choose_kernel("fused", "cpu", False, False)
    with pytest.raises(UserError, match="which makes such kernels itself"):
        choose_kernel("fused", "cuda", True, False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert choose_kernel("auto", "cuda", False, False) == "separate"
    with pytest.raises(UserError, match="there is no C compiler"):
        choose_kernel("fused", "cuda", False, False)


def test_every_kernel_compiles_for_a_gpu_and_reads_sixteen_bytes_at_a_time(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, Path(__file__).parent / "compile_kernels.py"]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = json.loads(done.stdout)
    assert len(loads["channels_last"]) == len(loads["contiguous"]) == 4
    assert all("ld.global.v4.b32" in instructions for instructions in loads["channels_last"].values())
