"""Recorded runs, as reports read them: found, checked, and with a value an epoch as numpy arrays."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import math
import mmap
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.base.errors import UserError
from largebatch.base.files import at_home
from largebatch.base.numbers import final_error
from largebatch.base.outcome import printable
from largebatch.config.groups import KNOWN_BY_DIGEST
from largebatch.records.check import Corrupt, check_epoch, check_origin, check_summary, flat, shortly
from largebatch.records.packed import NAME, packed, unpack
from largebatch.records.provenance import SCHEMA
from largebatch.records.read import REPLACED, holds_run, read_config

Columns = Mapping[str, NDArray[np.float64]]

EPOCH = b'{"kind": "epoch"'  # how a line of an epoch begins: largebatch.record writes its kind first
ROOT = "dataset.root"
HINTS = 200  # directories that are searched, in each that lies beside what was not found: it may be the whole disk


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run.

    Attributes:
        directory: Its own, or its name in a ``runs.jsonl``.
        provenance: ``provenance.json``.
        summary: ``summary.json``; of a run that was killed before it wrote one, ``{"status": "running"}``.
        epochs: A column for every figure of the epoch lines (see :mod:`largebatch.record`), with a value an epoch
            from the first on; errors in %, NaN where the figure was not finite.
        starts: How often it was started: above 1, it was resumed.
        cut_short: Whether the last line of its metrics is not whole: it was killed, or is being written.
    """

    directory: Path
    provenance: Mapping[str, Any] = field(repr=False)
    summary: Mapping[str, Any] = field(repr=False)
    epochs: Columns = field(repr=False)
    starts: int
    cut_short: bool

    @property
    def name(self) -> str:
        """Its directory, as it may be shown: a stranger's name may hold control characters."""
        return printable(str(self.directory))

    @property
    def experiment(self) -> Mapping[str, Any]:
        """Return the hash of the experiment: equal for runs that differ by their seed only."""
        values: Mapping[str, Any] = self.provenance["experiment"]
        return values

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """:attr:`experiment` under dotted keys.

        An image folder whose record has no digest, as earlier versions wrote it, is told from others by its root.
        """
        settings = flat(self.experiment)
        if settings["dataset.name"] in KNOWN_BY_DIGEST and settings.get("dataset.digest") is None:
            with contextlib.suppress(UserError):  # what cannot be read names no root
                settings[ROOT] = (read_config(self.directory).get("dataset") or {}).get("root")
        return settings

    @property
    def experiment_hash(self) -> str:
        """Hash of :attr:`experiment`."""
        return str(self.provenance["experiment_hash"])

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.provenance["seed"])

    @property
    def status(self) -> str:
        """Return its status: done, diverged; or unfinished: running, stopped, interrupted, failed."""
        return str(self.summary["status"])

    @property
    def resumed(self) -> bool:
        """Whether it went on from a checkpoint."""
        return self.starts > 1

    @property
    def epochs_done(self) -> int:
        """Epochs that were validated."""
        return len(self.epochs["epoch"])

    @property
    def final_error(self) -> float | None:
        """The paper's error of a run that is done: median validation error of its last five epochs, in %."""
        return final_error(self.epochs["val_error"].tolist()) if self.status == "done" else None

    @property
    def seconds(self) -> float | None:
        """Time in training and validation in s, where the run came to an end that says so."""
        return self.summary.get("seconds")

    @property
    def images_per_second(self) -> float | None:
        """Training images in a second: median over the epochs."""
        return statistics.median(self.epochs["images_per_second"].tolist()) if self.epochs_done else None


def find(patterns: Iterable[str], key: str = "runs") -> list[Path]:
    """Return the directories of all runs that are named by directories and globs, and of those below them.

    A ``runs.jsonl`` holds runs as a directory does.

    Args:
        patterns: What was given.
        key: The key that it was given for.

    Records that a sweep has replaced are left out, unless their own directory is named.

    Raises:
        UserError: one of them matches no run: what there is instead.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        here = [run for path in _expand(pattern) for run in _runs_below(path)]
        if not here:
            one = f"{key} takes one run; " if key == "run" and "," in pattern else ""
            raise UserError(f"{key}={pattern} matches no run: {one}{_what_there_is(pattern)}.")
        for run in here:
            found.setdefault(run.resolve(), run)  # two patterns may name the same one
    return list(found.values())


def _expand(pattern: str) -> list[Path]:
    if not pattern:  # an unset variable of the shell, not this directory
        return []
    path = Path(at_home(pattern))
    if path.exists() or packed(path):
        return [path]
    anchor = Path(path.anchor)  # globs are below a directory
    below = path.relative_to(anchor)
    files = anchor.glob(str(below.parent / NAME))
    kept = {file.with_name(name) for file in files for name in fnmatch.filter(unpack(file), below.name)}
    return sorted({*anchor.glob(str(below)), *kept})


def _runs_below(directory: Path, most: int | None = None) -> list[Path]:
    """Return the runs below a directory, or those in the first ``most`` directories there."""
    if directory.name == NAME and directory.is_file():
        return [directory.with_name(name) for name in unpack(directory)]
    if holds_run(directory):
        return [directory]
    found = []
    for parent, names, files in itertools.islice(os.walk(directory), most):
        kept = unpack(Path(parent, NAME)) if NAME in files else ()
        here = [name for name in sorted({*names, *kept}) if name in kept or holds_run(Path(parent, name))]
        found += [Path(parent, name) for name in here]
        names[:] = sorted({*names} - {*here, REPLACED})
    return found


def _what_there_is(pattern: str) -> str:
    """Say which runs lie near a pattern that matches none."""
    place = Path(pattern)
    while not place.is_dir():
        place = place.parent
    paths = sorted(path for path in place.iterdir() if path.is_dir() or path.name == NAME)
    counts = {printable(path.name): len(_runs_below(path, HINTS)) for path in paths}
    shown = [f"{name} ({count} run{'s' * (count > 1)})" for name, count in counts.items() if count]
    where = "this directory" if place == Path() else str(place)
    if not shown:
        return f"{where} holds none"
    more = f" and {len(shown) - 8} more directories" if len(shown) > 8 else ""
    return f"{where} holds {', '.join(shown[:8])}{more}"


def load(directory: Path) -> Run:
    """Read one run.

    Raises:
        Corrupt: a file is missing, is not what this program writes, or contradicts another.
    """
    try:
        return _load(directory)
    except RecursionError:
        raise Corrupt("its JSON is nested too deeply") from None


def _load(directory: Path) -> Run:
    kept = packed(directory)
    none = {"status": "running"}
    if kept:
        if not isinstance(kept.provenance, dict) or not isinstance(kept.summary or none, dict):
            raise Corrupt("its first line is not what this program writes")
        provenance, summary = dict(kept.provenance), dict(kept.summary or none)
    else:
        provenance = _object(directory / "provenance.json")
        summary = _object(directory / "summary.json") if (directory / "summary.json").exists() else none
    for name, values in (("provenance.json", provenance), ("summary.json", summary)):
        if values.get("schema", SCHEMA) != SCHEMA:
            raise Corrupt(f"{name} is of schema {shortly(values['schema'])}, this program reads {SCHEMA}")
    check_origin(provenance)
    check_summary(summary)
    try:
        if kept:
            lines = [_epoch(line.encode(), number) for number, line in enumerate(kept.epochs, start=1)]
            return _checked(Run(directory, provenance, summary, _columns(lines), len(kept.starts) or 1, False))
        lines, cut_short = epoch_lines(directory / "metrics.jsonl")
        starts = directory / "starts.jsonl"
        started = starts.read_bytes().count(b"\n") if starts.exists() else 1
    except OSError as error:
        raise Corrupt(f"{Path(error.filename).name} cannot be read: {error.strerror}") from None
    return _checked(Run(directory, provenance, summary, _columns(lines), started, cut_short))


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Corrupt(f"{path.name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise Corrupt(f"{path.name} is not JSON") from None
    if not isinstance(values, dict):
        raise Corrupt(f"{path.name} is not a JSON object")
    return values


def _checked(run: Run) -> Run:
    """Return a run, or refuse a record whose files contradict each other."""
    if run.status != "done":
        return run
    if run.epochs_done != run.experiment["epochs"]:
        raise Corrupt(f"it is done, and metrics.jsonl has {run.epochs_done} of {run.experiment['epochs']} epochs")
    recorded, computed = run.summary.get("final_error"), run.final_error
    if recorded is None or computed is None or not math.isclose(recorded, computed, rel_tol=1e-9, abs_tol=1e-9):
        raise Corrupt(f"summary.json says final_error {recorded}, and the epochs in metrics.jsonl say {computed}")
    return run


def epoch_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the epoch lines of a ``metrics.jsonl``, and whether its last line is cut short (which is left out).

    An epoch has as many lines as the one before it, about as long: its own line is looked for there first, so that
    of a long record only a small part is read.

    Raises:
        Corrupt: an epoch is missing, or its line is not JSON.
        OSError: the file cannot be read.
    """
    if not path.stat().st_size:
        return [], False
    lines: list[dict[str, Any]] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1  # of the last whole line
        start = 0 if data[: len(EPOCH)] == EPOCH else _next(data, 0, end)
        stride = 0
        while start >= 0:
            after = data.find(b"\n", start) + 1
            lines.append(_epoch(data[start:after], len(lines) + 1))
            guess = start + stride
            near = _next(data, max(guess - stride // 16, after - 1), min(guess + stride // 16, end)) if stride else -1
            if near >= 0 and _number(data[near : data.find(b"\n", near)]) != len(lines) + 1:
                near = -1
            following = near if near >= 0 else _next(data, after - 1, end)
            start, stride = following, following - start
        return lines, end != len(data)


def _next(data: mmap.mmap, start: int, end: int) -> int:
    """Return where the first epoch line begins that follows a line's end in data[start:end]; -1: none does."""
    found = data.find(b"\n" + EPOCH, start, end)
    return found + 1 if found >= 0 else -1


def _number(line: bytes) -> Any:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):
        return None


def _epoch(line: bytes, number: int) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError:
        raise Corrupt(f"the line of epoch {number} in metrics.jsonl is not JSON") from None
    check_epoch(values, number)
    return values


def _columns(lines: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(("epoch", "train_error", "val_error"))
    for line in lines:
        names |= dict.fromkeys(line)
    names.pop("kind", None)
    return {name: np.array([line.get(name) for line in lines], dtype=np.float64) for name in names}
