"""The run directory: what a run was asked, where it ran and what it measured. Reads and writes without torch.

Files (schema 1):

``config.yaml``
    The composed configuration.
``provenance.json``
    ``schema``, ``experiment_hash``, ``run_hash``, ``experiment``, ``placement``, ``git``, ``versions``,
    ``devices``, ``platform``, ``host``, ``command``, ``started``, ``environment``, ``decoder``, ``notes``, of ``data``
    the ``digest`` and the number of ``classes``, and ``user_code`` where the user's own is used: for each key its
    ``name``, ``file`` and ``sha256`` by file.
``data.json``
    The identity of the data, by which other data are refused: digest, names of the classes, and hashes of blocks of
    images; see :mod:`largebatch.data.identity`.
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
    A line for every place where it was measured how far k can grow, by rising ``iteration``:
    ``epoch`` as a fraction; ``rate`` η̂ there and ``small_rate`` η̂ / k; over the small steps ``cosine`` and ``distance``
    (from the second on) and ``end_point`` (from the first); ``gradient_squared`` |G|² and ``noise_trace`` tr Σ (of one
    sample); ``sharpness`` λ_max, whether it stood still, ``rate_times_sharpness`` η̂ λ_max and the ``stability_bound``
    it is to stay below; ``bn_mean_moved`` and ``bn_variance_moved`` since the line before; ``layers`` where asked for;
    ``seconds`` that it took.
``evaluations.jsonl``
    A line for each `largebatch eval` of the run, appended; see :mod:`largebatch.inference.summary`.
``quantized/``
    The network in integers, where `largebatch quantize` made one; see :mod:`largebatch.quantization.artifact`.
``starts.jsonl``
    A line each time that the run began or went on: ``started``, ``host``, ``iteration``, ``processes``, ``devices``,
    ``git``, ``command``, ``versions``, and ``user_code`` as in ``provenance.json``.
``skipped.txt``
    A line for each image that ``dataset.on_error=skip`` left out: where it lies, and why it cannot be read.
``log.txt``, ``logs/rank*.log``
    What was printed, by rank.
``lock``
    The run's owner, while it lives.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically
from largebatch.config.run import Config
from largebatch.records.provenance import SCHEMA
from largebatch.records.read import DATA, differences, read_probes, read_starts
from largebatch.records.tensorboard import Events

SKIPPED = "skipped.txt"


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


@dataclass(frozen=True)
class Position:
    """Position of a checkpoint: the iteration, and the length of ``metrics.jsonl`` in bytes."""

    iteration: int
    record_bytes: int


class Skipped:
    """Names images that were left out in a run's ``skipped.txt``, each once; every process of the run may write there.

    Args:
        directory: The run's.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / SKIPPED
        self._named: set[str] = set()

    def __call__(self, problem: str) -> None:
        """Name an image, unless this process or another one has."""
        line = " ".join(problem.split())
        if line in self._named:
            return
        self._named.add(line)
        with self._path.open("a+", encoding="utf-8", errors="backslashreplace") as file:
            file.seek(0)
            if line + "\n" not in file.readlines():
                file.write(line + "\n")


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
                    directory / DATA,
                    directory / SKIPPED,
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
            earlier = read_starts(directory)[-1:] if resume_at else []
            start = {name: origin[name] for name in ("started", "host", "devices", "git", "command", "versions")}
            start |= {"user_code": origin["user_code"]} if "user_code" in origin else {}
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
            for before in earlier:
                was, now = ({"git": one["git"], **one.get("versions", {}), **_digests(one)} for one in (before, start))
                changed = differences(was, now) if "versions" in before else []
                if changed:
                    record.say(f"resumed with other code or versions: {'; '.join(changed)}")
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

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        self.log(text)
        print(text, file=sys.stderr, flush=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace ``summary.json``."""
        write_summary(self.directory, values)

    def close(self) -> None:
        """Close the files."""
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):  # what a full disk did not take has been told of
                file.close()
        self._events.close()


def _digests(start: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the user's code by file."""
    return {name: digest for one in start.get("user_code", {}).values() for name, digest in one["sha256"].items()}


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
