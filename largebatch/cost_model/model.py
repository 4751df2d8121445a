"""The time of an iteration, an epoch and a run of k workers on p GPUs, split into what it goes to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors, listed
from largebatch.cost_model.allreduce import exchange
from largebatch.cost_model.profile import Profile
from largebatch.cost_model.stragglers import measured_maximum, normal_maximum

MOST_GPUS = 65_536


@dataclass(frozen=True)
class Question:
    """Options of a prediction besides k and the GPUs.

    ``epochs`` of training, each with a validation; ``algorithm`` between nodes; ``stragglers`` are of a normal
    distribution with the measured mean and spread, of the measured steps themselves, or none.
    """

    epochs: int = 90
    algorithm: str = "fastest"
    stragglers: str = "normal"


@dataclass(frozen=True)
class Prediction:
    """One iteration in seconds, as a sum of four, and what follows from it.

    Attributes:
        k: Workers.
        n: Samples of each.
        gpus: That share them.
        nodes: That the GPUs are spread over.
        computing: Of the mean GPU: its passes and the update.
        exchange: What is not hidden behind back-propagation.
        stragglers: Waiting for the slowest GPU.
        loading: Waiting for images.
        exchange_hidden: What is hidden, beside the sum.
        iterations: In an epoch.
        validation: Seconds of one, an epoch.
        epochs: Of the run.
    """

    k: int
    n: int
    gpus: int
    nodes: int
    computing: float
    exchange: float
    stragglers: float
    loading: float
    exchange_hidden: float
    iterations: int
    validation: float
    epochs: int

    @property
    def iteration(self) -> float:
        """Seconds of an iteration."""
        return self.computing + self.exchange + self.stragglers + self.loading

    @property
    def epoch(self) -> float:
        """Seconds of an epoch of training, without its validation."""
        return self.iterations * self.iteration

    @property
    def run(self) -> float:
        """Seconds of all epochs with their validations; starting, checkpoints and restarts are not counted."""
        return self.epochs * (self.epoch + self.validation)

    @property
    def images_per_second(self) -> float:
        """Training images, over all GPUs."""
        return self.k * self.n / self.iteration

    @property
    def efficiency(self) -> float:
        """Share of an iteration in which the mean GPU computes: images/s over p times those of a GPU left alone."""
        return self.computing / self.iteration

    @property
    def gpu_hours(self) -> float:
        """Of the run, over all GPUs."""
        return self.gpus * self.run / 3600


def nodes_for(gpus: int, per_node: int) -> int:
    """Return the fewest nodes that hold the GPUs, as many on each."""
    return next(nodes for nodes in divisors(gpus) if gpus <= nodes * per_node)


def predict(profile: Profile, question: Question, k: int, gpus: int, nodes: int | None = None) -> Prediction:
    """Return what an iteration takes.

    Args:
        profile: Of the machine and the network.
        question: What else decides.
        k: Workers.
        gpus: A divisor of k: each has k/gpus workers, and computes as many at once as were measured and divide that.
        nodes: A divisor of gpus; None for as few as hold them.

    Raises:
        UserError: these numbers do not go together, or the profile has no link that they need.
    """
    _check(profile, k, gpus, nodes)
    nodes = nodes or nodes_for(gpus, profile.gpus_per_node)
    workers = k // gpus
    one = profile.pass_for(workers)
    passes = workers // one.workers
    computing = 1e-3 * (passes * one.mean_ms + profile.update_ms)
    travel = exchange(profile, gpus, nodes, 1e-3 * one.backward_ms, question.algorithm)
    # Passes are late independently of one another: the spread of their sum grows with its root.
    late = 1e-3 * math.sqrt(passes) * _lateness(one.std_ms, one.steps_ms, gpus, question.stragglers)
    busy = computing + travel.exposed + late
    images = k * profile.n / gpus
    load = images / profile.loading_images_per_second if profile.loading_images_per_second else 0.0
    forward = 1e-3 * (one.mean_ms - one.backward_ms) / (one.workers * profile.n)
    per_image = max(forward, 1 / profile.loading_images_per_second if profile.loading_images_per_second else 0.0)
    return Prediction(
        k=k,
        n=profile.n,
        gpus=gpus,
        nodes=nodes,
        computing=computing,
        exchange=travel.exposed,
        stragglers=late,
        loading=max(0.0, load - busy),
        exchange_hidden=travel.total - travel.exposed,
        iterations=profile.train_images // (k * profile.n),
        validation=per_image * profile.val_images / gpus,
        epochs=question.epochs,
    )


def _lateness(std: float, steps: Sequence[float], gpus: int, how: str) -> float:
    """Return by how much the slowest of the GPUs is later than their mean, in the unit of ``std``."""
    if how == "none":
        return 0.0
    if how == "normal":
        return std * normal_maximum(gpus)
    if not steps:
        raise UserError(
            "stragglers=measured needs the steps that were measured, and this profile has none: use stragglers=normal."
        )
    return measured_maximum(steps, gpus) - fmean(steps)


def _check(profile: Profile, k: int, gpus: int, nodes: int | None) -> None:
    if k * profile.n > profile.train_images:
        raise UserError(
            f"k={k} workers of n={profile.n} take {k * profile.n} samples in an iteration, more than the "
            f"{profile.train_images} training images: use a k of {profile.train_images // profile.n} or less."
        )
    if k % gpus:
        raise UserError(f"gpus={gpus} does not divide k={k}: a GPU has whole workers. These do: {listed(divisors(k))}.")
    if gpus > MOST_GPUS:
        raise UserError(f"gpus={gpus} is too large: it takes up to {MOST_GPUS}.")
    if nodes is not None and gpus % nodes:
        raise UserError(f"nodes={nodes} does not divide gpus={gpus}. These do: {listed(divisors(gpus))}.")


def fewest(
    profile: Profile, question: Question, k: int, deadline: float, gpus: Iterable[int], nodes: int | None
) -> Prediction:
    """Return the prediction on the fewest of these GPUs that ends within ``deadline`` seconds, or else the fastest.

    More GPUs than are enough are not looked at: the profile may lack the links that they need.

    Args:
        profile: Of the machine and the network.
        question: What else decides.
        k: Workers.
        deadline: For the whole run, in s.
        gpus: What may be used, at least one of them a divisor of k (and, where ``nodes`` is given, a multiple of that).
        nodes: As for :func:`predict`.

    Raises:
        UserError: the profile has no link that the next number of GPUs needs.
    """
    usable = [p for p in sorted(gpus) if k % p == 0 and p <= MOST_GPUS and p % (nodes or 1) == 0]
    tried = []
    for p in usable:
        tried.append(predict(profile, question, k, p, nodes))
        if tried[-1].run <= deadline:
            return tried[-1]
    return min(tried, key=lambda one: one.run)
