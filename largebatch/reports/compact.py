"""Compact records: a run directory without its iteration lines, weights and logs, small enough to commit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.records.read import holds_run, read_metrics, read_provenance
from largebatch.records.runs import Run

FILES = ("config.yaml", "provenance.json", "summary.json", "starts.jsonl", "probes.jsonl")


def compact(run: Run, parent: Path) -> Path:
    """Write a compact record of a run, and return its directory; one that is there is written anew.

    Args:
        run: Left as it is.
        parent: Where the record goes, under the run's own name.

    Raises:
        UserError: another run, or one that is not compact, has that place; or it cannot be written.
    """
    target = parent / run.directory.name
    if holds_run(target):
        if (read_provenance(target) or {}).get("run_hash") != run.provenance["run_hash"]:
            raise UserError(f"{target} holds another run: choose another out=.")
        # Without metrics it is a compact record whose writing was cut short.
        if (target / "metrics.jsonl").exists() and read_metrics(target, "iteration"):
            raise UserError(f"{target} holds a whole run, which a compact record would replace: choose another out=.")
    try:
        _write(run, target)
    except OSError as error:
        raise UserError(f"out={parent} cannot be written: {error}.") from None
    return target


def _write(run: Run, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (run.directory / name).exists() and run.directory.resolve() != target.resolve():
            shutil.copyfile(run.directory / name, target / name)
    lines = [json.dumps(line) + "\n" for line in read_metrics(run.directory, "epoch")]
    (target / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
