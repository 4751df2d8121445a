"""From what ``largebatch quantize`` is asked to the integers on disk, and what they cost."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from largebatch.base.errors import Fault, UserError
from largebatch.base.files import write_atomically
from largebatch.inference.config import EvalConfig
from largebatch.inference.session import Session, open_session
from largebatch.inference.subject import integers_of
from largebatch.quantization import degradation
from largebatch.quantization.artifact import DESCRIPTION, write
from largebatch.quantization.choose import choose, must_avoid_overflow
from largebatch.quantization.config import QuantizeConfig
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.lower import Recipe
from largebatch.quantization.network import Engine, Network
from largebatch.quantization.pipeline import BATCH, Quantized, calibration_images, quantize
from largebatch.quantization.saturation import audit, instructions

ONNX = "network.onnx"
# Of the multiplications in integers, and of the bytes of the network in floats, for a network to be one of integers.
LEAST_SHARE, LARGEST_SIZE = 0.5, 0.5


def quantize_session(asked: QuantizeConfig, values: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Quantize, write, and return

    ``network`` (its name), ``directory``, ``recipe``, ``bytes``, ``float_bytes`` and ``size_ratio``, ``processor`` (its
    instructions for bytes), ``may_overflow`` (how many channels could overflow 16 bits, which matters without VNNI),
    those of :func:`~.degradation.operators`, ``decibels`` (of the logits of a few training images, over
    what integers change in them), and ``notes``. With ``report`` also those of ``compare``,
    ``layer_facts`` and ``speed`` there; with ``max_drop`` the ``steps`` of ``within``, and those of ``compare``.

    Raises:
        UserError: what was named cannot be had, or cannot be quantized.
        Fault: what should compute in integers does not, or most of the network cannot.
    """
    if asked.export == "onnx" and (reason := OnnxRuntime().available()):
        raise UserError(reason.replace("engine=onnxruntime", "export=onnx"))
    session = open_session(EvalConfig.of(asked.run, asked.state_file, asked.weights), values, given)
    (subject,), (model,) = session.subjects, session.models.values()
    if subject.run is not None and subject.run.status == "diverged" and asked.weights == "last":
        raise UserError(
            f"run={asked.run} diverged: its last weights predict by chance, in integers or not. Quantize another run, "
            "or use weights=best."
        )
    directory, source = integers_of(subject)
    directory = Path(asked.out) if asked.out else directory
    _check_place(directory)
    engine, model = choose(asked.engine, session.placement.device), model.float()
    seed = subject.config.seed
    safe = asked.reduces(must_avoid_overflow)
    quantized = quantize(
        model,
        _image(session.source.sample, subject.name),
        calibration_images(session.source, seed, asked.images),
        asked.calibration,
        Recipe(asked.bits, asked.granularity == "per_channel", safe=safe),
    )
    few = next(calibration_images(session.source, seed, min(asked.images, BATCH)))
    _refuse_floats(asked, subject.name, quantized)
    quantized, costs = _costs(asked, session, model, quantized, engine, few)
    if quantized.recipe.keep:
        _refuse_floats(asked, subject.name, quantized)
    recipe = {key: getattr(asked, key) for key in ("calibration", "images", "granularity", "bits")}
    recipe |= {"reduced": safe, "keep": list(quantized.recipe.keep)}
    noise = degradation.noise(model, engine.load(quantized.network), few)
    if not (asked.report or asked.max_drop is not None or noise >= asked.min_db):
        raise UserError(
            f"the logits of {subject.name} stand only {noise:.1f} dB above what integers change in them, which is "
            f"below min_db={asked.min_db:g}: nothing was written. report=true prints the cost and which layers "
            "lose most, max_drop=0.3 keeps those in floats, and "
            f"min_db={math.floor(max(noise, -999))} takes the network as it is."
        )
    exported = _as_onnx(quantized.network) if asked.export == "onnx" else None
    replaced = (directory / DESCRIPTION).exists()
    size, floats = write(directory, quantized.network, source, recipe), degradation.float_bytes(model)
    if exported is not None:
        write_atomically(directory / ONNX, exported)
    elif replaced:  # the one there is of the network that lay here before
        (directory / ONNX).unlink(missing_ok=True)
    return {
        "network": subject.name,
        "directory": str(directory),
        "recipe": recipe,
        "bytes": size,
        "float_bytes": floats,
        "size_ratio": size / floats,
        "processor": instructions(),
        "may_overflow": sum(map(len, audit(quantized.network).values())),
        **degradation.operators(quantized.network, engine, few),
        "decibels": noise,
        **costs,
    }


def _refuse_floats(asked: QuantizeConfig, name: str, quantized: Quantized) -> None:
    """Refuse a network that is one of integers by name alone.

    Raises:
        Fault: less than half of its multiplications are in integers, or more than half of its bytes remain, and that is
            not allowed.
    """
    share, size = quantized.integer_share(), quantized.size_ratio()
    if asked.allow_float or (share >= LEAST_SHARE and size <= LARGEST_SIZE):
        return
    floats = Counter(node.attributes["target"] for node in quantized.network if node.operator == "float")
    names = ", ".join(f"{target} ({count})" for target, count in floats.most_common(3))
    raise Fault(
        f"only {100 * share:.0f} % of the multiplications of {name} would be in integers, and its tensors would take "
        f"{size:.2f} of those in floats: nothing was written. Less than {100 * LEAST_SHARE:.0f} % or more than "
        f"{LARGEST_SIZE:g} needs allow_float=true. In floats are: {names}."
    )


def _image(sample: Tensor, name: str) -> tuple[int, int, int]:
    """Return (C, H, W) of an input.

    Raises:
        UserError: the network takes something else than images.
    """
    if sample.dim() != 3 or not sample.is_floating_point():
        raise UserError(
            f"{name} takes inputs of shape {tuple(sample.shape)} and type {sample.dtype}: quantize takes networks of "
            "images, (C, H, W)."
        )
    channels, height, width = sample.shape
    return channels, height, width


def _check_place(directory: Path) -> None:
    """Refuse, before the work, a directory that cannot be made or written.

    Raises:
        UserError: why not.
    """
    there = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{directory} cannot be written: {there} is a file. Name a directory with out=DIRECTORY.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{directory} cannot be written: {there} may only be read. Name another with out=DIRECTORY.")


def _costs(
    asked: QuantizeConfig, session: Session, model: nn.Module, quantized: Quantized, engine: Engine, few: Tensor
) -> tuple[Quantized, dict[str, Any]]:
    """Return the network, with layers back in floats where ``max_drop`` wants it, and what was asked about it."""
    facts: dict[str, Any] = {"notes": []}
    if asked.max_drop is None and not asked.report:
        return quantized, facts
    device = session.world.device
    model.to(device)
    before = degradation.answers(model, session.source.validation(session.cuts))
    model.to("cpu")

    def compare(network: Network) -> dict[str, Any]:
        program = engine.load(network)
        return degradation.compare(before, degradation.answers(program, session.source.validation(session.cuts)))

    if asked.max_drop is not None:
        quantized, steps = degradation.within(
            quantized, asked.max_drop, few, lambda network: compare(network)["top1_drop"]
        )
        facts["steps"] = steps
        if steps[-1]["top1_drop"] > asked.max_drop:
            facts["notes"].append(f"With no layer left in integers the drop is still above max_drop={asked.max_drop}.")
    facts |= compare(quantized.network)
    if asked.report:
        facts |= {**degradation.layer_facts(quantized, few), "speed": degradation.speed(quantized, engine, few)}
    return quantized, facts


def _as_onnx(network: Network) -> bytes:
    from largebatch.quantization.engines.onnx_export import as_onnx

    try:
        model = as_onnx(network)
    except UserError as error:
        raise UserError(f"export=onnx is not possible, and nothing was written: {error}") from None
    return bytes(model.SerializeToString())
