"""What the optimizer decays, and the optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

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


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    pitfall: str = "none",
    fused: bool = False,
    rate_on: torch.device | None = None,
) -> Optimizer:
    """Return the optimizer with its two decay groups; :func:`set_rate` sets its rate before every step.

    SGD is PyTorch's form of momentum, u ← m u + g, w ← w − η u: the rate is outside the momentum, so a change
    of rate needs no correction (remark 2).

    Args:
        model: On its device already.
        config: Which, and its constants.
        pitfall: That of the run.
        fused: Whether SGD reads and writes everything once, in a single kernel a group; equal up to rounding.
        rate_on: Where the rate lies as a tensor, for a step that is recorded; None: it is a number. Fused SGD alone
            takes it without waiting for the device.
    """
    groups = decay_groups(model)
    spared_decay = config.weight_decay if pitfall == "decay_bn" else 0.0
    parameters = [
        {"params": list(groups.decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(groups.spared.values()), "weight_decay": spared_decay},
    ]
    parameters = [group for group in parameters if group["params"]]
    if pitfall in ("absorb_rate", "absorb_rate_corrected"):
        return RateAbsorbingSGD(parameters, config.momentum, config.nesterov, pitfall == "absorb_rate_corrected")
    if config.name == "sgd":
        rate = 0.0 if rate_on is None else torch.zeros((), device=rate_on)
        return EagerSGD(parameters, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None)
    from timm.optim.lamb import Lamb  # imported where used: timm takes a second
    from timm.optim.lars import Lars

    if config.name == "lars":
        return Lars(
            parameters,
            lr=0.0,
            momentum=config.momentum,
            nesterov=config.nesterov,
            trust_coeff=config.trust_coefficient,
        )
    return Lamb(parameters, lr=0.0, betas=(config.momentum, 0.999))


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


class EagerSGD(Eager, SGD):
    """PyTorch's SGD, with its arithmetic."""

    step = torch.no_grad()(inspect.unwrap(SGD.step))


class RateAbsorbingSGD(Eager):
    """Momentum that holds the rate, v ← m v + η g, w ← w − v: the second form of remark 2.

    Args:
        parameters: Groups with their weight decay.
        momentum: m.
        nesterov: Whether the step is m v + η g instead of v.
        corrected: Whether v is multiplied by η_{t+1}/η_t when the rate changes. Without it, pitfall=absorb_rate.
    """

    def __init__(self, parameters: Iterable[dict[str, Any]], momentum: float, nesterov: bool, corrected: bool) -> None:
        self.momentum, self.nesterov, self.corrected = momentum, nesterov, corrected
        super().__init__(parameters, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step with the rate of each group's ``lr``."""
        for group in self.param_groups:
            rate = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                absorbed = rate * parameter.grad.add(parameter, alpha=group["weight_decay"])
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                if self.corrected and "rate" in state:
                    velocity.mul_(rate / state["rate"])
                state["rate"] = rate
                velocity.mul_(self.momentum).add_(absorbed)
                parameter.sub_(absorbed.add_(velocity, alpha=self.momentum) if self.nesterov else velocity)
