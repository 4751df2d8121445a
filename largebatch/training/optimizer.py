"""The optimizers, and which parameters they decay."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from largebatch.base.errors import UserError
from largebatch.base.user_code import calling, load
from largebatch.config.groups import OptimizerConfig

# γ and β of every normalisation are spared by the layer's type: a name such as "bn" misses the branches that
# change the shape, and "one dimension" would spare the biases, which the paper decays.
NORMALISATIONS = (
    _BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


@dataclass(frozen=True)
class DecayGroups:
    """Trainable parameters by name: those that decay, and γ and β of normalisations, which do not."""

    decayed: Mapping[str, nn.Parameter]
    spared: Mapping[str, nn.Parameter]


def decay_groups(model: nn.Module) -> DecayGroups:
    """Sort the trainable parameters of a model by whether weight decay applies (section 5.1)."""
    spared_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMALISATIONS)
        for parameter in module.parameters(recurse=False)
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return DecayGroups(
        decayed={name: p for name, p in trained.items() if id(p) not in spared_ids},
        spared={name: p for name, p in trained.items() if id(p) in spared_ids},
    )


def parameter_groups(model: nn.Module, decay: float, spared_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the optimizer's groups of a model's parameters, those that are empty left out."""
    groups = decay_groups(model)
    found = (
        {"params": list(groups.decayed.values()), "weight_decay": decay},
        {"params": list(groups.spared.values()), "weight_decay": spared_decay},
    )
    return [group for group in found if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool = False, rate_on: torch.device | None = None
) -> Optimizer:
    """Return the optimizer of some parameters; :func:`set_rate` sets its rate before every step.

    SGD is PyTorch's form of momentum, u ← m u + g, w ← w − η u: the rate is outside the momentum, so a change
    of rate needs no correction (remark 2).

    Args:
        groups: From :func:`parameter_groups`, of a model on its device.
        config: Which, and its constants.
        fused: Whether SGD reads and writes everything once, in a single kernel a group; equal up to rounding.
        rate_on: Where the rate lies as a tensor, for a step that is recorded; None: it is a number. Fused SGD alone
            takes it without waiting for the device.
    """
    if config.name == "sgd":
        rate = 0.0 if rate_on is None else torch.zeros((), device=rate_on)
        return EagerSGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None)
    if config.name == "adamw":
        return EagerAdamW(groups, lr=0.0, betas=(config.momentum, 0.999), fused=fused or None, **(config.kwargs or {}))
    if config.own:
        return _own(groups, config)
    from timm.optim.lamb import Lamb  # imported where used: timm takes a second
    from timm.optim.lars import Lars

    if config.name == "lamb":
        return Lamb(groups, lr=0.0, betas=(config.momentum, 0.999))
    momentum, trust = config.momentum, config.trust_coefficient
    return Lars(groups, lr=0.0, momentum=momentum, nesterov=config.nesterov, trust_coeff=trust)


def _own(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """Return an optimizer of the user's own class; its rate of 0 is replaced before every step."""
    call, kwargs = f"optimizer.name={config.name}", config.kwargs or {}
    make = load("optimizer.name", config.name)
    given = ", ".join(["groups of parameters", "lr=0.0", *(f"{name}={value!r}" for name, value in kwargs.items())])
    expected = f"called with ({given}), and has to return a torch.optim.Optimizer"
    with calling(call, expected):
        optimizer = make(groups, lr=0.0, **kwargs)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"{call} returned a {type(optimizer).__name__}: it is {expected}.")
    return optimizer


def clip(optimizer: Optimizer, norm: float) -> None:
    """Scale the gradient of the whole minibatch down to a norm, before every step: g ← g · min(1, norm / ‖g‖)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def scale(*_: Any) -> None:
        clip_grad_norm_(parameters, norm)

    optimizer.register_step_pre_hook(scale)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group its rate, in place where it is a tensor: what is recorded reads that one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Eager(Optimizer):
    """PyTorch's methods without what hides them from its compiler, which would import all of it at the first call."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class EagerAdamW(Eager, AdamW):
    """PyTorch's AdamW, with its arithmetic."""

    step = torch.no_grad()(inspect.unwrap(AdamW.step))


class EagerSGD(Eager, SGD):
    """PyTorch's SGD, with its arithmetic."""

    step = torch.no_grad()(inspect.unwrap(SGD.step))
