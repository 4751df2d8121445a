"""Explain the plan of ``train`` from the configuration alone: no data are read, nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from largebatch.base.errors import UserError
from largebatch.base.user_code import DATASETS, MODELS, plugins
from largebatch.config.pitfalls import PITFALLS
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.layouts import with_digest
from largebatch.data.source import Sizes, sizes_of
from largebatch.models import initialise, is_stochastic
from largebatch.models.batchnorm import batchnorms
from largebatch.models.build import build_on_meta, channels_of, check_shapes, draws_numbers
from largebatch.records.provenance import Run
from largebatch.runtime.placement import MOST_SAMPLES, MOST_WORKERS, Placement
from largebatch.training.optimizer import decay_groups

_BYTES = {"fp32": 4, "tf32": 4, "bf16": 4, "fp64": 8}
_STATES = {"sgd": 1, "lars": 1}  # tensors an optimizer keeps for each parameter: of others two are assumed
# Malladi et al., 2022: of the noise that a gradient is divided by, √k is left.
_ADAPTIVE = "divides a gradient by its own size, so that the rate grows with √k: the linear rule is SGD's"


def explain(config: Config, placement: Placement, full: bool = False) -> dict[str, Any]:
    """Return what a run would be, with stable keys; see :func:`as_text` for people.

    Args:
        config: The run.
        placement: Where its workers would be.
        full: Give the rate of every iteration instead of a table of turning points.

    Raises:
        UserError: the sizes of an image folder are neither given nor to be counted; what ``train`` would refuse of the
            network, the images or their number.
    """
    sizes = sizes_of(config.dataset)
    train_images = sizes.train_images
    config.check_size(train_images)
    config.dataset.check_classes(sizes.classes)
    with contextlib.suppress(UserError):  # where the images are not here, the run is named when they are
        config = replace(config, dataset=with_digest(config.dataset))
    run = Run.of(config, placement)
    rates = config.rates(train_images)
    per_epoch = config.iterations_per_epoch(train_images)
    total = config.total_iterations(train_images)
    check_shapes(config.model, sizes.classes, (config.n, *sizes.sample.shape), sizes.sample.dtype)
    model = build_on_meta(config.model, sizes.classes, channels_of(sizes.sample.shape))
    notes = [*initialise(model, config.model), *_notes(config, placement, model, sizes), *rates.notes()]
    groups = decay_groups(model)
    parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = parameters * _BYTES[placement.precision]
    table = [
        {"iteration": at, "epoch": at / per_epoch, "rate": rates.rate_at(at), "what": what}
        for at, what in rates.turning_points()
        if at < total
    ]
    return {
        "k": config.k,
        "n": config.n,
        "minibatch": config.minibatch,
        "seed": config.seed,
        "base_rate": config.lr.base,
        "reference_rate": config.reference_rate,
        "scaling": config.lr.scaling,
        "warmup": config.warmup.name,
        "warmup_epochs": config.warmup_epochs,
        "warmup_iterations": rates.warming,
        "schedule": config.schedule.name,
        "milestones": list(config.milestones),
        "epochs": config.epochs,
        "iterations_per_epoch": per_epoch,
        "iterations": total,
        "rates": [rates.rate_at(at) for at in range(total)] if full else table,
        "train_images": train_images,
        "val_images": sizes.val_images,
        "holdout": config.dataset.holdout,
        "dropped_per_epoch": train_images - per_epoch * config.minibatch,
        "data": sets.locate(config.dataset),
        "model": f"{config.model.source} {config.model.name}",
        "parameters": parameters,
        "parameter_groups": {
            "decayed": _group(config.optimizer.weight_decay, groups.decayed),
            "normalisations": _group(0.0, groups.spared),
        },
        "batchnorm": {"layers": len(batchnorms(model)), "samples": config.n, "running": config.bn.running},
        "pitfall": config.pitfall.name,
        "notes": notes,
        "plugins": {key: plugins(group) for key, group in (("model", MODELS), ("dataset", DATASETS))},
        "optimizer": config.optimizer.name,
        "placement": vars(placement),
        "memory_bytes": {
            "weights": weight_bytes,
            "gradients": weight_bytes,
            "optimizer": weight_bytes * _STATES.get(config.optimizer.name, 2),
        },
        "experiment_hash": run.experiment_hash,
        "run_hash": run.run_hash,
        "run_dir": str(run.directory),
    }


def _notes(config: Config, placement: Placement, model: nn.Module, sizes: Sizes) -> list[str]:
    """Return what differs from a usual run: dropout, samples of a pass, the rate of adaptive optimizers."""
    notes = []
    if is_stochastic(model) or (config.model.source == "python" and draws_numbers(model, sizes.sample)):
        notes.append("dropout is drawn worker by worker: each has its own pass, whatever the value of workers_per_pass")
    if config.workers_per_pass is None and placement.device == "cuda" and config.n * MOST_WORKERS > MOST_SAMPLES:
        notes.append(
            f"workers_per_pass={placement.workers_per_pass}: by default a pass holds at most {MOST_SAMPLES} samples "
            "(or one worker), for the GPU's memory; give a larger one where more fit, the result stays the same"
        )
    if config.optimizer.adaptive:
        subject = "an optimizer of your own is taken for one that" if config.optimizer.own else config.optimizer.name
        notes.append(f"lr.scaling={config.lr.scaling}: {subject} {_ADAPTIVE}")
    return notes


def _group(weight_decay: float, group: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in group.values())
    return {"weight_decay": weight_decay, "tensors": len(group), "parameters": count}


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts as a page for people."""
    place, groups, memory = facts["placement"], facts["parameter_groups"], facts["memory_bytes"]
    if facts["warmup_iterations"]:
        warmup = f"{facts['warmup']}, {facts['warmup_epochs']:g} epochs = {facts['warmup_iterations']} iterations"
    elif facts["warmup"] == "none":
        warmup = "none"
    else:
        above = facts["reference_rate"] > facts["base_rate"]
        why = "it rounds to no iteration" if above else f"the reference rate is not above {facts['base_rate']:g}"
        warmup = f"none takes place: {why}"
    rows = [
        ("minibatch", f"kn = {facts['k']} × {facts['n']} = {facts['minibatch']}"),
        (
            "reference rate",
            f"{facts['reference_rate']:g}  ({facts['scaling']} scaling of {facts['base_rate']:g})",
        ),
        ("warmup", warmup),
        (
            "epochs",
            f"{facts['epochs']} of {facts['iterations_per_epoch']} iterations; {facts['iterations']} in all",
        ),
        (
            "data",
            f"{facts['train_images']:,} training and {facts['val_images']:,} validation images"
            f"{', held out of the training set' * bool(facts['holdout'])}, {facts['data']}",
        ),
        ("dropped an epoch", f"{facts['dropped_per_epoch']} training images, others each time"),
        ("model", f"{facts['model']}, {facts['parameters']:,} parameters"),
        ("weight decay", f"{groups['decayed']['weight_decay']:g} on {_shown(groups['decayed'])}"),
        ("", f"0 on {_shown(groups['normalisations'])} (γ and β of normalisations)"),
        ("BatchNorm", _batchnorm(facts["batchnorm"])),
        ("optimizer", facts["optimizer"]),
        (
            "placement",
            f"{facts['k']} workers on {place['processes']} × {place['device']}: {place['workers']} each, "
            f"{place['workers_per_pass']} a pass ({place['workers_per_pass'] * facts['n']} samples), "
            f"{place['threads']} threads, {place['precision']}",
        ),
        (
            "memory",
            ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in memory.items()) + " in each process",
        ),
        ("run directory", facts["run_dir"]),
        *((f"{key} plug-ins", ", ".join(found)) for key, found in facts["plugins"].items() if found),
        *(("note", note) for note in facts["notes"]),
        *([("PITFALL", f"{facts['pitfall']}: {PITFALLS[facts['pitfall']]}")] if facts["pitfall"] != "none" else []),
    ]
    text = "\n".join(f"{name:<17} {value}" for name, value in rows)
    table = "\n".join(
        f"{row['iteration']:>10} {row['epoch']:>8.2f} {row['rate']:>12.6g}  {row['what']}" for row in facts["rates"]
    )
    return f"{text}\n\n{'iteration':>10} {'epoch':>8} {'rate':>12}\n{table}"


def _shown(group: dict[str, Any]) -> str:
    return f"{group['tensors']} tensors, {group['parameters']:,} parameters"


def _batchnorm(facts: dict[str, Any]) -> str:
    if not facts["layers"]:
        return "no layers"
    return f"{facts['layers']} layers, statistics of n = {facts['samples']} samples; running: {facts['running']}"
