"""Probes: measure drift, noise scale and sharpness where a run stands, and leave the run as it was, to the bit."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from largebatch.base.errors import UserError
from largebatch.data.source import Batch, Source
from largebatch.data.stream import DROPOUT, PROBE, SampleStream, key
from largebatch.models.batchnorm import batchnorms, one_worker_at_a_time
from largebatch.runtime.watchdog import Watched, unwatched
from largebatch.training.drift import (
    Loss,
    Sharpness,
    SmallStep,
    Weights,
    follow,
    hessian_product,
    sharpness,
    stability_bound,
)
from largebatch.training.learner import DTYPES, Learner
from largebatch.training.optimizer import decay_groups

SHARE = 0.05  # of a run's back-propagations, which probe.every=auto may take
TOLERANCE = 0.1  # of an eigenvector of the Hessian: about 1 % of the sharpness
Drawn = tuple[int, Batch]  # the number of a small step, from 0, and its minibatch


class Prober:
    """Measures a run where it stands. Every process computes the same, so that nothing is exchanged.

    The network is called with copies of its weights, each minibatch normalised by its own statistics as a worker of
    the run does it: that is the function whose gradient the steps follow. The Hessian is that function's too, in full
    precision, without weight decay.

    Args:
        learner: The run's; read, never changed.
        source: The run's data: the samples that come next are the ones that are probed with.

    Raises:
        UserError: the network has nothing to differentiate by.
    """

    def __init__(self, learner: Learner, source: Source) -> None:
        config = learner.config
        self._learner, self._source, self._config = learner, source, config
        self._stream = SampleStream(source.train_images, config.k, config.n, config.seed)
        self._rates = config.rates(source.train_images)
        self._steps = config.probe.steps or config.k
        self._statistics: list[tuple[Tensor, Tensor]] | None = None
        if not self._weights():
            raise UserError(
                f"model.name={config.model.name} has no parameter that is trained: there is no gradient to probe."
            )

    @property
    def every(self) -> int | None:
        """Epochs between two probes, None for no probe: as asked for, or by what they cost.

        A probe counts 2 · steps − 1 gradients and at most batches · products Hessian-vector products, of two gradients
        each, against those that one process of the run takes. Where the Hessian's eigenvalue of largest magnitude is
        negative, which is seldom, the products are up to twice as many.
        """
        asked = self._config.probe
        if not isinstance(asked.every, str):
            return asked.every
        cost = 2 * self._steps - 1 + 2 * asked.batches * asked.products
        epochs = self._config.epochs
        run = epochs * self._stream.iterations_per_epoch * self._learner.placement.workers
        probes = int(SHARE * run / cost)
        return epochs // probes + 1 if probes else None  # the one at the start is among them

    def measure(self, iteration: int, watched: Watched = unwatched) -> dict[str, Any]:
        """Measure after ``iteration`` steps of the run.

        Args:
            iteration: Where the run stands.
            watched: What batches go through.

        Returns:
            A line of ``probes.jsonl``; see :mod:`largebatch.records.write`.
        """
        started, learner, config = time.monotonic(), self._learner, self._config
        total = config.epochs * self._stream.iterations_per_epoch
        rate = self._rates.rate_at(min(iteration, total - 1))
        device = learner.world.device
        # A loader draws from PyTorch's generator, dropout sets it.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), one_worker_at_a_time(learner.model):
            velocity = self._velocity()
            update = config.optimizer
            decay = dict.fromkeys(decay_groups(learner.model).decayed, update.weight_decay)
            step = SmallStep(rate / config.k, update.momentum, update.nesterov, decay)
            held: list[Drawn] = []
            batches = _keeping(watched(self._coming(iteration), "probing"), held, config.probe.batches)
            following = follow(self._loss(iteration), self._weights(), velocity, batches, step, config.n)
            curved = self._sharpness(self._loss(iteration, exact=True), lambda: watched(held, "probing"))
        line: dict[str, Any] = {
            "iteration": iteration,
            "epoch": iteration / self._stream.iterations_per_epoch,
            "rate": rate,
            "small_rate": step.rate,
            "cosine": following.cosine,
            "distance": following.distance,
            "end_point": following.end_point,
            "gradient_squared": following.gradient_squared,
            "noise_trace": following.noise_trace,
            "sharpness": curved.value,
            "sharpness_converged": curved.converged,
            "rate_times_sharpness": rate * curved.value,
            "stability_bound": stability_bound(update.momentum, update.nesterov),
            **self._moved_statistics(),
        }
        if config.probe.layers:
            line["layers"] = following.layers
        return {**line, "seconds": time.monotonic() - started}

    def _weights(self) -> Weights:
        return {name: value for name, value in self._learner.model.named_parameters() if value.requires_grad}

    def _velocity(self) -> Weights:
        """Return the run's momentum, zero where it has none yet."""
        state = self._learner.optimizer.state
        buffers = {name: state.get(value, {}).get("momentum_buffer") for name, value in self._weights().items()}
        return {
            name: torch.zeros_like(value) if buffers[name] is None else buffers[name]
            for name, value in self._weights().items()
        }

    def _coming(self, iteration: int) -> Iterator[Drawn]:
        """Yield the minibatches of the small steps: worker by worker, those that the run would take next."""
        places = [divmod(number, self._config.k) for number in range(self._steps)]
        per_epoch = self._stream.iterations_per_epoch
        passes = (
            ((iteration + later) // per_epoch, self._stream.samples(iteration + later, worker, 1))
            for later, worker in places
        )
        return enumerate(self._source.train(passes))

    def _loss(self, iteration: int, exact: bool = False) -> Loss[Drawn]:
        """Return the mean loss over a minibatch as the run computes it, or in full precision."""
        learner, config = self._learner, self._config

        def loss(weights: Weights, drawn: Drawn) -> Tensor:
            number, batch = drawn
            if learner.stochastic:  # the same dropout wherever the weights are
                later, worker = divmod(number, config.k)
                torch.manual_seed(key(config.seed, DROPOUT, iteration + later, worker) >> 1)
            # What is compiled, and attention's fast kernels, cannot be differentiated twice.
            with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
                with contextlib.nullcontext() if exact else learner.autocast():
                    logits = functional_call(learner.model, weights, (batch.images,))
                return learner.loss(logits.to(DTYPES[learner.placement.precision]), batch.labels).mean()

        return loss

    def _sharpness(self, loss: Loss[Drawn], batches: Callable[[], Iterable[Drawn]]) -> Sharpness:
        """Return the sharpness, NaN where PyTorch cannot differentiate one of the network's layers twice."""
        product = hessian_product(loss, self._weights(), batches)
        try:
            return sharpness(product, self._direction(), self._config.probe.products, TOLERANCE)
        except RuntimeError as error:
            if re.fullmatch("derivative for .* is not implemented", str(error)) is None:
                raise
            return Sharpness(math.nan, 0, False)

    def _direction(self) -> Tensor:
        """Return where power iteration begins: the same for every probe of a run, and of any generator's own."""
        size = sum(value.numel() for value in self._weights().values())
        first = next(iter(self._weights().values()))
        generator = torch.Generator().manual_seed(key(self._config.seed, PROBE) >> 1)
        return torch.randn(size, generator=generator, dtype=first.dtype).to(first.device)

    def _moved_statistics(self) -> dict[str, float | None]:
        """Say how far BatchNorm's running statistics have moved since the probe before, over all channels.

        Of the means, the root mean square of their change in standard deviations; of the variances, that of the change
        of their logarithm.
        """
        found = [
            (norm.running_mean.cpu().to(torch.float64, copy=True), norm.running_var.cpu().double() + norm.eps)
            for norm in batchnorms(self._learner.model)
            if norm.running_mean is not None and norm.running_var is not None
        ]
        before, self._statistics = self._statistics, found
        if not found or before is None:
            return {"bn_mean_moved": None, "bn_variance_moved": None}
        pairs = list(zip(before, found, strict=True))
        means = torch.cat([(mean - old_mean).square() / variance for (old_mean, _), (mean, variance) in pairs])
        variances = torch.cat([(variance / old).log().square() for (_, old), (_, variance) in pairs])
        return {"bn_mean_moved": math.sqrt(means.mean()), "bn_variance_moved": math.sqrt(variances.mean())}


def _keeping(batches: Iterator[Drawn], held: list[Drawn], count: int) -> Iterator[Drawn]:
    """Yield all batches, and keep the first ``count`` of them."""
    for drawn in islice(batches, count):
        held.append(drawn)
        yield drawn
    yield from batches
