"""Read and write ``runs.jsonl``: the runs of a study in one text file that is small enough to commit.

A run is a line ``{"kind": "run", "run": NAME, "config": …, "provenance": …, "summary": …, "starts": [...]}``, then its
epoch lines as ``metrics.jsonl`` has them, then its probes, each as ``{"kind": "probe", …}``. Runs are sorted by their
names. A run in ``DIR/runs.jsonl`` is named like a directory, ``DIR/NAME``, wherever a command takes a run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically

NAME = "runs.jsonl"
_RUN = '{"kind": "run"'
_PROBE = '{"kind": "probe"'


@dataclass(frozen=True)
class Packed:
    """A run as the file has it.

    Attributes:
        name: Of its directory.
        config: The values of ``config.yaml``.
        provenance: ``provenance.json``.
        summary: ``summary.json``; None of a run that had none.
        starts: The lines of ``starts.jsonl``.
        epochs: The epoch lines, as text.
        probes: The lines of ``probes.jsonl``.
    """

    name: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    summary: dict[str, Any] | None
    starts: list[dict[str, Any]]
    epochs: list[str]
    probes: list[dict[str, Any]]

    def lines(self) -> Iterable[str]:
        """Return its lines in the file."""
        head = {"kind": "run", "run": self.name, "config": self.config, "provenance": self.provenance}
        yield json.dumps({**head, "summary": self.summary, "starts": self.starts}, ensure_ascii=False)
        yield from self.epochs
        yield from (json.dumps({"kind": "probe", **line}) for line in self.probes)


def unpack(file: Path) -> dict[str, Packed]:
    """Return the runs in a file by their names; none where there is no such file.

    Raises:
        UserError: a line is damaged, or two runs have one name.
    """
    try:
        status = file.stat()
    except OSError:
        return {}
    return _unpack(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=32)
def _unpack(file: Path, changed: int, size: int) -> dict[str, Packed]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    found: dict[str, Packed] = {}
    for number, line in enumerate(lines, start=1):
        try:
            _take(line, found)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"line {number} of {file} cannot be used ({error!r}): restore the file.") from None
    return found


def _take(line: str, found: dict[str, Packed]) -> None:
    """Add what a line says to the runs; a line that is not a run's first belongs to the last of them."""
    if line.startswith(_RUN):
        values = json.loads(line)
        if values["run"] in found:
            raise ValueError(f"{values['run']} is there twice")
        kept = {key: values[key] for key in ("config", "provenance", "summary", "starts")}
        if not isinstance(values["run"], str) or not isinstance(kept["starts"], list):
            raise TypeError("its name or its starts")
        found[values["run"]] = Packed(values["run"], **kept, epochs=[], probes=[])
        return
    if not found:
        raise ValueError("it belongs to no run")
    last = next(reversed(found.values()))
    if line.startswith(_PROBE):
        last.probes.append({key: value for key, value in json.loads(line).items() if key != "kind"})
    else:
        last.epochs.append(line)  # read when it is needed: a damaged one leaves out its run alone


def packed(directory: Path) -> Packed | None:
    """Return the run of this name in ``runs.jsonl``; None where there is none, or a directory of the name."""
    if directory.is_dir():
        return None
    return unpack(directory.parent / NAME).get(directory.name)


def pack(file: Path, runs: Iterable[Packed]) -> None:
    """Write runs into a file, beside those that it holds already.

    Raises:
        UserError: another run of the same name is in it.
        OSError: it cannot be written.
    """
    held = dict(unpack(file))
    for run in runs:
        before = held.get(run.name)
        if before and before.provenance["run_hash"] != run.provenance["run_hash"]:
            raise UserError(f"{file} has another run of the name {run.name}: choose another out=.")
        held[run.name] = run
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{line}\n" for name in sorted(held) for line in held[name].lines()]
    write_atomically(file, "".join(lines).encode())
