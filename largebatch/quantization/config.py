"""What ``largebatch quantize`` is asked. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.files import UserPath

ENGINES = ("auto", "reference", "x86", "onnxruntime", "cuda")
CALIBRATIONS = ("minmax", "percentile", "mse")
GRANULARITIES = ("per_channel", "per_tensor")
REDUCTIONS = ("auto", "true", "false")
FORMATS = ("onnx",)


@dataclass(frozen=True)
class QuantizeConfig:
    """How a network becomes integers.

    One of ``run`` (a run's directory, with ``weights`` last, best or a file) and ``state_file`` (safetensors, for the
    composed model) says which. ``calibration`` chooses the ranges of activations from ``images`` training images.
    ``granularity`` gives every output channel of a weight a scale of its own, or all of them one; ``bits`` is the width
    of weights and activations. ``engine`` computes what is reported. ``reduce_range`` keeps sums of neighbouring
    products within 16 bits, which processors without VNNI need; auto: where this one does. ``report`` evaluates before
    and after; ``max_drop`` keeps layers in floats until top-1 falls by no more points than that. Where neither says
    what is lost, a network is refused whose logits are less than ``min_db`` decibels above their change.
    ``allow_float`` takes a network of which less than half is in integers, or that is more than half as large.
    ``export`` also writes the network for other programs. ``out`` is where it is written: null, ``quantized`` in the
    run's directory.
    """

    run: UserPath | None
    state_file: UserPath | None
    weights: UserPath
    calibration: str
    images: int
    granularity: str
    bits: int
    engine: str
    reduce_range: bool | str
    report: bool
    max_drop: float | None
    min_db: float
    allow_float: bool
    export: str | None
    out: UserPath | None

    def __post_init__(self) -> None:
        one_of("calibration", self.calibration, CALIBRATIONS)
        one_of("granularity", self.granularity, GRANULARITIES)
        one_of("engine", self.engine, ENGINES)
        one_of("reduce_range", str(self.reduce_range).lower(), REDUCTIONS)
        at_least("images", self.images, 1)
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits={self.bits} is not possible: integers have 2 to 8 bits.")
        if self.export is not None:
            one_of("export", self.export, FORMATS)
        if self.max_drop is not None and not self.max_drop >= 0:
            raise UserError(f"max_drop={self.max_drop} is not a number of points: it takes 0 or more, such as 0.3.")
        if bool(self.run) == bool(self.state_file):
            given = "both were given" if self.run else "nothing was named to quantize"
            raise UserError(
                f"{given}: it takes one of run=DIR (a recorded run) and state_file=FILE.safetensors (with model=… and "
                "dataset=…)."
            )
        if self.state_file and not self.out:
            raise UserError("state_file= belongs to no run: say where the integers are written with out=DIRECTORY.")

    def reduces(self, needed: Callable[[], bool]) -> bool:
        """Return whether weights are kept from overflowing 16 bits; ``needed`` says what auto comes to here."""
        wanted = str(self.reduce_range).lower()
        return needed() if wanted == "auto" else wanted == "true"
