"""Read runs: directories, which :mod:`largebatch.records.write` describes, and those of a ``runs.jsonl``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.config.keys import complete
from largebatch.config.run import Config
from largebatch.records.packed import packed

DATA = "data.json"  # the identity of the data, see largebatch.data.identity
REPLACED = "replaced"  # in a sweep's directory: records of runs that were made again


def safe_name(text: str) -> str:
    """Return ``text`` in letters, digits, dot, underscore and hyphen alone, and not a hidden name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def default_directory(config: Config, run_hash: str, parent: Path | None = None) -> Path:
    """Return where a run is recorded if it does not say: its names, its seed and its hash.

    Args:
        config: The run.
        run_hash: That of the run, in the precision that it has.
        parent: A sweep's directory; by default ``runs/<dataset>-<model>``.
    """
    group = safe_name(f"{config.dataset.name}-{config.model.name}")
    mistake = "" if config.pitfall.name == "none" else f"-{config.pitfall.name}"
    name = safe_name(f"k{config.k}-n{config.n}-{config.warmup.name}{mistake}-s{config.seed}-{run_hash[:8]}")
    return (parent or Path("runs") / group) / name


def holds_run(directory: Path) -> bool:
    """Whether a run has been recorded there."""
    # Not Path.exists(), which raises where the directory may not be looked into.
    files = ("provenance.json", "metrics.jsonl", "summary.json")
    return any(os.access(directory / name, os.F_OK) for name in files) or packed(directory) is not None


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, or None where there is none that can be read."""
    kept = packed(directory)
    return _read_json(directory / "summary.json") if kept is None else kept.summary


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """Return ``provenance.json``, or None where there is none that can be read."""
    kept = packed(directory)
    return _read_json(directory / "provenance.json") if kept is None else dict(kept.provenance)


def read_data(directory: Path) -> dict[str, Any] | None:
    """Return ``data.json``, or None where there is none that can be read: earlier versions wrote none."""
    return None if packed(directory) else _read_json(directory / DATA)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_config(directory: Path) -> dict[str, Any]:
    """Return a run's configuration.

    A key that was added since the run was recorded has the value that describes what the run did.

    Raises:
        UserError: it cannot be read, or was written by something else.
    """
    kept = packed(directory)
    return complete(recorded_config(directory) if kept is None else kept.config)


def recorded_config(directory: Path) -> dict[str, Any]:
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
    if kept := packed(directory):
        return kept.starts
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
    if kept := packed(directory):
        return kept.probes
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
