"""Recorded runs as objects: :class:`Run`, :func:`runs`, and the selection that a table or a figure is about."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.base.errors import UserError
from largebatch.config.run import Config
from largebatch.records import runs as records
from largebatch.records.check import Corrupt
from largebatch.records.read import read_config
from largebatch.reports.selection import Selection, select

# Columns of an epoch that count something; all others are real numbers.
WHOLE = ("epoch", "iteration", "nonfinite", "replaced", "val_unreadable")


class Run:
    """A recorded run, as its record was when it was read.

    Args:
        directory: The directory of the run.

    Raises:
        UserError: no run can be read there.
    """

    def __init__(self, directory: str | Path) -> None:
        found = records.find([str(directory)], "run")
        if len(found) != 1:
            raise UserError(f"run={directory} holds {len(found)} runs: give one, or use largebatch.runs.")
        try:
            self._record = records.load(found[0])
        except Corrupt as error:
            raise UserError(f"run={directory} cannot be read: {error}.") from None
        self._config: Config | None = None

    @property
    def directory(self) -> Path:
        """The directory of the record."""
        return self._record.directory

    @property
    def status(self) -> str:
        """done, stopped (early, by ``iterations``), diverged, interrupted, failed or running."""
        return self._record.status

    @property
    def final_error(self) -> float | None:
        """Median top-1 validation error of the last five epochs, in %; None unless the run is done."""
        return self._record.final_error

    @property
    def seed(self) -> int:
        """The seed."""
        return self._record.seed

    @property
    def config(self) -> Config:
        """The configuration that the run was made with.

        Raises:
            UserError: the record does not hold it, or it is of another version.
        """
        if self._config is None:
            self._config = Config.from_mapping(read_config(self.directory))
        return self._config

    @property
    def summary(self) -> Mapping[str, Any]:
        """The content of ``summary.json``."""
        return self._record.summary

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The content of ``provenance.json``: code, versions, devices, command and hashes."""
        return self._record.provenance

    @property
    def experiment_hash(self) -> str:
        """Hash of the experiment: equal for runs that differ by their seed alone."""
        return self._record.experiment_hash

    @property
    def images_per_second(self) -> float | None:
        """Training images in a second, the median over the epochs; None before the first epoch."""
        return self._record.images_per_second

    def epochs(self, frame: bool | None = None) -> Any:
        """Return what was recorded of each epoch: errors in %, losses, the rate, images/s.

        Args:
            frame: Whether to return a DataFrame; None: where pandas is installed.

        Returns:
            A pandas DataFrame with a row an epoch, or a list of dicts.
        """
        columns = self._record.epochs
        rows = [
            {name: _value(name, float(column[row])) for name, column in columns.items()}
            for row in range(self._record.epochs_done)
        ]
        if frame is None:
            frame = importlib.util.find_spec("pandas") is not None
        if not frame:
            return rows
        import pandas

        return pandas.DataFrame(rows, columns=list(columns))

    def __repr__(self) -> str:
        error = "" if self.final_error is None else f", error {self.final_error:.2f} %"
        k, n = (self._record.experiment[key] for key in ("k", "n"))
        return f"<Run {self._record.name}: k={k}, n={n}, seed={self.seed}, {self.status}{error}>"


def _value(name: str, value: float) -> float | int:
    return int(value) if name in WHOLE and np.isfinite(value) else value


Runs = Run | str | Path | Iterable[Run | str | Path]


def runs(*patterns: Runs) -> list[Run]:
    """Return recorded runs.

    Args:
        patterns: Directories of runs or of sweeps, with all runs below them; files of records (``runs.jsonl``); globs
            such as ``runs/*``. By default the directory ``runs``.

    Returns:
        The runs, each once. A record that cannot be read is left out with a warning.

    Raises:
        UserError: a pattern matches no run.
    """
    found = []
    for directory in records.find(_directories(patterns or ("runs",))):
        try:
            found.append(Run(directory))
        except UserError as error:
            warnings.warn(f"{error} It was left out.", stacklevel=2)
    return found


def _directories(given: Runs | Iterable[Runs]) -> list[str]:
    """Return the directories and globs that name these runs."""
    if isinstance(given, Run):
        return [str(given.directory)]
    if isinstance(given, str | Path):
        return [str(given)]
    return [directory for one in given for directory in _directories(one)]


def selection_of(
    given: Runs, baseline: str | Path | Run | None, only: str | None, allow_mixed: bool, stacklevel: int = 3
) -> Selection:
    """Return the selection of a table or a figure; records that cannot be read are left out with a warning.

    Raises:
        UserError: no run matches, no group or several can be the baseline, or the runs cannot be compared.
        Fault: no run can be read.
    """
    directories = _directories(given)
    if not directories:
        raise UserError("no runs were given: give directories, globs, or what largebatch.runs returns.")
    against = None if baseline is None else _directories(baseline)[0]
    found = select(directories, against, allow_mixed, only)
    for directory, reason in found.corrupt:
        warnings.warn(f"{directory} was left out, its record is corrupt: {reason}.", stacklevel=stacklevel)
    return found
