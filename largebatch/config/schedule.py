"""The learning rate of every iteration: linear scaling rule, warmup, decay (Goyal et al., 2017, section 2)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from largebatch.config.pitfalls import PitfallConfig

RATE_GROUPS = ("lr", "warmup", "schedule")  # of the configuration: they decide the rates, and nothing else
SCALINGS = ("linear", "sqrt", "none")


def reference_rate(base: float, minibatch: int, base_minibatch: int, scaling: str) -> float:
    """Return η̂ for a minibatch of kn samples.

    Args:
        base: η, the rate that suits ``base_minibatch`` samples.
        minibatch: kn, samples in one step.
        base_minibatch: samples in one step of the baseline.
        scaling: ``linear`` (η̂ = η · kn / base_minibatch), ``sqrt`` (its square root) or ``none`` (η̂ = η).
    """
    ratio = minibatch / base_minibatch
    return base * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]


@dataclass(frozen=True)
class RateSchedule:
    """Rates by iteration; all lengths are in iterations.

    Attributes:
        base: η, where a warmup starts.
        reference: η̂, where it ends.
        warmup: ``none``, ``constant`` (η until it ends) or ``gradual`` (a constant increment an iteration);
            the pitfalls ``staircase`` (gradual, but an increment an epoch) and ``from_zero`` (gradual from 0).
        iterations_per_epoch: the width of a staircase's steps.
        warmup_iterations: its length.
        decay: ``step`` or ``cosine``.
        milestone_iterations: where ``step`` multiplies by ``factor``.
        factor: the decay of a step.
        total_iterations: the schedule's length, where ``cosine`` reaches 0.
    """

    base: float
    reference: float
    warmup: str
    iterations_per_epoch: int
    warmup_iterations: int
    decay: str
    milestone_iterations: tuple[int, ...]
    factor: float
    total_iterations: int

    @property
    def warming(self) -> int:
        """Iterations of warmup that take place: none where the reference rate is not above η (section 5.1)."""
        return self.warmup_iterations if self.warmup != "none" and self.reference > self.base else 0

    def rate_at(self, iteration: int) -> float:
        """Return the rate of ``iteration``, counted from 0 over the whole run.

        Gradual warmup uses η at iteration 0 and η̂ from iteration ``warmup_iterations`` on.
        """
        if iteration < self.warming:
            if self.warmup == "constant":
                return self.base
            if self.warmup == "staircase":
                iteration -= iteration % self.iterations_per_epoch
            start = 0.0 if self.warmup == "from_zero" else self.base
            return start + (self.reference - start) * (iteration / self.warming)
        if self.decay == "cosine":
            # From the warmup's end, so that the rate does not jump there.
            done = (iteration - self.warming) / max(1, self.total_iterations - self.warming)
            return self.reference * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.reference * self.factor ** bisect_right(self.milestone_iterations, iteration)

    def changes(self) -> tuple[tuple[int, float], ...]:
        """Return (iteration, rate) at the start and wherever the rate changes: equal for equal rates, however named."""
        if self.decay == "cosine":
            places: Iterable[int] = range(self.total_iterations)
        else:  # constant between a warmup and the milestones
            places = sorted({*range(self.warming + 1), *self.milestone_iterations})
        found: list[tuple[int, float]] = []
        for at in places:
            rate = self.rate_at(at)
            if at < self.total_iterations and not (found and found[-1][1] == rate):
                found.append((at, rate))
        return tuple(found)

    def notes(self) -> list[str]:
        """Return what of the schedule does not take place, or not as its epochs suggest: a sentence each."""
        found = []
        if self.warmup != "none" and self.reference > self.base and not self.warming:
            found.append(
                f"the {self.warmup} warmup does not take place: it is shorter than half an iteration, and an epoch has "
                f"{self.iterations_per_epoch}"
            )
        if self.decay == "step":
            if 0 in self.milestone_iterations:
                found.append("a milestone falls on iteration 0: the rate is decayed from the start")
            for at in sorted({at for at in self.milestone_iterations if self.milestone_iterations.count(at) > 1}):
                found.append(f"several milestones fall on iteration {at}: the rate is decayed by all of them at once")
        return found

    def turning_points(self) -> list[tuple[int, str]]:
        """Return (iteration, what happens there) for the start, the warmup's end, each decay and the end."""
        points = [(0, "start")]
        if self.warming:
            points.append((self.warming, "after warmup"))
        if self.decay == "step":
            points += [(at, f"× {self.factor:g}") for at in self.milestone_iterations]
        else:
            points.append((self.warming + (self.total_iterations - self.warming) // 2, "half-way"))
        points.append((self.total_iterations - 1, "last"))
        return sorted(points, key=lambda point: point[0])


def schedule_of(settings: Mapping[str, Any], iterations_per_epoch: int) -> RateSchedule:
    """Return the schedule of an experiment, as :meth:`Config.rates` does of a configuration.

    Args:
        settings: What defines the experiment, under dotted keys.
        iterations_per_epoch: Whole minibatches in the training set.
    """
    base, pitfall = settings["lr.base"], PitfallConfig(settings["pitfall"])
    minibatch = settings["k"] * settings["n"]
    reference = reference_rate(base, minibatch, settings["lr.base_minibatch"], settings["lr.scaling"])
    scale = pitfall.loss_scale(base, reference)
    return RateSchedule(
        base=base / scale,
        reference=reference / scale,
        warmup=pitfall.warmup(settings["warmup.name"]),
        iterations_per_epoch=iterations_per_epoch,
        warmup_iterations=round(settings["warmup.epochs"] * iterations_per_epoch),
        decay=settings["schedule.name"],
        milestone_iterations=tuple(round(epoch * iterations_per_epoch) for epoch in settings["schedule.milestones"]),
        factor=settings["schedule.factor"],
        total_iterations=settings["epochs"] * iterations_per_epoch,
    )
