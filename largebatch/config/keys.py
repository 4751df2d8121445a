"""Keys that were added after runs had been recorded: older configurations still build, and no hash moves.

A key that is added gets one line in :data:`ADDED`, besides its field in a group and its value in ``conf/``. The line
gives the value that describes what the program did before the key existed, and never changes afterwards, whatever
becomes of the default. From it follow two rules:

- A stored configuration that lacks the key takes this value (:func:`complete`).
- The key enters an experiment's hash only where it differs from this value (:func:`without_added`), so that every
  experiment which does not use it keeps the hash that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

ADDED: Mapping[str, Any] = MappingProxyType(
    {
        "cuda_graphs": False,
        "bn.kernel": "separate",
        "exchange.bucket_mb": 25.0,
        "exchange.gradient_as_bucket_view": False,
        "exchange.static_graph": False,
        "exchange.compress": "none",
        "checkpoint.keep": 2,
        "probe.every": None,
        "probe.steps": None,
        "probe.batches": 8,
        "probe.products": 20,
        "probe.layers": False,
        "launcher.max_restarts": 0,
        "launcher.timeout": None,
        "launcher.jobs": 1,
        "sweep.force": False,
        "dataset.holdout": None,
        "dataset.holdout_seed": 0,
        "dataset.layout": "auto",
        "dataset.digest": None,
        "model.kwargs": None,
        "optimizer.kwargs": None,
        "optimizer.clip_norm": None,
        "loss.name": "cross_entropy",
        "loss.label_smoothing": 0.0,
        "dataset.source": "own",
        "dataset.kwargs": None,
        "dataset.reproducible": True,
        "dataset.transform": None,
        "dataset.config": None,
        "dataset.image_column": None,
        "dataset.label_column": None,
    }
)


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the keys that were added since it was written.

    Args:
        stored: Nested plain values, as :meth:`largebatch.config.run.Config.to_mapping` gave them; left as they are.
    """
    values = copy.deepcopy(dict(stored))
    launcher = values.get("launcher")
    elsewhere = isinstance(launcher, Mapping) and launcher.get("name") != "local"
    for key, before in ADDED.items():
        group, _, name = key.rpartition(".")
        place = values.setdefault(group, {}) if group else values
        if isinstance(place, dict) and not (key == "launcher.jobs" and elsewhere):
            place.setdefault(name, before)
    return values


def without_added(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what defines an experiment, without added keys that do what was done before they existed.

    Args:
        experiment: Nested plain values; a group of which nothing stays is left out.
    """
    kept = copy.deepcopy(dict(experiment))
    for key, before in ADDED.items():
        group, _, name = key.rpartition(".")
        place = kept.get(group, {}) if group else kept
        if name in place and place[name] == before:
            del place[name]
            if group and not place:
                del kept[group]
    return kept
