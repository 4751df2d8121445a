"""``largebatch.load_model``, ``load_images`` and ``quantize``: trained networks as modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from largebatch.api.calls import Report
from largebatch.api.recorded import Run
from largebatch.api.unchanged import unchanged
from largebatch.base.errors import UserError, at_least, one_of
from largebatch.cli.compose import compose
from largebatch.data.source import Batch, Source, Target, open_source
from largebatch.inference.session import check_data
from largebatch.inference.subject import Subject, network, recorded
from largebatch.models.build import channels_of
from largebatch.quantization import degradation
from largebatch.quantization.artifact import encode
from largebatch.quantization.choose import ByEngine, choose, must_avoid_overflow
from largebatch.quantization.config import CALIBRATIONS, ENGINES, GRANULARITIES, REDUCTIONS
from largebatch.quantization.lower import Recipe
from largebatch.quantization.network import Engine
from largebatch.quantization.pipeline import BATCH, Quantized
from largebatch.quantization.pipeline import quantize as in_integers
from largebatch.runtime.placement import place
from largebatch.runtime.world import hardware


def load_model(run: Run | str | Path, weights: str = "last", *, fold_bn: bool = False) -> nn.Module:
    """Return the network of a recorded run with its weights, on the CPU, in evaluation mode, without gradients.

    Args:
        run: The run or its directory.
        weights: ``last``, ``best`` (of the lowest validation error) or a file of safetensors.
        fold_bn: Fold BatchNorm into the convolutions.

    Returns:
        A module from (batch, C, H, W), normalised as :func:`load_images` returns them, to logits (batch, classes).

    Raises:
        UserError: no run can be read there, or it does not have these weights.
    """
    with unchanged():
        subject = _subject(run, weights)
        config = subject.config
        sizes = config.dataset.classes, config.dataset.channels
        if not all(sizes):  # only the data know them
            source = _source(subject)
            sizes = source.classes, channels_of(source.sample.shape)
        return network(subject, place(config, hardware("cpu")), *cast(tuple[int, int], sizes), fold_bn)


def load_images(run: Run | str | Path, split: str = "validation", count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return images of the data set of a run, as its network takes them in validation, and their labels.

    Args:
        run: The run or its directory.
        split: ``validation`` or ``training`` (without augmentation).
        count: The first so many; None: all, which must fit into memory.

    Returns:
        Images, float32 (count, C, H, W), normalised; labels, int64 (count,). The label of an image that cannot be read
        is -100.

    Raises:
        UserError: no run can be read there, its data are not found or have changed, or there are fewer images.
    """
    one_of("split", split, ("validation", "training"))
    at_least("count", count, 1)
    with unchanged():
        subject = _subject(run, "last")
        source = _source(subject)
        check_data([subject], source)
        total = source.val_images if split == "validation" else source.train_images
        wanted = total if count is None else count
        if wanted > total:
            raise UserError(f"count={count} is more than the {total:,} {split} images.")
        cuts = [range(start, min(start + BATCH, wanted)) for start in range(0, wanted, BATCH)]
        if split == "validation":
            batches = list(source.validation(cuts))
        else:
            batches = list(source.plain(torch.arange(cut.start, cut.stop) for cut in cuts))
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _subject(run: Run | str | Path, weights: str) -> Subject:
    directory = run.directory if isinstance(run, Run) else Path(run)
    values = compose("train", ["device=cpu"]).values
    assert values is not None  # no sweep
    return recorded(directory, weights, {**values, "device": "cpu"}, ["device"])


def _source(subject: Subject) -> Source:
    config = subject.config
    return open_source(config.dataset, config.loader, config.seed, Target(torch.device("cpu"), torch.float32), 1)


class QuantizedModel(ByEngine):
    """A network in 8-bit integers, as a module from float32 (batch, C, H, W) to float32 (batch, classes).

    Attributes:
        report: What the integers cost; None unless ``report=True``.
        engine: What computes the integers: x86, cuda, onnxruntime or reference.
        quantized: The network in integers, and what it was made from.
    """

    report: Report | None

    def __init__(self, quantized: Quantized, engine: Engine) -> None:
        super().__init__(quantized.network, engine)
        self.quantized, self.report = quantized, None


def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    report: bool = False,
    calibration: str = "minmax",
    granularity: str = "per_channel",
    bits: int = 8,
    keep: Sequence[str] = (),
    engine: str = "auto",
    reduce_range: bool | str = "auto",
) -> QuantizedModel:
    """Return a trained network in integers; the network itself stays as it is.

    Args:
        model: A module on the CPU, in evaluation mode, in float32: (batch, C, H, W) to (batch, classes).
        images: Calibration images, float32 (images, C, H, W), or batches of such: a few hundred training images. They
            measure the ranges of activations; nothing is trained.
        validation: Images, float32 (images, C, H, W), and their labels, int64 (images,): the report compares top-1
            before and after on them. They should not be the calibration images.
        report: Measure what the integers cost: size, operators, noise of the logits and of each layer, speed, and
            with ``validation`` top-1.
        calibration: ``minmax`` (all values seen), ``percentile`` (0.01 % less at either end) or ``mse`` (the least
            squared error).
        granularity: Scales of weights: ``per_channel`` or ``per_tensor``.
        bits: Width of weights and activations, 2 to 8.
        keep: Names of layers that stay in floats.
        engine: What computes the integers: ``auto``, ``reference``, ``x86``, ``onnxruntime`` or ``cuda``.
        reduce_range: Weights whose sums fit into 16 bits, as x86 without VNNI needs: ``auto`` (where this processor
            does), True or False.

    Raises:
        UserError: an option is not known, the network cannot be traced or is in training mode, or no image was given.
        Fault: what should compute in integers does not.
    """
    one_of("calibration", calibration, CALIBRATIONS)
    one_of("granularity", granularity, GRANULARITIES)
    one_of("engine", engine, ENGINES)
    one_of("reduce_range", str(reduce_range).lower(), REDUCTIONS)
    if model.training:
        raise UserError("the network is in training mode: call model.eval() first.")
    batches = list(torch.split(images, BATCH) if isinstance(images, Tensor) else images)
    if not batches or batches[0].dim() != 4:
        raise UserError("images must be calibration images of shape (images, C, H, W), and one at least.")
    few, wanted = batches[0][:BATCH].float(), str(reduce_range).lower()
    safe = must_avoid_overflow() if wanted == "auto" else wanted == "true"
    recipe = Recipe(bits, granularity == "per_channel", safe=safe)
    with unchanged():
        image = (int(few.shape[1]), int(few.shape[2]), int(few.shape[3]))
        made = in_integers(model, image, (batch.float() for batch in batches), calibration, recipe)
        unknown = [name for name in keep if name not in made.layers]
        if unknown:
            raise UserError(f"keep names '{unknown[0]}', which is no layer: these are {', '.join(made.layers)}.")
        made = made.keeping(keep) if keep else made
        chosen = choose(engine, "cuda" if engine == "cuda" else "cpu")
        result = QuantizedModel(made, chosen)
        result.eval()
        if report:
            how = {"calibration": calibration, "images": sum(map(len, batches)), "granularity": granularity}
            how |= {"bits": bits, "reduced": safe, "keep": list(keep)}
            result.report = _report(model, made, chosen, few, how, validation)
    return result


def _report(
    model: nn.Module,
    made: Quantized,
    engine: Engine,
    few: Tensor,
    recipe: Mapping[str, Any],
    validation: tuple[Tensor, Tensor] | None,
) -> Report:
    """Return what the integers cost."""
    size = sum(map(len, encode(made.network, {}, recipe)))
    floats = degradation.float_bytes(model)
    facts: dict[str, Any] = {
        "network": type(model).__name__,
        "recipe": recipe,
        "bytes": size,
        "float_bytes": floats,
        "size_ratio": size / floats,
        **degradation.operators(made.network, engine, few),
        "decibels": degradation.noise(model, engine.load(made.network), few),
        **degradation.layer_facts(made, few),
        "speed": degradation.speed(made, engine, few),
    }
    if validation is not None:
        cuts = zip(*(torch.split(part, BATCH) for part in validation), strict=True)
        pairs = [Batch(images, labels) for images, labels in cuts]
        answers = [degradation.answers(program, pairs) for program in (model, engine.load(made.network))]
        facts |= degradation.compare(*answers)
    return Report(facts, degradation.as_text(facts))
