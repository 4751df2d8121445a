"""Checks of a record: whatever damages it, the run is left out with a sentence, and never ends a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable
from largebatch.config.build import digest
from largebatch.config.schedule import SCALINGS, schedule_of

MOST = 10**8  # iterations of a run, and so what is drawn or counted one by one
WHOLE = ("k", "n", "epochs", "lr.base_minibatch")  # keys of an experiment that reports read, by their type
NUMBERS = ("lr.base", "warmup.epochs", "schedule.factor")
WORDS = (
    *("model.name", "dataset.name", "warmup.name", "schedule.name", "optimizer.name", "lr.scaling"),
    *("precision", "pitfall"),
)
NEEDED = (*WHOLE, *NUMBERS, *WORDS, "schedule.milestones")


class Corrupt(Exception):
    """A record that cannot be read: named, left out, and exit status 1 at the end."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys, as they are written on the command line."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        settings |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return settings


def check_origin(provenance: Mapping[str, Any]) -> None:
    """Refuse a provenance that lacks what reports read, or whose experiment is not the one that was recorded.

    Raises:
        Corrupt: it does.
    """
    missing = [key for key in ("experiment", "experiment_hash", "run_hash", "seed") if key not in provenance]
    settings: dict[str, Any] = {}
    if not missing:
        settings = flat({"experiment": provenance["experiment"]})
        missing = [f"experiment.{key}" for key in NEEDED if f"experiment.{key}" not in settings]
    if missing:
        raise Corrupt(f"provenance.json has no {missing[0]}")
    experiment = provenance["experiment"]
    hashes = digest(experiment), digest({**experiment, "seed": provenance["seed"]})
    if hashes != (provenance["experiment_hash"], provenance["run_hash"]):
        raise Corrupt("provenance.json was edited: its experiment and seed do not have its hashes")
    _check_settings({key.removeprefix("experiment."): value for key, value in settings.items()})
    if not _is_whole(provenance["seed"]):
        raise _wrong("seed", provenance["seed"], "a whole number")
    _check_surroundings(provenance)


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key in WHOLE:
        if not _is_whole(settings[key]) or not 0 < settings[key] <= MOST:
            raise _wrong(f"experiment.{key}", settings[key], f"a whole number from 1 to {MOST:,}")
    for key in NUMBERS:
        if not is_number(settings[key]) or not 0 <= settings[key] <= MOST:
            raise _wrong(f"experiment.{key}", settings[key], f"a number from 0 to {MOST:,}")
    if not settings["lr.base"]:
        raise _wrong("experiment.lr.base", 0, "above 0")
    for key in WORDS:
        if not isinstance(settings[key], str):
            raise _wrong(f"experiment.{key}", settings[key], "a name")
    if settings["lr.scaling"] not in SCALINGS:
        raise _wrong("experiment.lr.scaling", settings["lr.scaling"], f"one of {', '.join(SCALINGS)}")
    milestones = settings["schedule.milestones"]
    if not isinstance(milestones, list) or not all(is_number(one) and 0 <= one <= MOST for one in milestones):
        raise _wrong("experiment.schedule.milestones", milestones, "a list of epochs")
    images = settings.get("dataset.train_images")
    if images is not None and not (_is_whole(images) and images >= 0):
        raise _wrong("experiment.dataset.train_images", images, "a whole number")
    try:
        schedule_of(settings, 1)
    except UserError as error:  # a pitfall that this program does not know
        raise Corrupt(f"provenance.json has an experiment without rates: {printable(str(error)).rstrip('.')}") from None
    for key, value in settings.items():
        if not key.isprintable() or (isinstance(value, str) and not value.isprintable()):
            raise Corrupt(f"provenance.json has control characters in experiment.{printable(key)}")


def _check_surroundings(provenance: Mapping[str, Any]) -> None:
    devices, git = provenance.get("devices", []), provenance.get("git") or {}
    if not isinstance(devices, list):
        raise Corrupt("provenance.json has no list of devices")
    if not all(isinstance(device, str) for device in devices):
        raise Corrupt("provenance.json has a device that is not a name")
    if not isinstance(git, Mapping) or not isinstance(git.get("commit") or "", str):
        raise _wrong("git", provenance["git"], "a commit")
    if not isinstance(provenance.get("versions") or {}, Mapping):
        raise _wrong("versions", provenance["versions"], "a version a package")


def check_summary(summary: Mapping[str, Any]) -> None:
    """Refuse a summary without a status, or with something else where reports read a number.

    Raises:
        Corrupt: it does.
    """
    if "status" not in summary:
        raise Corrupt("summary.json has no status")
    if not isinstance(summary["status"], str) or not summary["status"].isprintable():
        raise Corrupt("summary.json has a status that is not a word")
    for name in ("final_error", "seconds"):
        if summary.get(name) is not None and not is_number(summary[name]):
            raise Corrupt(f"summary.json says {name} {shortly(summary[name])}, not a number")


def check_epoch(values: Any, number: int) -> None:
    """Refuse an epoch line that is not of epoch ``number``, or lacks what reports read.

    Raises:
        Corrupt: it does.
    """
    found = values.get("epoch") if isinstance(values, Mapping) else None
    if found != number:
        raise Corrupt(f"metrics.jsonl has epoch {shortly(found)} where {number} should be")
    missing = {"iteration", "train_error", "val_error", "images_per_second"} - values.keys()
    if missing:
        raise Corrupt(f"the line of epoch {number} in metrics.jsonl has no {min(missing)}")
    for name, value in values.items():
        if name != "kind" and value is not None and not is_number(value):
            raise Corrupt(f"metrics.jsonl has a value of {printable(name)} that is not a number")
    if not is_number(values["iteration"]) or not 0 < values["iteration"] <= MOST:
        raise Corrupt(f"metrics.jsonl has iteration {shortly(values['iteration'])} at the end of epoch {number}")


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number that float64 holds, other than NaN and infinity."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number above 1e308
        return False


def shortly(value: Any) -> str:
    """Return a stranger's value for a sentence."""
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:37]}…"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(key: str, value: Any, wanted: str) -> Corrupt:
    return Corrupt(f"provenance.json has {key} {shortly(value)}, not {wanted}")
