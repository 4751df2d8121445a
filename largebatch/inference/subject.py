"""Load networks and data of recorded runs, or of a composed configuration and a file of weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from largebatch.base.errors import UserError, nearest
from largebatch.config.keys import without_added
from largebatch.config.run import Config
from largebatch.models import build_model
from largebatch.offloading import fold_batchnorm
from largebatch.quantization.artifact import sha256
from largebatch.records.check import Corrupt
from largebatch.records.read import read_config
from largebatch.records.runs import Run, find, load
from largebatch.runtime.placement import Placement
from largebatch.runtime.world import hardware
from largebatch.training import checkpoint
from largebatch.training.learner import DTYPES

# What decides a validation. The rest of a record's configuration is about training.
RECORDED = ("k", "n", "seed", "exact", "deterministic", "channels_last", "bn", "model", "dataset", "loss", "pitfall")
# What may be said of a recorded run: where it is evaluated, in which arithmetic, and where its data are now.
FREE = (
    *("device", "precision", "tf32", "threads", "channels_last", "loader.workers", "loader.prefetch"),
    *("dataset.root", "dataset.layout", "dataset.on_error"),
)


@dataclass(frozen=True)
class Subject:
    """A network that is evaluated.

    Attributes:
        name: What tables call it.
        config: Its run's, or what was composed.
        weights: The file that they are in.
        run: The record, where there is one.
    """

    name: str
    config: Config
    weights: Path
    run: Run | None = None

    @property
    def iteration(self) -> int | None:
        """The iteration after which the weights were as they are; None: nobody knows."""
        if self.run is None:
            return None
        directory, weights = self.run.directory.resolve(), self.weights.resolve()
        if weights == directory / "model.safetensors":
            return self.run.summary.get("iterations")
        ours = checkpoint.candidates(directory / "checkpoints")
        return checkpoint.iteration_of(weights) if weights in ours else None

    @property
    def recorded(self) -> dict[str, float] | None:
        """Return the run's recorded validation with these weights: errors in %, and the loss."""
        if self.run is None or self.iteration is None or not self.run.epochs_done:
            return None
        epochs = self.run.epochs
        names = {"error": "val_error", "error_top5": "val_error_top5", "loss": "val_loss"}
        rows = (epochs["iteration"] == self.iteration).nonzero()[0]
        return {name: float(epochs[column][rows[0]]) for name, column in names.items()} if len(rows) else None

    @property
    def record(self) -> Path | None:
        """The file to which evaluations of the run are added."""
        return None if self.run is None else self.run.directory / "evaluations.jsonl"

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the earlier evaluations of the run, as far as they can be read."""
        try:
            lines = self.record.read_text(encoding="utf-8").splitlines() if self.record else []
        except (OSError, ValueError):
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # half a line, of a disk that was full
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict)]

    def notes(self, precision: str) -> list[str]:
        """Return what a reader of its figures must know; ``precision`` is that of this evaluation."""
        if self.run is None:
            return []
        notes, run = [], self.run
        if run.status == "diverged":
            notes.append(f"{self.name} diverged after {run.epochs_done} epochs.")
        elif run.status != "done":
            epochs = f"{run.epochs_done} of {run.experiment['epochs']} epochs"
            notes.append(f"{self.name} is unfinished ({run.status}, {epochs}).")
        if precision != run.experiment["precision"]:
            notes.append(
                f"{self.name} was trained and validated in {run.experiment['precision']}, and here in {precision}."
            )
        return notes


def composed(config: Config, state_file: Path) -> Subject:
    """Return the network of a composed configuration with the weights of a file.

    Raises:
        UserError: there is no such file.
    """
    return Subject(config.model.name, config, _existing("state_file", state_file))


def recorded(directory: Path, weights: str, values: Mapping[str, Any], given: Iterable[str]) -> Subject:
    """Return the network of a recorded run.

    Args:
        directory: The run's.
        weights: ``last``, ``best`` or a file.
        values: A composed configuration, for what a record does not decide.
        given: The keys in it that the user gave.

    Raises:
        UserError: no run can be read there, it has no such weights, or a key was given that the record decides.
    """
    for key in given:
        if key not in FREE:
            raise UserError(
                f"{key}= cannot be given with a recorded run, which is evaluated as it was trained: leave it out. "
                f"These can: {', '.join(FREE)}.{nearest(key, FREE)}"
            )
    found = find([str(directory)], "run")
    if found != [directory]:
        raise UserError(
            f"run={directory} is not a run, but contains {len(found)}: name one of them, such as run={found[0]}, or "
            f"evaluate them all as an ensemble with runs={directory}."
        )
    try:
        run = load(directory)
    except Corrupt as error:
        raise UserError(f"run={directory} cannot be read: {error}.") from None
    return Subject(str(directory), _config(run, values, given), _weights_of(run, weights), run)


def _config(run: Run, values: Mapping[str, Any], given: Iterable[str]) -> Config:
    """Put together what the record decides, what the user gave, and for the rest the defaults."""
    record = read_config(run.directory)
    precision = run.experiment["precision"]  # what precision=auto came to
    merged = {**values, "precision": "fp32" if precision == "tf32" else precision, "tf32": precision == "tf32"}
    # Sums over another number of threads may differ in the last bit.
    merged["threads"] = min(run.provenance["placement"]["threads"], hardware("cpu").cores)
    for key in RECORDED:
        if key in record:
            merged[key] = {**values[key], **record[key]} if isinstance(record[key], dict) else record[key]
    for key in given:
        group, _, name = key.rpartition(".")
        if group:
            merged[group] = {**merged[group], name: values[group][name]}
        else:
            merged[name] = values[name]
    return Config.from_mapping(merged)


def _weights_of(run: Run, weights: str) -> Path:
    checkpoints = checkpoint.candidates(run.directory / "checkpoints")
    last = run.directory / "model.safetensors"
    best = [path for path in checkpoints if path.name.startswith(checkpoint.BEST)]
    if weights not in ("last", "best"):
        return _existing("weights", Path(weights))
    wanted = [last] * last.exists() if weights == "last" else best
    if wanted:
        return wanted[0]
    others = [f"weights={path}" for path in checkpoints if path not in best][:1]
    others += ["weights=best"] * bool(best) + ["weights=last"] * last.exists()
    what = "a checkpoint of its best epoch" if weights == "best" else "the weights of its end (model.safetensors)"
    raise UserError(
        f"run={run.directory} (status {run.status}) does not hold {what}: "
        + (f"it has {' and '.join(others)}." if others else "it has no weights at all, as a compact record.")
    )


def _existing(key: str, path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{key}={path} is not a file: it takes one of safetensors.")
    return path


def check_ensemble(subjects: Iterable[Subject]) -> None:
    """Raise :class:`UserError` where networks cannot be averaged: other images, or other arithmetic."""
    seen: dict[str, set[str]] = {}
    for subject in subjects:
        config = subject.config
        values = {f"dataset.{name}": value for name, value in vars(config.dataset).items()}
        values |= {f"loss.{name}": value for name, value in vars(config.loss).items()}
        values |= {"precision": "tf32" if config.tf32 else config.precision, "channels_last": config.channels_last}
        for key, value in values.items():
            unknown = key == "dataset.digest" and value is None  # of a record of an earlier version
            if key not in ("dataset.root", "dataset.layout", "dataset.on_error") and not unknown:
                seen.setdefault(key, set()).add(str(value))
    differing = [f"{key} ({', '.join(sorted(values))})" for key, values in seen.items() if len(values) > 1]
    if differing:
        raise UserError(
            f"these runs are no ensemble, they differ in {', '.join(differing)}: choose runs of the same images and "
            "arithmetic (precision=… sets one for all)."
        )


def network(subject: Subject, placement: Placement, classes: int, channels: int, fold_bn: bool) -> nn.Module:
    """Return the network in host memory, in evaluation mode, with its weights.

    Args:
        subject: Which.
        placement: Precision and memory format.
        classes: Width of its output.
        channels: Channels of its input.
        fold_bn: Whether BatchNorm is folded into the convolutions.

    Raises:
        UserError: the file is not whole, not safetensors, or of another network.
    """
    model = build_model(subject.config.model, classes, channels)
    model.to(dtype=DTYPES[placement.precision]).eval().requires_grad_(False)
    if placement.channels_last:
        model.to(memory_format=torch.channels_last)
    state = read_weights(subject.weights)
    expected = model.state_dict()
    # Counted by nobody here: many files of weights leave it out.
    lacking = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in expected]
    reshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    problems = [
        f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("lacking", lacking), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise UserError(
            f"{subject.weights} does not hold the weights of model.name={subject.config.model.name} with {classes} "
            f"classes ({'; '.join(problems)}): give the network that they are of."
        )
    model.load_state_dict(state, strict=False)
    if fold_bn:
        fold_batchnorm(model)
    return model


def integers_of(subject: Subject) -> tuple[Path, dict[str, Any]]:
    """Return where a network's integers are written by default, and what they must have been made of."""
    model = without_added({"model": asdict(subject.config.model)})["model"]
    directory = subject.weights.parent if subject.run is None else subject.run.directory
    return directory / "quantized", {"weights_sha256": sha256(subject.weights), "model": model}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a network's tensors by name, from a file of weights or a checkpoint of a run; nothing is unpickled.

    Raises:
        UserError: the file is not whole, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            is_checkpoint = "state" in (file.metadata() or {})
        if not is_checkpoint:
            return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}). Pickled files (.pt, .pth) are not read, because doing so "
            "runs what is in them: convert yours where you trust it, with safetensors.torch.save_file(state_dict, …)."
        ) from None
    found = checkpoint.read(path)
    if found is None:
        raise UserError(f"{path} is damaged: its content does not match its name. Use other weights.")
    model = "model."
    return {name.removeprefix(model): value for name, value in found.tensors.items() if name.startswith(model)}
