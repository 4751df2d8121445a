"""A large step by the paper's definition, as plainly as it can be written, to hold the trainer against.

Nothing here uses the trainer, its schedule, its optimizer, its BatchNorm or its cutting of samples: k forward passes
of n samples one after another, each with the statistics of its own n, gradients added and divided by kn, the update
applied by hand. What the two share is what they start from: the network with its first weights, an epoch's one
permutation, and each sample's augmented image. It is slow, and meant to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largebatch.base.user_code import load
from largebatch.config.run import Config
from largebatch.data.source import Source
from largebatch.data.stream import DROPOUT, INITIALISE, key, permutation
from largebatch.models import build_model, initialise
from largebatch.models.build import channels_of


@dataclass
class State:
    """Weights, running statistics and momentum by name, between two steps."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One large step: its rate, each worker's sample indices and images, the gradient, and the state after it."""

    rate: float
    samples: list[Tensor]
    images: list[Tensor]
    gradients: dict[str, Tensor]
    after: State


class Definition:
    """The experiment of ``config``, step by step.

    Args:
        config: Its optimizer must be sgd.
        source: The data, with the augmentation that (seed, epoch, sample) decide.
        device: Where to compute.
        dtype: float32 or float64.
        forward: How a model sees images: plainly, or under autocast.
        tree: Add gradients pairwise in a binary tree over the workers instead of one after another.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        forward: Callable[[nn.Module, Tensor], Tensor],
        tree: bool = False,
    ) -> None:
        self.config, self.source, self._forward, self._tree = config, source, forward, tree
        torch.manual_seed(key(config.seed, INITIALISE) >> 1)
        self.model = build_model(config.model, source.classes, channels_of(source.sample.shape))
        initialise(self.model, config.model)
        self.model.to(device, dtype).train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = config.bn.momentum  # some libraries have their own
        self._decayed = _decayed(self.model)
        self.stochastic = False  # whether a pass draws random numbers: then it begins at the worker's own

    def start(self) -> State:
        """Return the state before the first step."""
        return State(
            {name: p.detach().clone() for name, p in self.model.named_parameters()},
            {name: buffer.clone() for name, buffer in self.model.named_buffers()},
        )

    def step(self, iteration: int, before: State) -> Step:
        """Make step ``iteration`` (from 0) from the state before it.

        u ← m u + g + λ w, then w ← w − η (g + λ w + m u): Nesterov momentum with the rate outside.
        """
        config = self.config
        per_epoch = self.source.train_images // (config.k * config.n)
        epoch, within = divmod(iteration, per_epoch)
        order = permutation(self.source.train_images, config.seed, epoch)
        samples, images, gradients, statistics = [], [], [], []
        for worker in range(config.k):
            start = within * config.k * config.n + worker * config.n
            taken = order[start : start + config.n]
            batch = next(iter(self.source.train([(epoch, taken)])))
            self._load(before)
            if self.stochastic:
                torch.manual_seed(key(config.seed, DROPOUT, iteration, worker) >> 1)
            self._loss(self._logits(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]
            samples.append(taken)
            images.append(batch.images)
            gradients.append(
                {
                    name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for name, p in self.model.named_parameters()
                }
            )
            statistics.append({name: buffer.clone() for name, buffer in self.model.named_buffers()})
        total = {name: self._add([g[name] for g in gradients]) / (config.k * config.n) for name in gradients[0]}
        if config.optimizer.clip_norm:  # of the gradient of all kn samples
            norm = torch.nn.utils.get_total_norm(total.values())
            factor = torch.clamp(config.optimizer.clip_norm / (norm + 1e-6), max=1.0)
            total = {name: gradient * factor for name, gradient in total.items()}
        rate = rate_at(config, iteration, per_epoch)
        weights, momentum = {}, {}
        for name, weight in before.weights.items():
            decay = config.optimizer.weight_decay if name in self._decayed else 0.0
            direction = total[name].add(weight, alpha=decay)
            old = before.momentum.get(name, torch.zeros_like(weight))
            momentum[name] = old.mul(config.optimizer.momentum).add(direction)
            if config.optimizer.nesterov:
                direction = direction.add(momentum[name], alpha=config.optimizer.momentum)
            else:
                direction = momentum[name]
            weights[name] = weight.add(direction, alpha=-rate)
        if config.bn.running == "worker0":
            buffers = statistics[0]
        else:
            buffers = {
                name: self._add([s[name] for s in statistics]) / config.k if first.is_floating_point() else first
                for name, first in statistics[0].items()
            }
        return Step(rate, samples, images, total, State(weights, buffers, momentum))

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of a worker's samples."""
        loss = self.config.loss
        if loss.own:
            values: Tensor = load("loss.name", loss.name)(outputs, labels)
            return values.sum()
        return F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=loss.label_smoothing)

    def _logits(self, images: Tensor) -> Tensor:
        logits = self._forward(self.model, images)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.weights[name])
                parameter.grad = None
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state.buffers[name])

    def _add(self, terms: list[Tensor]) -> Tensor:
        if not self._tree:
            return torch.stack(terms).sum(0)
        while len(terms) > 1:
            terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]

    def validate(self, state: State) -> tuple[int, int]:
        """Return (wrong, total) over the validation set, every sample once."""
        self._load(state)
        self.model.eval()
        wrong = 0
        with torch.no_grad():
            for start in range(0, self.source.val_images, 100):
                batch = range(start, min(start + 100, self.source.val_images))
                for images in self.source.validation([batch]):
                    wrong += int((self._logits(images.images).argmax(1) != images.labels).sum())
        self.model.train()
        return wrong, self.source.val_images


def _decayed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that decay: all but the γ and β of normalisations."""
    spared = set()
    for module_name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            spared |= {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return {name for name, _ in model.named_parameters()} - spared


def rate_at(config: Config, iteration: int, per_epoch: int) -> float:
    """Return the rate of an iteration by the paper's words (section 2.2 and 5.1)."""
    eta, kn = config.lr.base, config.k * config.n
    ratio = kn / config.lr.base_minibatch
    target = {"linear": eta * ratio, "sqrt": eta * math.sqrt(ratio), "none": eta}[config.lr.scaling]
    warmup = round(config.warmup_epochs * per_epoch) if target > eta else 0
    if iteration < warmup:
        return eta if config.warmup.name == "constant" else eta + (target - eta) * (iteration / warmup)
    if config.schedule.name == "cosine":
        done = (iteration - warmup) / (config.epochs * per_epoch - warmup)
        return target * 0.5 * (1.0 + math.cos(math.pi * done))
    passed = sum(iteration >= round(epoch * per_epoch) for epoch in config.milestones)
    return target * config.schedule.factor**passed
