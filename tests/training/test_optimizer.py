from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

from largebatch.training.optimizer import decay_groups, make_optimizer, parameter_groups, set_rate


def test_resnet50_spares_every_batchnorm_and_decays_the_rest():
    model = torchvision.models.resnet50()
    groups = decay_groups(model)
    norms = {
        f"{name}.{leaf}"
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for leaf in ("weight", "bias")
    }
    assert set(groups.spared) == norms
    assert len(norms) == 2 * 53
    assert "layer1.0.downsample.1.weight" in groups.spared  # a name that holds no "bn"
    assert {"layer1.0.downsample.0.weight", "fc.weight", "fc.bias"} <= set(groups.decayed)
    assert sum(p.numel() for p in groups.spared.values()) == 53_120
    assert sum(p.numel() for p in groups.decayed.values()) == 25_557_032 - 53_120


def test_other_normalisations_are_spared_and_biases_decayed():
    groups = decay_groups(timm.create_model("vit_tiny_patch16_224", num_classes=5))
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "norm.weight"} <= set(groups.spared)
    assert {"blocks.0.attn.qkv.bias", "cls_token", "pos_embed"} <= set(groups.decayed)


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    groups = decay_groups(model)
    assert (set(groups.decayed), set(groups.spared)) == ({"0.bias"}, {"1.weight"})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def descend(model, optimizer, rates):
    for number, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * number + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(compose, nesterov):
    # Remark 2, first form: u ← m u + g + λ w; w ← w − η u, or with Nesterov w ← w − η (g + λ w + m u).
    config = replace(compose().optimizer, nesterov=nesterov)
    model, rates = network(), [0.1, 0.4, 0.04]
    weights = [p.detach().clone() for p in model.parameters()]
    descend(model, make_optimizer(parameter_groups(model, config.weight_decay), config), rates)
    for index, w in enumerate(weights):
        decay = 1e-4 if index < 2 else 0.0  # weight and bias of the linear layer; γ and β
        u = torch.zeros_like(w)
        for number, rate in enumerate(rates):
            generator = torch.Generator().manual_seed(10 * number + index)
            g = torch.randn(w.shape, generator=generator, dtype=w.dtype) + decay * w
            u = 0.9 * u + g
            w = w - rate * (g + 0.9 * u if nesterov else u)
        torch.testing.assert_close(list(model.parameters())[index].detach(), w, rtol=1e-12, atol=1e-12)


def test_sgd_is_pytorchs(compose):
    ours, theirs = network(), network()
    descend(
        ours,
        make_optimizer(parameter_groups(ours, compose().optimizer.weight_decay), compose().optimizer),
        [0.1, 0.2, 0.02],
    )
    groups = [{"params": theirs[0].parameters(), "weight_decay": 1e-4}, {"params": theirs[1].parameters()}]
    descend(theirs, torch.optim.SGD(groups, momentum=0.9, nesterov=True), [0.1, 0.2, 0.02])
    assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_fused_sgd_with_its_rate_in_a_tensor_is_the_ordinary_one(compose):
    plain, fused, config = network(), network(), compose().optimizer
    optimizer = make_optimizer(
        parameter_groups(fused, config.weight_decay), config, fused=True, rate_on=torch.device("cpu")
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    ordinary = make_optimizer(parameter_groups(plain, config.weight_decay), config)
    for rate in (0.125, 0.5, 0.0625):
        set_rate(ordinary, rate)
        set_rate(optimizer, rate)
        for model, one in ((plain, ordinary), (fused, optimizer)):
            model(torch.ones(2, 3, dtype=torch.float64).cumsum(0)).square().sum().backward()
            one.step()
            one.zero_grad()
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_take_the_groups_and_the_rate(compose, name):
    config = compose(f"optimizer={name}").optimizer
    model = network()
    optimizer = make_optimizer(parameter_groups(model, config.weight_decay), config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [config.weight_decay, 0.0]
    before = [p.detach().clone() for p in model.parameters()]
    descend(model, optimizer, [0.0])
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    descend(model, optimizer, [0.01])
    assert not any(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
