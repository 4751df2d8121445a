"""Write a prediction as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from largebatch.cost_model.model import Prediction
from largebatch.cost_model.profile import Profile

PARTS = ("computing", "exchange", "stragglers", "loading")


def facts(name: str, profile: Profile, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return stable keys; times are in s, but where the key says ms."""
    return {
        "profile": {
            "name": name,
            **{key: getattr(profile, key) for key in ("device", "model", "images", "precision", "n", "source")},
        },
        "predictions": [row(one) for one in predictions],
    }


def row(one: Prediction) -> dict[str, Any]:
    """Return a prediction with what follows from it."""
    derived = ("iteration", "epoch", "run", "images_per_second", "efficiency", "gpu_hours")
    return {**asdict(one), "minibatch": one.k * one.n, **{key: getattr(one, key) for key in derived}}


def duration(seconds: float) -> str:
    """Return a time as people say it: 0.42 s, 16.3 min, 5.2 h, 3.1 days."""
    for unit, size, above in (("days", 86_400, 48 * 3600), ("h", 3600, 90 * 60), ("min", 60, 90)):
        if seconds >= above:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


HEADS = ("k", "GPUs", "nodes", "iteration", *PARTS, "efficiency", "images/s", "an epoch", "the run", "GPU-hours")


def table(predictions: Sequence[Prediction]) -> list[str]:
    """Return a line for every prediction, under a head; an iteration and its parts in ms."""
    cells: list[tuple[str, ...]] = [HEADS]
    for one in predictions:
        parts = [f"{1000 * getattr(one, part):.4g}" for part in PARTS]
        cells.append(
            (
                *map(str, (one.k, one.gpus, one.nodes)),
                f"{1000 * one.iteration:.4g}",
                *parts,
                f"{100 * one.efficiency:.1f} %",
                f"{one.images_per_second:,.0f}",
                duration(one.epoch),
                duration(one.run),
                f"{one.gpu_hours:,.4g}" if one.gpu_hours < 1000 else f"{one.gpu_hours:,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]


def heading(profile: Profile) -> list[str]:
    """Return what the profile is of."""
    return [f"{profile.model} of {profile.images}, n={profile.n}, {profile.precision}, on {profile.device}"]
