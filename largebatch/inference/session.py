"""All that an evaluation needs, opened and checked: networks in host memory, data, device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.base.errors import UserError
from largebatch.base.outcome import say
from largebatch.config.run import Config
from largebatch.data.source import Source
from largebatch.inference.config import EvalConfig
from largebatch.inference.subject import Subject, check_ensemble, composed, integers_of, network, recorded
from largebatch.models.build import channels_of
from largebatch.quantization.artifact import read
from largebatch.quantization.choose import ByEngine, choose
from largebatch.quantization.reference import IntegerNetwork
from largebatch.records.read import read_data
from largebatch.records.runs import find
from largebatch.runtime.placement import Placement, place
from largebatch.runtime.world import World, hardware
from largebatch.training.agreement import NO_DIGEST, check_same
from largebatch.training.learner import open_data, start
from largebatch.training.validation import BATCH, validation_cuts


@dataclass(frozen=True)
class Session:
    """Networks, device and images of an evaluation.

    Attributes:
        asked: The user's words.
        subjects: One, or the members of an ensemble.
        models: Their networks by their names, in host memory and in evaluation mode.
        source: The images.
        cuts: The batches of the validation set.
        placement: Device, precision and memory format.
        world: This process, alone.
        skipped: Images that dataset.on_error=skip has left out so far, each with the reason, as often as it was read.
    """

    asked: EvalConfig
    subjects: Sequence[Subject]
    models: Mapping[str, nn.Module]
    source: Source
    cuts: Sequence[range]
    placement: Placement
    world: World
    skipped: list[str]

    def where(self) -> dict[str, Any]:
        """Return what decides how long computing takes: device, precision, images and how many go in a pass."""
        device = self.world.device
        return {
            "device": self.placement.device,
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": self.placement.precision,
            "fold_bn": self.asked.fold_bn,
            "images": sum(map(len, self.cuts)),
            "batch": self.asked.batch,
            **({"quantized": self._engine()} if self.asked.quantized else {}),
        }

    def _engine(self) -> str:
        """Return what computes the integers."""
        return getattr(next(iter(self.models.values())), "engine", "reference")


def open_session(asked: EvalConfig, values: Mapping[str, Any], given: Sequence[str]) -> Session:
    """Find what was asked for, and open it.

    Args:
        asked: What to evaluate and how.
        values: A composed configuration, as :meth:`Config.from_mapping` takes it.
        given: The keys in it that the user gave.

    Raises:
        UserError: runs, weights, data or a device that cannot be had, or that do not belong together.
    """
    subjects = _subjects(asked, values, given)
    check_ensemble(subjects)
    config = replace(subjects[0].config, processes=1, workers_per_pass=None)
    placement = place(config, hardware(config.device))
    world = start(config, placement)
    source = open_data(config, placement, world)
    check_data(subjects, source)
    cuts = _cuts(subjects, asked, source)
    if asked.quantized:
        models = {subject.name: _in_integers(subject, asked, placement) for subject in subjects}
    else:
        sizes = source.classes, channels_of(source.sample.shape)
        models = {subject.name: network(subject, placement, *sizes, asked.fold_bn) for subject in subjects}
    skipped: list[str] = []
    source.on_skip = skipped.append
    return Session(asked, subjects, models, source, cuts, placement, world, skipped)


def check_data(subjects: Sequence[Subject], source: Source) -> None:
    """Refuse data on which a subject was not trained; say of which none are known."""
    unknown = []
    for subject in subjects:
        if subject.run is None:
            continue
        kept = read_data(subject.run.directory)
        check_same(kept, source.identity, subject.name, "name them with dataset.root")
        unknown += [subject.name] if kept is None else []
    if unknown:
        more = f" (as {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        say(f"{unknown[0]}{more} {NO_DIGEST}")


def _in_integers(subject: Subject, asked: EvalConfig, placement: Placement) -> nn.Module:
    """Return a network that ``largebatch quantize`` has made, in host memory."""
    directory, source = integers_of(subject)
    found, _ = read(directory, source)
    if asked.offload == "none":
        return ByEngine(found, choose(asked.engine, placement.device)).eval()
    return IntegerNetwork(found).eval()


def _subjects(asked: EvalConfig, values: Mapping[str, Any], given: Sequence[str]) -> list[Subject]:
    if asked.state_file:
        return [composed(Config.from_mapping(values), Path(asked.state_file))]
    if asked.run:
        return [recorded(Path(asked.run), asked.weights, values, given)]
    if asked.weights not in ("last", "best"):
        raise UserError(f"weights={asked.weights} is of one run: with runs= it takes last or best.")
    return [recorded(directory, asked.weights, values, given) for directory in find(asked.runs)]


def _cuts(subjects: Sequence[Subject], asked: EvalConfig, source: Source) -> list[range]:
    """Return the batches that every subject was validated in, cut smaller where ``batch`` says so."""
    for subject in subjects:
        recorded = subject.run.summary.get("val_images") if subject.run else None
        if recorded not in (None, source.val_images):
            raise UserError(
                f"{subject.name} was validated on {recorded:,} images, and there are {source.val_images:,} now: other "
                "data, and another error. Restore them, or say where they are with dataset.root."
            )
    first, *others = (validation_cuts(subject.config, source.val_images) for subject in subjects)
    if any(cuts != first for cuts in others):
        raise UserError(
            "these runs are no ensemble: pitfall=padded_eval counts some images twice, and they do not count the same."
        )
    size = asked.batch or BATCH
    if size > BATCH:
        raise UserError(
            f"batch={size} is above {BATCH}, the batches in which training validates: take {BATCH} or less."
        )
    return [range(start, min(start + size, cut.stop)) for cut in first for start in range(cut.start, cut.stop, size)]
