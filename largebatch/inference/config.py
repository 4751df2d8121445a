"""Configure ``largebatch eval``. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.files import UserPath
from largebatch.base.numbers import byte_count
from largebatch.quantization.config import ENGINES

MODES = ("none", "submodule", "model")
GROUPS = ("bytes", "leaf", "blocks")


@dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation, and of the memory of its weights.

    Attributes:
        run: Directory of a recorded run.
        runs: Directories and globs of runs: an ensemble.
        state_file: Weights of your own in safetensors, for model=… and dataset=…, without a run; nothing is unpickled.
        weights: Weights of a run: last, best, or a file of safetensors.
        offload: none (all weights on the device), submodule (a few layers at a time) or model (whole networks take
            turns).
        budget: Limit of the weights on the device: 200MB, 1.5GiB, bytes. Null: as few as the mode needs.
        groups: Weights that are copied together: bytes (neighbouring layers of equal bytes), leaf (layers) or blocks.
        prefetch: Copy the next weights while these compute; false takes less memory, and the device waits.
        batches_per_load: Batches that share an upload with offload=submodule: fewer copies, more memory for
            activations.
        fold_bn: Fold BatchNorm into the convolutions.
        batch: Images per pass: fewer take less memory for activations. Null: 256, as in training.
        combine: Outputs that an ensemble averages: probabilities or logits.
        compare: Evaluate with and without offloading in turns, and print the ratio of their times.
        plan: Evaluate nothing: predict memory, bytes moved and time of every mode.
        quantized: Evaluate the integers that `largebatch quantize` made of the run; with offload= they are copied as
            bytes, a quarter of the weights.
        engine: Engine of the integers: auto, reference, x86, onnxruntime or cuda.
    """

    run: UserPath | None
    runs: tuple[UserPath, ...]
    state_file: UserPath | None
    weights: UserPath
    offload: str
    budget: str | None
    groups: str
    prefetch: bool
    batches_per_load: int
    fold_bn: bool
    batch: int | None
    combine: str
    compare: bool
    plan: bool
    quantized: bool = False
    engine: str = "auto"

    @classmethod
    def of(cls, run: str | None, state_file: str | None, weights: str) -> EvalConfig:
        """Return a plain evaluation of one network."""
        return cls(
            run=run,
            runs=(),
            state_file=state_file,
            weights=weights,
            offload="none",
            budget=None,
            groups="bytes",
            prefetch=True,
            batches_per_load=1,
            fold_bn=False,
            batch=None,
            combine="probabilities",
            compare=False,
            plan=False,
        )

    def __post_init__(self) -> None:
        one_of("offload", self.offload, MODES)
        one_of("groups", self.groups, GROUPS)
        one_of("engine", self.engine, ENGINES)
        one_of("combine", self.combine, ("probabilities", "logits"))
        at_least("batch", self.batch, 1)
        at_least("batches_per_load", self.batches_per_load, 1)
        if self.quantized and (self.fold_bn or self.state_file):
            other = "fold_bn=true: in integers BatchNorm is folded already" if self.fold_bn else "state_file="
            raise UserError(f"quantized=true is of recorded runs, and cannot be given with {other}.")
        if self.engine != "auto" and not self.quantized:
            raise UserError(f"engine={self.engine} computes integers: it goes with quantized=true.")
        if self.engine not in ("auto", "reference") and self.offload != "none":
            raise UserError(
                f"engine={self.engine} has its weights where it wants them: with offload={self.offload} take "
                "engine=reference."
            )
        asked = [key for key in ("run", "runs", "state_file") if getattr(self, key)]
        if len(asked) != 1:
            given = f"{' and '.join(asked)} were given together" if asked else "nothing was named to evaluate"
            raise UserError(
                f"{given}: it takes one of run=DIR (a recorded run), runs=DIR1,DIR2 (an ensemble of runs) and "
                "state_file=FILE.safetensors (with model=… and dataset=…)."
            )
        if self.state_file and self.weights != "last":
            raise UserError("weights= selects a run's weights, and state_file= has its own: leave weights= out.")
        if self.budget_bytes and self.offload == "none" and not self.plan:
            raise UserError(
                "budget= bounds what offloading has on the device: it takes offload=submodule, offload=model, or "
                "plan=true, which says which to choose."
            )
        if self.compare and self.offload == "none":
            raise UserError("compare=true times a way of offloading against none: add offload=submodule or model.")

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of weights that may be on the device at once; None: as few as the mode needs."""
        return None if self.budget is None else byte_count("budget", self.budget)
