"""Compare runs with the paper's published results."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from largebatch.reports.selection import Group
from largebatch.reports.statistics import BAND, Spread

TABLES = ("table1", "table2a", "table2b", "table2c", "figure1")
# What every published row has in common, as settings of an experiment.
RECIPE = {"dataset.name": "imagenet", "n": 32, "epochs": 90, "optimizer.name": "sgd", "schedule.name": "step"}


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        what: What the paper calls it.
        kn: Samples in a step.
        rate: η̂ after warmup.
        warmup: none, constant or gradual.
        model: resnet50 or resnet101.
        zero_gamma: Whether γ starts at 0 in the last BN of every residual block.
        error: Top-1 validation error in %, mean of five runs; None where it was plotted without a number.
        std: Its standard deviation.
    """

    what: str
    kn: int
    rate: float
    warmup: str
    model: str = "resnet50"
    zero_gamma: bool = True
    error: float | None = None
    std: float | None = None

    @property
    def band(self) -> tuple[float, float] | None:
        """Mean ± 2 std, the error bars of Figure 1."""
        if self.error is None or self.std is None:
            return None
        return self.error - BAND * self.std, self.error + BAND * self.std

    def is_of(self, group: Group) -> bool:
        """Whether a group of runs is this experiment."""
        wanted: Mapping[str, Any] = {
            **RECIPE,
            "model.name": self.model,
            "warmup.name": self.warmup,
            "model.zero_gamma": self.zero_gamma,
            "pitfall": "none",
        }
        return (
            all(group.settings.get(key) == value for key, value in wanted.items())
            and group.minibatch == self.kn
            and math.isclose(group.reference_rate, self.rate, rel_tol=1e-9)
        )


@dataclass(frozen=True)
class Table:
    """A published table or figure."""

    name: str
    title: str
    rows: tuple[Published, ...]
    note: str = ""


@cache
def published(name: str) -> Table:
    """Return one of :data:`TABLES`."""
    text = resources.files("largebatch.reports").joinpath("published.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)[name]
    rows = tuple(Published(**row) for row in values["rows"])
    return Table(name, values["title"], rows, values.get("note", ""))


@dataclass(frozen=True)
class RunTime:
    """A published time of an iteration of kn samples, in s, as it follows from ``what`` the text says."""

    kn: int
    seconds: float
    what: str


@cache
def run_times() -> tuple[RunTime, ...]:
    """Return the times that the paper's text has, of ResNet-50 on kn/32 GPUs."""
    text = resources.files("largebatch.reports").joinpath("published.toml").read_text(encoding="utf-8")
    return tuple(RunTime(**row) for row in tomllib.loads(text)["run_time"]["rows"])


@dataclass(frozen=True)
class Beside:
    """A published row and a group of ours that is the same experiment, or None."""

    row: Published
    group: Group | None = None

    @property
    def ours(self) -> Spread | None:
        """Our finished runs; None where there are none."""
        return Spread.of(self.group.errors) if self.group and self.group.errors else None

    @property
    def within(self) -> bool | None:
        """Whether our mean lies within the published band; None where there is nothing to compare."""
        if self.ours is None or self.row.band is None:
            return None
        low, high = self.row.band
        return low <= self.ours.mean <= high


def beside(table: Table, groups: Sequence[Group]) -> list[Beside]:
    """Return every published row with each group of ours that is its experiment, or alone."""
    rows = []
    for row in table.rows:
        rows += [Beside(row, group) for group in groups if row.is_of(group)] or [Beside(row)]
    return rows
