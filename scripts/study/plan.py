"""What the study runs: every experiment by name, and the sizes of the whole study and of the quick one.

An experiment ``x`` is ``conf/experiment/x.yaml``; what is said of it here is how its records are found again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "study_64"
HOLDS = 256  # kn that is to match the baseline
LARGE, BEYOND = 512, 1024  # kn at which warmups, rates and starts are compared
MARGIN = 1.0  # points within which two errors count as equal
# What an experiment is unless it says otherwise.
RECIPE: Mapping[str, Any] = {
    "n": 32,
    "warmup.name": "gradual",
    "lr.base": 0.4,
    "lr.scaling": "linear",
    "model.init": "own",
    "model.zero_gamma": True,
    "optimizer.name": "sgd",
}


@dataclass(frozen=True)
class Arm:
    """An experiment: in words, and by the settings in which it differs from the recipe."""

    what: str
    settings: Mapping[str, Any]


def named(kn: int) -> str:
    """Return the name of the experiment of Figure 1 with a minibatch of kn."""
    return f"study_{kn // 1024}k" if kn >= 1024 else f"study_{kn}"


SIZES = tuple(2**power for power in range(6, 14))  # 64 to 8k: beyond, an epoch of 8,192 images has no iteration
PAPER = {"model.init": "paper"}
ARMS: Mapping[str, Arm] = {
    **{named(kn): Arm(f"Figure 1: kn = {kn}" + ", the baseline" * (kn == 64), {"k": kn // 32}) for kn in SIZES},
    "study_512_none": Arm("Table 1: kn = 512 without warmup", {"k": 16, "warmup.name": "none"}),
    "study_512_constant": Arm("Table 1: kn = 512, constant warmup", {"k": 16, "warmup.name": "constant"}),
    "study_1k_none": Arm("Table 1: kn = 1024 without warmup", {"k": 32, "warmup.name": "none"}),
    "study_1k_constant": Arm("Table 1: kn = 1024, constant warmup", {"k": 32, "warmup.name": "constant"}),
    "study_256_half": Arm("Table 2a: kn = 256 at half the reference rate", {"k": 8, "lr.base": 0.2}),
    "study_256_double": Arm("Table 2a: kn = 256 at twice the reference rate", {"k": 8, "lr.base": 0.8}),
    "study_512_half": Arm("Table 2a: kn = 512 at half the reference rate", {"k": 16, "lr.base": 0.2}),
    "study_512_double": Arm("Table 2a: kn = 512 at twice the reference rate", {"k": 16, "lr.base": 0.8}),
    "study_1k_unscaled": Arm("Table 2a: kn = 1024 at the rate of kn = 256", {"k": 32, "lr.scaling": "none"}),
    "study_1k_sqrt": Arm("Table 2a: kn = 1024, the rate scaled by √4 from kn = 256", {"k": 32, "lr.scaling": "sqrt"}),
    "study_256_gamma1": Arm(
        "Table 2b: kn = 256, the paper's starting weights but for γ = 1", {"k": 8, **PAPER, "model.zero_gamma": False}
    ),
    "study_256_gamma0": Arm("Table 2b: kn = 256, the paper's starting weights", {"k": 8, **PAPER}),
    "study_512_gamma1": Arm(
        "Table 2b: kn = 512, the paper's starting weights but for γ = 1", {"k": 16, **PAPER, "model.zero_gamma": False}
    ),
    "study_512_gamma0": Arm("Table 2b: kn = 512, the paper's starting weights", {"k": 16, **PAPER}),
    "study_512_gamma0_none": Arm(
        "Tables 1 and 2b: kn = 512, the paper's starting weights, without warmup",
        {"k": 16, **PAPER, "warmup.name": "none"},
    ),
    "study_512_n8": Arm("Per-worker n: kn = 512 as 64 workers of 8", {"k": 64, "n": 8}),
    "study_512_n128": Arm("Per-worker n: kn = 512 as 4 workers of 128", {"k": 4, "n": 128}),
    "study_4k_lars": Arm("LARS where SGD has broken: kn = 4096", {"k": 128, "optimizer.name": "lars", "lr.base": 4.0}),
}


@dataclass(frozen=True)
class Size:
    """How much of the study is run.

    Attributes:
        arms: Names of experiments; the baseline first.
        seeds: Of every experiment.
        more: Experiments that take further seeds, and these.
        train_images: Images of the training set.
        val_images: Images to validate on.
        epochs: Of every run.
        margin: Of equivalence, in points.
        words: What the experiments' files do not say already.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    more: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
    train_images: int = 8192
    val_images: int = 5000
    epochs: int = 30
    margin: float = MARGIN
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def sweeps(self) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Experiments and the seeds of each of them."""
        return [(self.arms, self.seeds), *([self.more] if self.more[0] else [])]

    def seeds_of(self, name: str) -> list[int]:
        """Return the seeds of one experiment."""
        return [seed for arms, seeds in self.sweeps if name in arms for seed in seeds]

    @property
    def runs(self) -> int:
        """How many runs there are in all."""
        return sum(len(arms) * len(seeds) for arms, seeds in self.sweeps)


FULL = Size(tuple(ARMS), more=(tuple(map(named, (64, 128, 256, 512))), (3, 4)))
QUICK = Size(
    (BASELINE, named(HOLDS), named(BEYOND), f"{named(BEYOND)}_none"),
    more=((named(BEYOND), f"{named(BEYOND)}_none"), (3, 4)),
    epochs=16,
    margin=3.0,  # after so few epochs seeds lie further apart
    words={"epochs": "16", "bn.recompute": "false"},
)
