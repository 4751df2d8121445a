"""Compact records: what reports and a reader need of runs, in one file that is small enough to commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.records.packed import NAME, Packed, pack, packed
from largebatch.records.read import read_metrics, read_probes, read_starts, read_summary, recorded_config
from largebatch.records.runs import Run


def compact(runs: Iterable[Run], parent: Path) -> Path:
    """Write runs into ``runs.jsonl``, beside those that it holds, and return the file.

    Args:
        runs: Left as they are; those that are in the file already are written anew.
        parent: The directory of the file.

    Raises:
        UserError: the file holds another run of a name, or cannot be written.
    """
    file = parent if parent.name == NAME else parent / NAME
    try:
        pack(file, map(_packed, runs))
    except OSError as error:
        raise UserError(f"out={parent} cannot be written: {error}.") from None
    return file


def _packed(run: Run) -> Packed:
    place = run.directory
    return packed(place) or Packed(
        place.name,
        recorded_config(place),
        run.provenance,
        read_summary(place),
        read_starts(place),
        [json.dumps(line) for line in read_metrics(place, "epoch")],
        read_probes(place),
    )
