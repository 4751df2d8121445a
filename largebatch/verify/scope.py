"""Decide what certify compares: the experiment with its schedule compressed, and every placement of its workers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors
from largebatch.config.groups import CertifyConfig, DatasetConfig
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.source import sizes_of
from largebatch.models import build_model
from largebatch.models.build import channels_of
from largebatch.runtime.placement import Hardware, Placement, processes_for
from largebatch.training.learner import DTYPES, autocast

# float64 runs free: rounding stays below this over the iterations. float32 and bf16 drift apart by themselves, so
# there every iteration starts from the definition's weights, and one step's difference is bounded.
TOLERANCES = {"fp64": 1e-10, "fp32": 2e-3, "tf32": 2e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Plan:
    """Scope of a certificate: the reduced configuration, the processes, and the changes that make it fit."""

    config: Config
    iterations: int
    tolerance: float
    free: bool
    changes: tuple[str, ...]


def make_plan(config: Config, placement: Placement, asked: CertifyConfig) -> Plan:
    """Compress an experiment so that warmup and a decay take place within a few iterations.

    Args:
        config: The experiment.
        placement: Where it would run; decides the precision, and so the tolerance.
        asked: How many steps are compared, and how closely.

    Raises:
        UserError: an optimizer without a definition by hand.
    """
    if config.optimizer.name != "sgd":
        raise UserError(
            f"optimizer={config.optimizer.name} has no definition in the paper to be held against: certify takes "
            "optimizer=sgd."
        )
    iterations, changes = asked.iterations, []
    dataset = config.dataset
    if sets.locate(dataset).startswith("not found"):
        dataset = _synthetic(dataset)
        changes.append(
            f"dataset={config.dataset.name} was not found: synthetic images of {dataset.channels}×{dataset.height}×"
            f"{dataset.width} instead"
        )
    train_images = dataset.trained_images or sizes_of(dataset).train_images
    config.check_size(train_images)
    per_epoch = train_images // config.minibatch
    warmup, decay = iterations // 2, iterations - max(1, iterations // 3)
    epochs = iterations // per_epoch + 1
    changed = replace(
        config,
        dataset=dataset,
        epochs=epochs,
        iterations=None,
        lr=replace(config.lr, base_minibatch=config.n),
        warmup=replace(config.warmup, epochs=warmup / per_epoch),
        schedule=replace(config.schedule, milestones=(decay / per_epoch,)),
    )
    changes.append(f"lr.base_minibatch={config.n}, so that the rates of k={config.k} workers are scaled by k")
    changes.append(f"schedule compressed: warmup over {warmup} iterations, decay at iteration {decay + 1}")
    # With a tree over powers of two everything is added in one order: nothing may differ by a bit.
    bits = config.exact and config.n & (config.n - 1) == 0
    default = 0.0 if bits and config.bn.running == "worker0" else TOLERANCES[placement.precision]
    free = bits or placement.precision == "fp64"
    tolerance = default if asked.tolerance is None else asked.tolerance
    return Plan(changed, iterations, tolerance, free, tuple(changes))


def prepare(
    config: Config, placement: Placement, asked: CertifyConfig, machine: Hardware
) -> tuple[Plan, list[Placement]]:
    """Decide what is certified and where, within the time that is allowed.

    Args:
        config: The experiment.
        placement: Where it would run.
        asked: Steps, processes, tolerance and minutes.
        machine: What processes can be started on.

    Raises:
        UserError: see :func:`make_plan` and :func:`processes_for`.
    """
    plan = make_plan(config, placement, asked)
    processes = processes_for(asked, config.k, machine, placement.device)
    places = placements(placement, plan.config, processes, machine.cores)
    smaller, change = fit_to_time(plan.config, placement, asked, len(places))
    if not change:
        return plan, places
    plan = make_plan(replace(config, k=smaller.k, processes=None, workers_per_pass=None), placement, asked)
    fitting = [number for number in processes if smaller.k % number == 0]
    return (
        replace(plan, changes=(change, *plan.changes)),
        placements(placement, plan.config, fitting, machine.cores),
    )


def fit_to_time(config: Config, placement: Placement, asked: CertifyConfig, topologies: int) -> tuple[Config, str]:
    """Reduce k where the definition and the trainer would take too long, and say so.

    Args:
        config: The experiment.
        placement: Device and precision of a pass.
        asked: The minutes allowed.
        topologies: How many placements the trainer is followed on.

    Returns:
        The configuration, with the largest divisor of k that fits (4 or more where k has one), and a sentence, empty
        where nothing was changed.
    """
    passes = asked.iterations * (1 + topologies)
    seconds = _time_of_a_pass(config, placement)
    if seconds * passes * config.k <= asked.minutes * 60:
        return config, ""
    fitting = [d for d in divisors(config.k) if seconds * passes * d <= asked.minutes * 60]
    k = max([*fitting, *(d for d in divisors(config.k) if d <= 4)])
    if k == config.k:
        return config, f"this takes about {seconds * passes * k / 60:.0f} minutes here"
    return replace(config, k=k, processes=None, workers_per_pass=None), (
        f"k={config.k} would take about {seconds * passes * config.k / 3600:.1f} hours here: k={k} instead, with the "
        f"same n={config.n}; certify.minutes={asked.minutes:g} is the limit"
    )


def _time_of_a_pass(config: Config, placement: Placement) -> float:
    """Return the seconds of one worker's forward and backward pass, the second of two."""
    device, dtype = torch.device(placement.device), DTYPES[placement.precision]
    sizes = sizes_of(config.dataset)
    model = build_model(config.model, sizes.classes, channels_of(sizes.sample.shape)).to(device, dtype).train()
    kind = dtype if sizes.sample.is_floating_point() else sizes.sample.dtype
    images = torch.zeros((config.n, *sizes.sample.shape), device=device, dtype=kind)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with autocast(placement):
            total = model(images).sum()
        total.backward()
        total.item()  # waits for a GPU
        seconds = time.perf_counter() - started
    return seconds


def _synthetic(dataset: DatasetConfig) -> DatasetConfig:
    return replace(
        dataset,
        name="synthetic",
        root=None,
        decoder="none",
        crop="pad",
        pad=min(4, dataset.height // 8),
        flip=True,
        resize=None,
        train_images=dataset.train_images or 50_000,
        val_images=500,
        classes=dataset.classes or 1000,
    )


def placements(placement: Placement, config: Config, allowed: Iterable[int], cores: int) -> list[Placement]:
    """Return every placement to certify: each P that divides k, each workers_per_pass that divides k/P."""
    result = []
    for processes in allowed:
        workers = config.k // processes
        for per_pass in divisors(workers):
            if (config.exact and per_pass > 1) or (config.pitfall.one_pass and (per_pass < config.k or processes > 1)):
                continue
            threads = placement.threads if config.exact or config.threads else max(1, cores // processes)
            where = replace(placement, processes=processes, workers=workers, workers_per_pass=per_pass)
            result.append(replace(where, threads=threads, cores=max(1, cores // processes)))
    return result
