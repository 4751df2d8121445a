"""Configure ``largebatch bench``: measurements and repetitions. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.config.groups import DatasetConfig

# Plain loops, and our step as it is, with PyTorch's BatchNorm, compiled, as a CUDA graph, and worker by worker.
SIDES = (
    *("plain", "plain_compiled", "dataloader"),
    *("ours", "separate", "compiled", "graphs", "micro", "micro_graphs"),
)
PARTS = ("step", "loader")  # of all
WHAT = (*PARTS, "exchange", "checkpoint", "offload", "quantize", "profile", "data", "all")


@dataclass(frozen=True)
class BenchConfig:
    """Measurements and their repetitions.

    Attributes:
        what: step, loader, exchange, checkpoint, offload, quantize, profile, data, or all for the first two.
        k: Numbers of workers: the first is compared with plain loops, each of the others with the first.
        repeats: Turns of each side.
        iterations: Steps per turn.
        photographs: JPEGs that are generated if files.root is not given.
        files: Images on disk, as dataset.
        batches: Images per pass of offload and quantize.
        sides: Variants of the step on a GPU. Null: all that exist there.
    """

    what: str
    k: tuple[int, ...]
    repeats: int
    iterations: int
    photographs: int
    files: DatasetConfig
    batches: tuple[int, ...]
    sides: tuple[str, ...] | None

    def __post_init__(self) -> None:
        one_of("bench.what", self.what, WHAT)
        if not self.k:
            raise UserError("bench.k=[] is empty: give numbers of workers, such as [8,64].")
        if len(set(self.k)) < len(self.k):
            raise UserError(f"bench.k={list(self.k)} names a number twice: each is compared with the first.")
        for key in ("repeats", "iterations"):
            at_least(f"bench.{key}", getattr(self, key), 1)
        at_least("bench.photographs", self.photographs, 32)
        for workers in self.k:
            at_least("bench.k", workers, 1)
        if not self.batches:
            raise UserError("bench.batches=[] is empty: give numbers of images, such as [8,32,256].")
        for images in self.batches:
            at_least("bench.batches", images, 1)

        for name in self.sides or ():
            one_of("bench.sides", name, SIDES)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the measurements, in order."""
        return PARTS if self.what == "all" else (self.what,)
