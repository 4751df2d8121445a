"""The parts of training that a pitfall swaps; without one, each is the paper's.

Everything that asks which pitfall a run has is here (its rates and its loss scale are in
:mod:`largebatch.config.pitfalls`), so that the step, the optimizer, BatchNorm and validation read as if none existed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from largebatch.config.groups import ModelConfig
from largebatch.config.run import Config
from largebatch.data.stream import IndependentShuffles, SampleStream
from largebatch.runtime.placement import Placement
from largebatch.training.optimizer import Eager, clip, make_optimizer, parameter_groups


def sample_stream(config: Config, train_images: int) -> SampleStream:
    """Return the order of samples: one permutation an epoch, shared out among the workers (remark 4)."""
    kind = IndependentShuffles if config.pitfall.name == "independent_shuffle" else SampleStream
    return kind(train_images, config.k, config.n, config.seed)


def loss_factor(config: Config, processes: int) -> float:
    """Return the factor of a worker's summed cross-entropy: 1/kn, in every process alike (remark 3).

    Args:
        config: The run.
        processes: By how many the exchange divides; their product with 1/kn undoes that.
    """
    samples = config.n if config.pitfall.name == "normalize_by_n" else config.minibatch
    return config.loss_scale * processes / samples


def model_to_start(config: Config) -> ModelConfig:
    """Return the network's configuration with the initialisation that its weights get."""
    zero_gamma = config.model.zero_gamma and config.pitfall.name != "gamma_one"
    return replace(config.model, zero_gamma=zero_gamma)


def batchnorm_groups(config: Config, placement: Placement, stochastic: bool) -> tuple[int, Placement]:
    """Return in how many groups BatchNorm takes its statistics in a pass, and the placement with such passes.

    A group is a worker. Dropout is drawn a pass at a time: only a pass of one worker is the same on any hardware.
    """
    if config.pitfall.one_pass:
        return 1, placement
    groups = 1 if stochastic else placement.workers_per_pass
    return groups, replace(placement, workers_per_pass=groups)


def optimizer_of(model: nn.Module, config: Config, fused: bool, rate_on: torch.device | None) -> Optimizer:
    """Return the run's optimizer; see :func:`~largebatch.training.optimizer.make_optimizer`."""
    update, name = config.optimizer, config.pitfall.name
    groups = parameter_groups(model, update.weight_decay, update.weight_decay if name == "decay_bn" else 0.0)
    if config.pitfall.absorbs_rate:
        optimizer: Optimizer = RateAbsorbingSGD(
            groups, update.momentum, update.nesterov, name == "absorb_rate_corrected"
        )
    else:
        optimizer = make_optimizer(groups, update, fused, rate_on)
    if update.clip_norm is not None:
        clip(optimizer, update.clip_norm)
    return optimizer


def validated_again(config: Config, val_images: int) -> list[range]:
    """Return the samples that are validated a second time, in batches: none."""
    cuts: list[range] = []
    missing = -val_images % config.k if config.pitfall.name == "padded_eval" else 0
    while missing:  # a padding sampler starts again from the first sample
        cuts.append(range(min(missing, val_images)))
        missing -= len(cuts[-1])
    return cuts


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
