"""Well-known mistakes that can be made on purpose: their names, what each does, and those that change the rate.

Parts of training that a pitfall swaps are in :mod:`largebatch.training.pitfalls`; no other module names one.
"""

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
    """One well-known mistake made on purpose, or none; see ``PITFALLS`` for what each does.

    Attributes:
        name: Of the mistake.
    """

    name: str

    def __post_init__(self) -> None:
        one_of("pitfall", self.name, tuple(PITFALLS))

    @property
    def absorbs_rate(self) -> bool:
        """Whether momentum holds the rate, in a form of SGD of its own."""
        return self.name in ("absorb_rate", "absorb_rate_corrected")

    @property
    def one_pass(self) -> bool:
        """Whether all kn samples must be in one forward pass, for statistics over them."""
        return self.name == "sync_bn"

    def warmup(self, form: str) -> str:
        """Return the form of a warmup, by its name in :class:`~largebatch.config.schedule.RateSchedule`."""
        swapped = {"per_epoch_warmup": "staircase", "warmup_from_zero": "from_zero"}
        return swapped.get(self.name, form) if form == "gradual" else form

    def loss_scale(self, base: float, reference: float) -> float:
        """Return the factor of the cross-entropy, by which the rates are divided: 1, or η̂/η under scale_loss."""
        return reference / base if self.name == "scale_loss" else 1.0
