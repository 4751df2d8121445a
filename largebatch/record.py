"""The run directory: what a run was asked, where it ran and what it measured. Reads and writes without torch.

Files (schema 1):

``config.yaml``
    The composed configuration.
``provenance.json``
    ``schema``, ``experiment_hash``, ``run_hash``, ``experiment``, ``placement``, ``git``, ``versions``,
    ``devices``, ``command``, ``started``, ``environment``.
``metrics.jsonl``
    One JSON object a line. ``kind`` is ``iteration`` (``iteration`` from 1, ``epoch`` as a fraction, ``rate``,
    ``loss`` and ``train_error`` in % over the iterations since the line before) or ``epoch`` (``epoch`` from 1,
    ``iteration``, ``rate`` of its last step, ``train_loss``, ``train_error``, ``val_error``,
    ``val_error_top5``, ``val_loss``, ``images_per_second``, ``seconds``, ``nonfinite``, ``replaced`` and
    ``val_unreadable`` (corrupt images: replaced in training, counted as wrong in validation), and with
    ``bn.recompute`` also ``val_error_recomputed``). Errors are in %. A figure that is not finite is null.
``summary.json``
    ``schema``, ``status`` (running, done, stopped, interrupted, diverged, failed), ``final_error`` (median over
    the last five epochs), ``last_error``, ``best_error``, and the run's totals.
``model.safetensors``
    The weights at the end, under the network's own names.
``events.out.tfevents.*``
    The same figures for TensorBoard.
``log.txt``, ``logs/rank*.log``
    What was printed, by rank.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from largebatch.config import Config, UserError
from largebatch.placement import Placement

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "timm", "numpy", "hydra-core", "omegaconf", "largebatch")
# The only variables that are recorded: anything else may hold a secret.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "CUBLAS_WORKSPACE_CONFIG",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "WORLD_SIZE",
)


def safe_name(text: str) -> str:
    """Return ``text`` in letters, digits, dot, underscore and hyphen alone, and not a hidden name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def default_directory(config: Config, precision: str, parent: Path | None = None) -> Path:
    """Return where a run is recorded if it does not say: its names, its seed and its hash.

    Args:
        config: The run.
        precision: The resolved one, which is part of the hash.
        parent: A sweep's directory; by default ``runs/<dataset>-<model>``.
    """
    group = safe_name(f"{config.dataset.name}-{config.model.name}")
    digest = config.run_hash(precision)[:8]
    mistake = "" if config.pitfall.name == "none" else f"-{config.pitfall.name}"
    name = safe_name(f"k{config.k}-n{config.n}-{config.warmup.name}{mistake}-s{config.seed}-{digest}")
    return (parent or Path("runs") / group) / name


def holds_run(directory: Path) -> bool:
    """Whether a run has been recorded there."""
    return any((directory / name).exists() for name in ("provenance.json", "metrics.jsonl", "summary.json"))


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, or None where there is none that can be read."""
    return _read_json(directory / "summary.json")


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """Return ``provenance.json``, or None where there is none that can be read."""
    return _read_json(directory / "provenance.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_metrics(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` of one kind (or all), up to a line that a kill cut short."""
    lines = []
    with (directory / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                break
            if kind is None or line.get("kind") == kind:
                lines.append(line)
    return lines


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: null where a number is not finite, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_summary(directory: Path, values: Mapping[str, Any]) -> None:
    """Replace ``summary.json``."""
    write_json(directory / "summary.json", {"schema": SCHEMA, **values})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys in which two configurations differ, each as ``key: before → now``."""
    changed = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{prefix}{name}.")
        elif json.dumps(old) != json.dumps(new):
            changed.append(f"{prefix}{name}: {json.dumps(old)} → {json.dumps(new)}")
    return changed


def git_state(directory: Path) -> dict[str, Any]:
    """Return the commit of the code and whether it was changed since; nulls where it is not a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(directory), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed wheel may lie inside somebody else's checkout: only ours tracks this file.
    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance(config: Config, placement: Placement, devices: list[str]) -> dict[str, Any]:
    """Return where a run comes from: code, versions, devices, command, hashes."""
    return {
        "schema": SCHEMA,
        "experiment_hash": config.experiment_hash(placement.precision),
        "run_hash": config.run_hash(placement.precision),
        "experiment": config.experiment(placement.precision),
        "seed": config.seed,
        "placement": vars(placement),
        "git": git_state(Path(__file__).parent),
        "versions": versions(),
        "devices": devices,
        "platform": platform.platform(),
        "command": shlex.join(["largebatch", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


@dataclass
class Record:
    """Writes one run's directory; rank 0 alone has one.

    Raises:
        UserError: the directory holds a run and ``resume`` was not asked for, or it cannot be written.
    """

    directory: Path
    _metrics: IO[str]
    _log: IO[str]
    _events: Any

    @classmethod
    def open(cls, directory: Path, config: Config, origin: Mapping[str, Any], resume_at: int | None) -> Record:
        """Start a record, or go on with one.

        Args:
            directory: The run's.
            config: Written to ``config.yaml``.
            origin: Written to ``provenance.json``.
            resume_at: Length in bytes of ``metrics.jsonl`` at the checkpoint that the run continues from, or
                None for a new run.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        try:
            directory.mkdir(parents=True, exist_ok=True)
            metrics = directory / "metrics.jsonl"
            if resume_at is None:
                for stale in (*directory.glob("events.out.tfevents.*"), directory / "summary.json"):
                    stale.unlink(missing_ok=True)
                metrics.write_bytes(b"")
            else:
                os.truncate(metrics, resume_at)
            (directory / "config.yaml").write_text(_yaml(config.to_mapping()), encoding="utf-8")
            write_json(directory / "provenance.json", origin)
            record = cls(
                directory,
                metrics.open("a", encoding="utf-8"),
                (directory / "log.txt").open("a", encoding="utf-8"),
                EventFileWriter(str(directory)),
            )
        except OSError as error:
            raise UserError(f"run_dir={directory} cannot be written: {error}.") from None
        record.summary({"status": "running"})
        return record

    def size(self) -> int:
        """Return the length of ``metrics.jsonl`` in bytes, everything written included."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append one line, and the same figures as TensorBoard scalars."""
        self._metrics.write(json.dumps(finite(values)) + "\n")
        self._metrics.flush()
        self._scalars(values)

    def log(self, text: str) -> None:
        """Append a line to ``log.txt``, with the time."""
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._log.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace ``summary.json``."""
        write_summary(self.directory, values)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._log.close()
        self._events.close()

    def _scalars(self, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        prefix = values["kind"]
        scalars = [
            Summary.Value(tag=f"{prefix}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, float) and name != "epoch"
        ]
        step = int(values["iteration"])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))


def _yaml(values: Mapping[str, Any], indent: int = 0) -> str:
    """Write nested plain values as YAML; JSON scalars and lists are YAML too."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{' ' * indent}{key}:\n{_yaml(value, indent + 2)}")
        else:
            lines.append(f"{' ' * indent}{key}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


def describe(summaries: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Return a table of runs: a row each of status, iterations and final error."""
    rows = [("run", "status", "iterations", "final error %")]
    for name, summary in summaries:
        error = summary.get("final_error")
        rows.append(
            (
                name,
                str(summary.get("status", "failed")),
                str(summary.get("iterations", "–")),
                "–" if error is None else f"{error:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
