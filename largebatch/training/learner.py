"""The learner, all that a training step reads and changes: network, exchange, optimizer and running statistics."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.base.errors import UserError
from largebatch.config.run import Config
from largebatch.data.source import Source, Target, open_source, sample_of
from largebatch.data.stream import DROPOUT, INITIALISE, key
from largebatch.models import build_model, initialise, is_stochastic
from largebatch.models.batchnorm import RunningStatistics, choose_kernel
from largebatch.models.build import channels_of, draws_numbers
from largebatch.models.fuse_batchnorm import fuse
from largebatch.runtime.placement import Placement
from largebatch.runtime.world import World, join
from largebatch.training.exchange import Averaging, Exchange, Tree
from largebatch.training.loss import Loss, make_loss
from largebatch.training.pitfalls import batchnorm_groups, loss_factor, model_to_start, optimizer_of

NEVER = timedelta(days=365)
# bf16 is autocast's: weights, gradients and updates stay in float32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@dataclass
class Learner:
    """State that a step reads and changes, on this process's device.

    ``loss`` gives one value for each sample. ``loss_factor`` multiplies a worker's sum of these before its backward
    pass: 1/kn, times the number of processes where the exchange divides by it. ``stochastic`` says whether the network
    draws random numbers (dropout).
    """

    config: Config
    placement: Placement
    world: World
    model: nn.Module
    exchange: Exchange
    optimizer: Optimizer
    running: RunningStatistics
    stochastic: bool
    loss_factor: float
    loss: Loss

    @property
    def first_worker(self) -> int:
        """The first of this process's consecutive workers."""
        return self.world.rank * self.placement.workers

    @property
    def passes(self) -> int:
        """Forward passes of this process in a step."""
        return self.placement.workers // self.placement.workers_per_pass

    @contextlib.contextmanager
    def worker_pass(self, iteration: int, number: int) -> Iterator[None]:
        """Surround forward and backward pass ``number`` of a step: its dropout, its statistics, its exchange."""
        if self.stochastic:  # dropout is drawn for the worker, wherever it runs
            worker = self.first_worker + number * self.placement.workers_per_pass
            torch.manual_seed(key(self.config.seed, DROPOUT, iteration, worker) >> 1)
        self.running.before_pass(number)
        # Gradients gather here until the last pass, whose back-propagation overlaps the one exchange of the step.
        with self.exchange.passing(last=number == self.passes - 1):
            yield
        self.running.after_pass(number)

    def is_finite(self) -> bool:
        """Return whether every weight and running statistic is finite; the latter must agree in all processes."""
        values = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in values]).all())

    def logits(self, images: Tensor) -> Tensor:
        """Return what the network says of a pass's images, in the precision in which losses are computed."""
        with self.autocast():
            logits: Tensor = self.exchange.net(images)
        return logits.to(DTYPES[self.placement.precision])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        return autocast(self.placement)


def start(config: Config, placement: Placement) -> World:
    """Join the processes of a run, and set the arithmetic that its precision and determinism ask for."""
    deterministic = config.exact if config.deterministic is None else config.deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # is read before the first product
        # Otherwise every new tensor is filled, at the cost of a pass over its memory. Nothing here reads one before
        # it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    timeout = config.launcher.timeout
    # Whoever watches the processes ends a run that hangs, with more words than a broken exchange has.
    world = join(placement, NEVER if timeout is None else timedelta(seconds=2 * timeout + 60))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = placement.precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    if config.compile:
        torch.use_deterministic_algorithms(deterministic)
    else:  # the same without importing PyTorch's compiler
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
    return world


def open_data(config: Config, placement: Placement, world: World) -> Source:
    """Open the run's data as its processes want them; what one of them downloads, the others find."""
    target = Target(world.device, DTYPES[placement.precision], placement.channels_last)
    with world.main_first():
        return open_source(config.dataset, config.loader, config.seed, target, placement.cores)


def autocast(placement: Placement) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which forward passes run: bf16 where that is the precision."""
    if placement.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(placement.device, torch.bfloat16)


def make_learner(
    config: Config, placement: Placement, world: World, classes: int, sample: Tensor | None = None
) -> Learner:
    """Build model and optimizer, with starting weights that depend on the seed alone.

    Args:
        config: The run.
        placement: Where its workers are.
        world: Its processes.
        classes: Width of the network's output.
        sample: Shape and type of an input, from the source of the data; None: an image of the configured size.
    """
    sample = sample_of(config.dataset) if sample is None else sample
    dtype = DTYPES[placement.precision]
    torch.manual_seed(key(config.seed, INITIALISE) >> 1)
    model = build_model(config.model, classes, channels_of(sample.shape))
    initialise(model, model_to_start(config))
    stochastic = is_stochastic(model) or (config.model.source == "python" and draws_numbers(model, sample))
    model.to(world.device, dtype).train()
    if placement.channels_last:
        model.to(memory_format=torch.channels_last)
    groups, placement = batchnorm_groups(config, placement, stochastic)
    pays = groups > 1 or config.cuda_graphs
    kernel = choose_kernel(config.bn.kernel, placement.device, config.compile, config.exact, pays)
    running = RunningStatistics(
        model, config.bn.running, config.bn.momentum, groups, world.rank == 0, kernel, config.compile
    )
    if kernel == "fused":
        fuse(model)
    if config.cuda_graphs and stochastic:
        raise UserError(
            "cuda_graphs=true repeats a step as it was recorded, and dropout is drawn anew for every worker: use "
            "cuda_graphs=false for this network."
        )
    one_kernel = placement.device == "cuda" and not config.exact
    rate_on = world.device if config.cuda_graphs else None
    optimizer = optimizer_of(model, config, one_kernel, rate_on)
    if config.compile:
        torch.compiler.reset()  # graphs of another run in this process count towards the compiler's limit
        model.compile(fullgraph=True, dynamic=False)
    options = config.exchange
    exchange = Tree(model, world, options.bucket_bytes) if config.exact else Averaging(model, world, options)
    factor, loss = loss_factor(config, exchange.factor), make_loss(config.loss)
    learner = Learner(config, placement, world, model, exchange, optimizer, running, stochastic, factor, loss)
    if world.size > 1 and not config.exact:
        _settle_buckets(learner, sample)
    return learner


def _settle_buckets(learner: Learner, sample: Tensor) -> None:
    """Make one pass of zeros, after which DDP has cut its buckets for good.

    DDP cuts them anew after the first back-propagation, and from three processes on an element's place in its
    bucket decides the order of its sum: without this, a resumed run would differ by bits from one that never
    stopped.
    """
    place = learner.placement
    # Two samples a worker are enough, but another shape would be compiled for itself.
    samples = learner.config.n if learner.config.compile else min(learner.config.n, 2)
    dtype = DTYPES[place.precision] if sample.is_floating_point() else sample.dtype
    images = torch.zeros((place.workers_per_pass * samples, *sample.shape), dtype=dtype, device=learner.world.device)
    with learner.running.ignored_pass():
        with learner.autocast():
            nothing = learner.exchange.net(images).sum() * 0
        nothing.backward()
    learner.optimizer.zero_grad(set_to_none=True)
