"""Directories of compact records, as they were written before there was ``runs.jsonl``."""

import json
from pathlib import Path

from largebatch.records.packed import unpack
from largebatch.records.write import _yaml, write_json


def unpacked(file: Path, parent: Path) -> Path:
    """Write every run of a file as a directory, and return the parent of these."""
    for run in unpack(file).values():
        place = parent / run.name
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(_yaml(run.config), encoding="utf-8")
        write_json(place / "provenance.json", run.provenance)
        write_json(place / "summary.json", run.summary)
        (place / "metrics.jsonl").write_text("".join(f"{line}\n" for line in run.epochs), encoding="utf-8")
        for name, lines in (("starts", run.starts), ("probes", run.probes)):
            if lines:
                (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return parent
