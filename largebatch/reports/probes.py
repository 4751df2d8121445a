"""Probes of a run and the answer that they give, in words and as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from largebatch.reports.answer import Answer, Line, Probed, Trained, largest_by_drift, noise_scale

NOTHING = "–"


def facts(
    probed: Probed, answer: Answer | None, trained: Sequence[Trained], share: float | None = None
) -> dict[str, Any]:
    """Return all of it as plain values, for programs."""
    return {
        "run": probed.name,
        "probes": [dict(line) for line in probed.lines],
        "seconds": sum(line["seconds"] for line in probed.lines),
        "share_of_run": share,
        "answer": None
        if answer is None
        else {**dataclasses.asdict(answer), "safe": answer.safe, "unsafe": answer.unsafe},
        "trained": [
            {
                **dataclasses.asdict(one),
                "largest_equivalent": one.largest_equivalent,
                "largest": one.largest,
                "first_worse": one.first_worse,
            }
            for one in trained
        ],
    }


def as_text(probed: Probed, answer: Answer | None, trained: Sequence[Trained], share: float | None = None) -> str:
    """Return what was measured as a table, then the answer, then what training showed."""
    settings = probed.settings
    cost = sum(line["seconds"] for line in probed.lines)
    took = "" if share is None else f", {share:.0%} of the run's time"
    lines = [
        f"{probed.name}: k = {settings['k']}, n = {settings['n']}, η = {probed.full_rate:g} for each n",
        f"{len(probed.lines)} probes of {probed.steps} small steps, {cost:.1f} s{took}",
        "",
        *_table(probed),
    ]
    if answer is not None:
        lines += ["", *_answer_in_words(answer, settings["n"])]
    for one in trained:
        lines += ["", *_training_in_words(one, answer)]
    return "\n".join(lines)


def _table(probed: Probed) -> list[str]:
    at = sorted({1, *(2**power for power in range(1, probed.steps.bit_length() + 1)), probed.steps})
    at = [k for k in at if 2 <= k <= probed.steps]
    rows = [("epoch", "η", *(f"e({k})" for k in at), "cos", "largest k", "noise scale", "kη λ_max", "bound", "BN")]
    for line in probed.lines:
        ends = line["end_point"]
        rows.append(
            (
                f"{line['epoch']:g}",
                f"{line['small_rate']:.4g}",
                *(_number(ends[k - 1]) for k in at),
                _number(line["cosine"][-1]),
                f"{'≥ ' * (largest_by_drift(line) == len(ends))}{largest_by_drift(line)}",
                _scale(line),
                _number(line["rate_times_sharpness"]) + "~" * (not line["sharpness_converged"]),
                _number(line["stability_bound"]),
                _number(line["bn_mean_moved"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    k = probed.settings["k"]
    return [
        *table,
        "",
        "e(k): ‖ŵ − w‖ / ‖w − w_t‖ after k small steps; cos: of the last minibatch's gradients at w_t and at its step.",
        "largest k: up to which e(k) ≤ 1. noise scale: tr Σ / |G|², in samples.",
        f"kη λ_max: of the run itself, k = {k}; ~: power iteration did not come to rest.",
        "BN: how far running means have moved since the probe before, in standard deviations.",
    ]


def _scale(line: Line) -> str:
    if line["noise_trace"] is None or line["gradient_squared"] is None:
        return NOTHING
    scale = noise_scale([line])
    return f"{scale:,.0f}" if math.isfinite(scale) else "hidden"  # |G|² came out below 0


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _answer_in_words(answer: Answer, n: int) -> list[str]:
    low, high = answer.drift_range
    capped = "at least " * (answer.drift >= answer.steps)
    spread = f" ({low} to {high} over {answer.probes} probes)" if answer.probes > 1 else " (a single probe)"
    if math.isfinite(answer.noise):
        error = "" if math.isnan(answer.noise_error) else f" ± {answer.noise_error:.1f}"
        noise = f"k = {answer.noise:.1f}{error}: the noise scale is {answer.scale:,.0f} samples"
    else:
        noise = "any k: the noise hides the gradient"
    k = answer.safe
    doubt = "nothing measured speaks against a larger one"
    if math.isfinite(answer.unsafe) and round(answer.unsafe) > k:
        doubt = f"beyond k = {answer.unsafe:.0f} it should not; between the two lies the doubt"
    elif math.isfinite(answer.unsafe):
        doubt = "beyond it should not"
    return [
        f"drift   k = {capped}{answer.drift}{spread}",
        f"noise   {noise}",
        f"answer  up to k = {k} (kn = {k * n}) should match the baseline; {doubt}.",
        f"warmup  {_warmup_in_words(answer)}",
    ]


def _warmup_in_words(answer: Answer) -> str:
    if answer.warmup is None or answer.start is None:
        return (
            "no probe at the start of the run and at its full rate says: probe the baseline, or a run with warmup=none."
        )
    largest, curved = answer.start
    evidence = f"at the start e allows k = {largest}, and kη λ_max = {curved:.2f} of {answer.bound:.2f}"
    if not answer.warmup:
        return f"not needed for k = {answer.safe}: {evidence}."
    if answer.warmup_epochs is None:
        return (
            f"needed for k = {answer.safe}: {evidence}. No probe says for how long: take the paper's 5/90 of the run."
        )
    return f"needed for k = {answer.safe}, for about {answer.warmup_epochs:g} epochs: {evidence}."


def _training_in_words(one: Trained, answer: Answer | None) -> list[str]:
    kind = "without warmup" if one.warmup == "none" else f"with {one.warmup} warmup"
    verdicts = ", ".join(
        f"k = {k} {verdict}" + ("" if error is None else f" ({error:.2f} %)") for k, verdict, error in one.verdicts
    )
    largest = one.largest_equivalent
    shown = "no k is shown to be equivalent" if largest is None else f"the largest equivalent k is {largest}"
    worse = "none is shown to be worse" if one.first_worse is None else f"the first worse is {one.first_worse}"
    said = "" if answer is None else f"; said was {answer.safe}"
    return [f"training {kind}: {shown}, {worse}{said}.", f"  {verdicts}"]
