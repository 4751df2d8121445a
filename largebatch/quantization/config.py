"""Configure ``largebatch quantize``. Nothing here imports torch."""

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
    """Configuration of a quantization.

    Attributes:
        run: Directory of a recorded run.
        state_file: Weights in safetensors, for model=… and dataset=…, without a run.
        weights: Weights of a run: last, best, or a file of safetensors.
        calibration: Ranges of activations: minmax (all observed values), percentile (without 0.01 % at either end) or
            mse (least squared error).
        images: Training images for calibration: more than a few hundred change little, and take no more memory.
        granularity: Scales of weights: per_channel or per_tensor.
        bits: Width of weights and activations, 2 to 8.
        engine: Engine of the integers: auto (cuda on a GPU, x86 on a processor with AVX2, otherwise reference, which is
            exact and slow), reference, x86, onnxruntime or cuda.
        reduce_range: Limit weights so that sums fit into 16 bits, as x86 without VNNI needs, where sums saturate
            silently: auto (if this processor saturates), true (safe on any machine, with slightly less range for
            weights that could overflow) or false.
        report: Evaluate before and after, layer by layer, and measure speed.
        max_drop: Keep layers in floats, worst first, until top-1 falls by no more points than this.
        min_db: Without report and max_drop: smallest ratio of logits to their change in decibels; 8 bits usually reach
            30.
        allow_float: Accept a network most of which stays in floats. Otherwise, if less than half of the multiplications
            are in integers or more than half of the bytes remain, nothing is written, and the exit status is 1.
        export: onnx: also write network.onnx.
        out: Output directory. Null: quantized/ in the run's directory.
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
            raise UserError("state_file= belongs to no run: give the output directory with out=DIRECTORY.")

    def reduces(self, needed: Callable[[], bool]) -> bool:
        """Return whether weights are kept from overflowing 16 bits; ``needed`` says what auto comes to here."""
        wanted = str(self.reduce_range).lower()
        return needed() if wanted == "auto" else wanted == "true"
