"""Well-known mistakes that can be made on purpose: their names, and what each does."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import one_of

PITFALLS = {
    "none": "the paper's recipe, without a mistake",
    "scale_loss": "the cross-entropy is scaled up instead of the rate, so weight decay is not (remark 1)",
    "absorb_rate": "momentum absorbs the rate, v ← m v + η g, without correction when η changes (remark 2)",
    "absorb_rate_corrected": "momentum absorbs the rate, with correction: the recipe up to rounding (remark 2)",
    "normalize_by_n": "gradients are normalised by n a worker and then summed, not by kn (remark 3)",
    "independent_shuffle": "each worker shuffles for itself: some samples come twice, some never (remark 4)",
    "sync_bn": "BatchNorm takes its statistics over all kn samples",
    "decay_bn": "weight decay on γ and β of BatchNorm",
    "gamma_one": "γ = 1 in the last BN of every residual block",
    "per_epoch_warmup": "the warmup's rate rises once an epoch, not every iteration",
    "warmup_from_zero": "the warmup starts at a rate of 0, not at η",
    "padded_eval": "validation repeats samples until k divides their number, and counts them",
}


@dataclass(frozen=True)
class PitfallConfig:
    """One well-known mistake made on purpose, or none; see ``PITFALLS`` for what each does."""

    name: str

    def __post_init__(self) -> None:
        one_of("pitfall", self.name, tuple(PITFALLS))
