"""Probes of a recorded run, measured from the checkpoints that it has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from largebatch.base.outcome import say
from largebatch.config.run import Config
from largebatch.records.read import read_config, read_probes, read_provenance
from largebatch.records.write import add_probe
from largebatch.runtime.placement import place
from largebatch.runtime.world import hardware
from largebatch.training import checkpoint
from largebatch.training.agreement import NO_DIGEST
from largebatch.training.keeper import check_state
from largebatch.training.learner import make_learner, open_data, start
from largebatch.training.prober import Prober


def probe_checkpoints(directory: Path, values: Mapping[str, Any], free: Sequence[str]) -> int:
    """Measure wherever a run has a checkpoint and was not probed yet, and add it to the run's ``probes.jsonl``.

    Args:
        directory: The run's.
        values: A composed configuration, for keys that an older record does not have.
        free: The keys whose composed value counts, whatever the record says.

    Returns:
        How many places were measured.

    Raises:
        UserError: the run cannot be probed, or its data are not what they were.
    """
    known = {line["iteration"] for line in read_probes(directory)}
    paths = [
        path for path in checkpoint.candidates(directory / "checkpoints") if checkpoint.iteration_of(path) not in known
    ]
    if not paths:
        return 0
    config = _config(directory, values, free)
    config.check_probe()
    placement = place(config, hardware(config.device))
    world = start(config, placement)
    source = open_data(config, placement, world)
    learner = make_learner(config, placement, world, source.classes, source.sample)
    prober, measured = Prober(learner, source), 0
    for path in reversed(paths):  # as the run went, for what has moved since the place before
        found = checkpoint.read(path)
        if found is None or checkpoint.iteration_of(path) in known:  # torn, or the best is one of the newest
            continue
        images = [source.train_images, source.val_images]
        check_state(found, images, source.identity, f"run={directory}", "name them with dataset.root")
        if "data" not in found.state and not measured:
            say(f"run={directory} {NO_DIGEST}")
        checkpoint.unpack(found, learner.model, learner.optimizer)
        add_probe(directory, prober.measure(checkpoint.iteration_of(path)))
        known.add(checkpoint.iteration_of(path))
        measured += 1
    return measured


def _config(directory: Path, values: Mapping[str, Any], free: Sequence[str]) -> Config:
    """Put together what the record decides and what may be said beside it."""
    record = read_config(directory)
    merged = {
        key: {**value, **record.get(key, {})} if isinstance(value, dict) else record.get(key, value)
        for key, value in values.items()
    }
    for key in free:
        group, _, name = key.rpartition(".")
        if group:
            given = values[group][name]
            merged[group] = {**merged[group], name: merged[group][name] if given is None else given}
        else:
            merged[key] = values[key]
    precision = (read_provenance(directory) or {})["experiment"]["precision"]  # what precision=auto came to
    merged |= {"precision": "fp32" if precision == "tf32" else precision, "tf32": precision == "tf32"}
    # A run of any number of processes is measured in one, worker by worker.
    config = Config.from_mapping({**merged, "processes": None, "workers_per_pass": None, "resume": False})
    return replace(config, processes=1)
