"""The run directory: what a run was asked, where it ran and what it measured. Reads and writes without torch.

Files (schema 1):

``config.yaml``
    The composed configuration.
``provenance.json``
    ``schema``, ``experiment_hash``, ``run_hash``, ``experiment``, ``placement``, ``git``, ``versions``,
    ``devices``, ``platform``, ``host``, ``command``, ``started``, ``environment``.
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
``probes.jsonl``
    A line for every place where it was measured how far k can grow (:mod:`largebatch.probe`), by rising ``iteration``:
    ``epoch`` as a fraction; ``rate`` η̂ there and ``small_rate`` η̂ / k; over the small steps ``cosine`` and ``distance``
    (from the second on) and ``end_point`` (from the first); ``gradient_squared`` |G|² and ``noise_trace`` tr Σ (of one
    sample); ``sharpness`` λ_max, whether it stood still, ``rate_times_sharpness`` η̂ λ_max and the ``stability_bound``
    it is to stay below; ``bn_mean_moved`` and ``bn_variance_moved`` since the line before; ``layers`` where asked for;
    ``seconds`` that it took.
``evaluations.jsonl``
    A line for each `largebatch eval` of the run, appended; see :mod:`largebatch.evaluation.report`.
``quantized/``
    The network in integers, where `largebatch quantize` made one; see :mod:`largebatch.compress.artifact`.
``starts.jsonl``
    A line each time that the run began or went on: ``started``, ``host``, ``iteration``, ``processes``, ``devices``,
    ``git``, ``command``.
``log.txt``, ``logs/rank*.log``
    What was printed, by rank.
``lock``
    The run's owner, while it lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from largebatch.config import Config, UserError
from largebatch.events import Events
from largebatch.files import write_atomically
from largebatch.placement import Placement

SCHEMA = 1
# Full, over quota, over the limit of a file's size, gone bad, or read-only of a sudden.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
REPLACED = "replaced"  # in a sweep's directory: records of runs that were made again
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
    # Not Path.exists(), which raises where the directory may not be looked into.
    return any(os.access(directory / name, os.F_OK) for name in ("provenance.json", "metrics.jsonl", "summary.json"))


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


def read_config(directory: Path) -> dict[str, Any]:
    """Return the values of ``config.yaml`` as this program writes it: nested keys, and JSON for every value.

    Raises:
        UserError: it cannot be read, or was written by something else.
    """
    path = directory / "config.yaml"
    levels: list[dict[str, Any]] = [{}]
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, text = line.strip().partition(": ")
            del levels[1 + (len(line) - len(line.lstrip())) // 2 :]
            if line.endswith(":"):
                levels.append(levels[-1].setdefault(key.removesuffix(":"), {}))
            else:
                levels[-1][key] = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}.") from None
    return levels[0]


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of ``starts.jsonl``: one for each time that the run began or went on."""
    try:
        return [json.loads(line) for line in (directory / "starts.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


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


def read_probes(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of ``probes.jsonl``, as far as they are whole; none where the run was not probed."""
    try:
        text = (directory / "probes.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for one in text.splitlines():
        try:
            lines.append(json.loads(one))
        except ValueError:
            break
    return lines


def write_probes(directory: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace ``probes.jsonl``, in the order of the iterations."""
    ordered = sorted(lines, key=lambda line: int(line["iteration"]))
    text = "".join(json.dumps(finite(line)) + "\n" for line in ordered)
    write_atomically(directory / "probes.jsonl", text.encode())


def add_probe(directory: Path, line: Mapping[str, Any]) -> None:
    """Add a line to ``probes.jsonl``, in the place of an earlier one of that iteration."""
    kept = [other for other in read_probes(directory) if other["iteration"] != line["iteration"]]
    write_probes(directory, [*kept, line])


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: null where a number is not finite, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object so that a reader never sees half of it."""
    write_atomically(path, (json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n").encode())


def write_summary(directory: Path, values: Mapping[str, Any]) -> None:
    """Replace ``summary.json``."""
    write_json(directory / "summary.json", {"schema": SCHEMA, **values})


def ended_by(error: BaseException) -> dict[str, str]:
    """Return the ``status`` and ``reason`` of a run that an exception ended: a signal's are no Exceptions."""
    if isinstance(error, Exception):
        return {"status": "failed", "reason": str(error).partition("\n")[0]}
    return {"status": "interrupted", "reason": ""}


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
        "host": socket.gethostname(),
        "command": shlex.join(["largebatch", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


@dataclass(frozen=True)
class Position:
    """Where a checkpoint stands: the iteration, and the length of ``metrics.jsonl`` in bytes."""

    iteration: int
    record_bytes: int


@dataclass
class Record:
    """Writes one run's directory; rank 0 alone has one, and owns the directory's lock."""

    directory: Path
    _metrics: IO[str]
    _log: IO[str]
    _events: Events

    @classmethod
    def open(cls, directory: Path, config: Config, origin: Mapping[str, Any], resume_at: Position | None) -> Record:
        """Start a record, or go on with one.

        Args:
            directory: The run's, which exists.
            config: Written to ``config.yaml``.
            origin: Written to ``provenance.json``, and what of it may change to ``starts.jsonl``.
            resume_at: Where the checkpoint stands that the run continues from, or None for a new run.

        Raises:
            UserError: the directory cannot be written, or its record is shorter than the checkpoint knew it.
        """
        try:
            metrics = directory / "metrics.jsonl"
            if resume_at is None:
                for stale in (
                    *directory.glob("events.out.tfevents.*"),
                    directory / "summary.json",
                    directory / "model.safetensors",
                    directory / "probes.jsonl",
                ):
                    stale.unlink(missing_ok=True)
                metrics.write_bytes(b"")
            else:
                if metrics.stat().st_size < resume_at.record_bytes:
                    raise UserError(
                        f"{metrics} is shorter than when the checkpoint at iteration {resume_at.iteration} was "
                        "written: restore it, or use another run_dir."
                    )
                os.truncate(metrics, resume_at.record_bytes)
                probes = read_probes(directory)
                if probes:
                    write_probes(directory, (line for line in probes if line["iteration"] <= resume_at.iteration))
            write_atomically(directory / "config.yaml", _yaml(config.to_mapping()).encode())
            write_json(directory / "provenance.json", origin)
            start = {name: origin[name] for name in ("started", "host", "devices", "git", "command")}
            start |= {"iteration": resume_at.iteration if resume_at else 0, "processes": len(origin["devices"])}
            with (directory / "starts.jsonl").open("w" if resume_at is None else "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(start)) + "\n")
            record = cls(
                directory,
                metrics.open("a", encoding="utf-8"),
                (directory / "log.txt").open("a", encoding="utf-8"),
                Events(directory, resume_at.iteration if resume_at else None),
            )
            if resume_at is None:
                record._events.hparams(origin)
            record.summary({"status": "running"})
        except OSError as error:
            raise UserError(f"run_dir={directory} cannot be written: {error}.") from None
        return record

    def size(self) -> int:
        """Return the length of ``metrics.jsonl`` in bytes, everything written so far included."""
        self._metrics.flush()
        return self._metrics.tell()

    def settle(self) -> None:
        """Wait until ``metrics.jsonl`` is on the disk, as far as it was written."""
        os.fsync(self._metrics.fileno())

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append one line, and the same figures as TensorBoard scalars.

        Raises:
            OSError: it cannot be written; the run must not go on unrecorded.
        """
        self._metrics.write(json.dumps(finite(values)) + "\n")
        self._metrics.flush()
        self._events.scalars(values)

    def log(self, text: str) -> None:
        """Append a line to ``log.txt``, with the time; a full disk costs the line."""
        _write_line(self._log, text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace ``summary.json``."""
        write_summary(self.directory, values)

    def close(self) -> None:
        """Close the files."""
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):  # what a full disk did not take has been told of
                file.close()
        self._events.close()


def append_log(directory: Path, text: str) -> None:
    """Append a line to the ``log.txt`` of a run that has no process to do so."""
    with contextlib.suppress(OSError), (directory / "log.txt").open("a", encoding="utf-8") as file:
        _write_line(file, text)


def _write_line(file: IO[str], text: str) -> None:
    with contextlib.suppress(OSError):
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        file.flush()


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
