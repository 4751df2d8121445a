"""One large step, ours and a tutorial's."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from largebatch.bench.compare import Side, Timings, take_turns
from largebatch.config.groups import DatasetConfig
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.source import Batch, Source
from largebatch.data.stream import SampleStream
from largebatch.models import build_model
from largebatch.runtime.placement import Placement
from largebatch.training.cuda_graph import GraphedStep
from largebatch.training.learner import DTYPES, Learner, make_learner, open_data, start
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import make_step

# The rate of every step here: weights stay, so that all steps do the same arithmetic, and it is the optimizer's
# whole work all the same.
RATE = 0.0
MEMORY_STEPS = 3


@dataclass
class Ours:
    """The product's step: the first iteration of a run, again and again, crops drawn and cut each time."""

    learner: Learner
    source: Source
    stream: SampleStream  # kept, as in a run: it shuffles once an epoch
    make_step: Callable[[Iterator[Batch], int], Tensor]

    def batches(self) -> list[Batch]:
        """Return the images of the step as the k workers see them."""
        return list(self._passes())

    def step(self) -> None:
        """Make one step of kn samples."""
        set_rate(self.learner.optimizer, RATE)
        self.make_step(self._passes(), 0)

    def warm_up(self) -> None:
        """Make the ordinary steps before a recorded one, and record it: what is timed afterwards is repeated."""
        while isinstance(self.make_step, GraphedStep) and not self.make_step.recorded:
            self.step()

    def _passes(self) -> Iterator[Batch]:
        place = self.learner.placement
        return self.source.train(self.stream.passes(0, 1, 0, place.workers, place.workers_per_pass))


@dataclass
class Plain:
    """A PyTorch loop as a tutorial writes it, over images that lie ready on the device."""

    model: nn.Module
    optimizer: Optimizer
    batches: list[tuple[Tensor, Tensor]]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    def step(self) -> None:
        """Make one step over all batches, whose gradients are averaged."""
        self.optimizer.zero_grad()
        for images, labels in self.batches:
            with self.autocast():
                loss = F.cross_entropy(self.model(images), labels) / len(self.batches)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def make_ours(config: Config, placement: Placement) -> Ours:
    """Make the product's side.

    Raises:
        UserError: the data are missing, or smaller than the minibatch.
    """
    world = start(config, placement)
    source = open_data(config, placement, world)
    config.check_size(source.train_images)
    stream = sample_stream(config, source.train_images)
    learner = make_learner(config, placement, world, source.classes, source.sample)
    return Ours(learner, source, stream, make_step(learner))


def make_plain(ours: Ours, samples: int, compiled: bool | None = None) -> Plain:
    """Make a tutorial's side with the weights and the images of ours.

    Args:
        ours: Whose weights, images, precision and memory format are taken.
        samples: In a forward pass, and so in a BatchNorm's statistics: n for gradient accumulation in
            micro-batches of n, kn for one pass with one group.
        compiled: Whether its network is; None: as ours.
    """
    learner, config = ours.learner, ours.learner.config
    model = build_model(config.model, ours.source.classes, config.dataset.channels)
    model.load_state_dict(learner.model.state_dict())
    model.to(learner.world.device, DTYPES[learner.placement.precision]).train()
    if learner.placement.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile if compiled is None else compiled:
        model.compile()
    update = config.optimizer
    optimizer = SGD(
        model.parameters(),
        lr=RATE,
        momentum=update.momentum,
        nesterov=update.nesterov,
        weight_decay=update.weight_decay,
    )
    batches = ours.batches()
    images, labels = (torch.cat(parts) for parts in zip(*((b.images, b.labels) for b in batches), strict=True))
    pairs = list(zip(torch.split(images, samples), torch.split(labels, samples), strict=True))
    return Plain(model, optimizer, pairs, learner.autocast)


def step_data(dataset: DatasetConfig) -> DatasetConfig:
    """Return the set itself where it lies in memory, and made-up images of its shape for image folders."""
    if sets.in_memory(dataset):
        return dataset
    return replace(
        dataset,
        name="synthetic",
        crop="none",
        train_images=dataset.train_images or 50_000,
        val_images=dataset.val_images or 1000,
        classes=dataset.classes or 1000,
    )


def time_against_plain(config: Config, placement: Placement, repeats: int, iterations: int) -> Timings:
    """Time our step in turn with two plain loops over the same images.

    Returns:
        Sides ``ours``, ``accumulation`` (micro-batches of n, whose BatchNorms see what ours see) and ``one_group``
        (one pass over kn samples, as torchvision's reference does).
    """
    ours = make_ours(config, placement)
    ours.warm_up()
    sides = {
        "ours": ours.step,
        "accumulation": make_plain(ours, config.n).step,
        "one_group": make_plain(ours, config.minibatch).step,
    }
    turns = {name: side(step, iterations, config.minibatch, ours) for name, step in sides.items()}
    return take_turns(turns, repeats, "step against a plain loop")


def time_workers(runs: Mapping[int, tuple[Config, Placement]], repeats: int, iterations: int) -> Timings:
    """Time our step at several k in turn, as many steps of each as make up about the same number of images.

    Returns:
        Sides ``k8`` and so on.
    """
    turns = {}
    for k, (config, placement) in runs.items():
        ours = make_ours(config, placement)
        ours.warm_up()
        turns[f"k{k}"] = side(ours.step, iterations * max(1, max(runs) // k), config.minibatch, ours)
    return take_turns(turns, repeats, "step at each k")


def side(step: Callable[[], None], steps: int, minibatch: int, ours: Ours) -> Side:
    """Return turns of so many steps of ``minibatch`` images, on the device of ``ours``."""

    def turn() -> None:
        for _ in range(steps):
            step()
        if ours.learner.world.device.type != "cpu":
            torch.accelerator.synchronize()

    return Side(turn, steps * minibatch)


def peak_memory(config: Config, placement: Placement) -> int:
    """Return the bytes that steps add to a process's memory, measured in a process of its own.

    On CUDA the peak of what PyTorch allocated, elsewhere the growth of the resident set's peak from just before
    the first step to after the third.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory, config, placement).result()


def _peak_memory(config: Config, placement: Placement) -> int:
    ours = make_ours(config, placement)
    before = _peak_bytes(ours.learner.world.device)
    for _ in range(MEMORY_STEPS):
        ours.step()
    return _peak_bytes(ours.learner.world.device) - before


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
