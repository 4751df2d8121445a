"""Determine the states of a sweep's tasks from their records, their owners' locks and the scheduler."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from largebatch.base.errors import UserError
from largebatch.launch.manifest import Task, log_of
from largebatch.records.read import read_provenance, read_starts, read_summary
from largebatch.records.write import write_json
from largebatch.runtime.lock import holder

OUTCOME = "outcome.json"
TAIL = 1 << 16  # bytes of a record in which its last line begins
WITHOUT_A_WORD = "its process ended without a message: it was killed, or the machine stopped"


class Scheduled(Protocol):
    """A scheduler's view of a task; ``state`` and ``reason`` are the scheduler's terms."""

    @property
    def queued(self) -> bool:
        """Whether it waits for its turn."""

    @property
    def running(self) -> bool:
        """Whether it occupies its nodes."""

    @property
    def state(self) -> str:
        """Its state."""

    @property
    def reason(self) -> str:
        """Why it waits or has ended."""

    @property
    def restarts(self) -> int:
        """Return the number of times that it was requeued."""


@dataclass(frozen=True)
class Standing:
    """State of a task.

    ``state`` is waiting (nothing has started it yet), queued (at the scheduler), running, done, stopped (early, as
    ``iterations`` said), diverged, interrupted (it goes on where it stopped) or failed. ``epoch`` is a fraction of
    ``epochs``; ``error`` the final one in %, or else the last epoch's; ``restarts`` how often the run went on.
    """

    task: int
    words: str
    state: str
    epoch: float
    epochs: int
    error: float | None
    restarts: int
    reason: str
    directory: str

    @property
    def missing(self) -> bool:
        """Whether a resumed sweep would start it."""
        return self.state in ("waiting", "interrupted", "failed")


def standings(
    directory: Path, tasks: Sequence[Task], scheduled: Mapping[int, Scheduled] | None = None
) -> list[Standing]:
    """Return where each of ``tasks`` stands. Not to be called by a process that is running one of them.

    Args:
        directory: The sweep's.
        tasks: Some of its tasks.
        scheduled: What the scheduler knows of tasks, by number; None: there is none.
    """
    words = distinct([task.words for task in tasks])
    return [_standing(directory, task, short, scheduled) for task, short in zip(tasks, words, strict=True)]


def _standing(directory: Path, task: Task, words: str, scheduled: Mapping[int, Scheduled] | None) -> Standing:
    summary = read_summary(task.directory) or {}
    known = scheduled.get(task.number) if scheduled else None
    state, reason = _state(directory, task, summary, known)
    epoch, error = progress(task.directory)
    return Standing(
        task=task.number,
        words=words,
        state=state,
        epoch=epoch,
        epochs=task.config.epochs,
        error=summary.get("final_error") if summary.get("final_error") is not None else error,
        restarts=max(len(read_starts(task.directory)) - 1, known.restarts if known else 0, 0),
        reason=reason,
        directory=str(task.directory),
    )


def _state(directory: Path, task: Task, summary: Mapping[str, Any], known: Scheduled | None) -> tuple[str, str]:
    """Return a task's state and the reason for it: who lives comes before what was written."""
    if holder(log_of(directory, task.number).parent) or holder(task.directory):
        return "running", ""
    if known and known.queued:
        return "queued", known.reason
    if known and known.running:
        return "running", ""
    if over(task) is not None:
        return str(summary["status"]), ""
    outcome = read_outcome(directory, task.number) or {"state": "waiting", "reason": ""}
    ended = f"{known.state} {known.reason}".strip() if known else ""
    match outcome["state"]:
        case "running":  # nobody is
            if summary.get("status") == "failed":  # a run that hangs leaves word there alone
                return "failed", str(summary["reason"])
            return "failed", f"{WITHOUT_A_WORD} ({ended})" if ended else WITHOUT_A_WORD
        case "failed":
            return "failed", outcome["reason"] or str(summary.get("reason", ""))
        case "interrupted":
            return "interrupted", ended
    if ended and outcome["state"] == "waiting":
        return "failed", f"it ended before it began: {ended}"
    return "waiting", ""  # also where it was over, and more has been asked for since


def over(task: Task) -> dict[str, Any] | None:
    """Return the summary of a task that has nothing left to do, or None: there is something to train."""
    summary, origin = read_summary(task.directory), read_provenance(task.directory)
    if not (summary and origin):
        return None
    experiment, config = origin.get("experiment", {}), task.config
    if config.dataset.digest is None:  # the data could not be seen when the task was planned
        config = replace(config, dataset=replace(config.dataset, digest=experiment.get("dataset", {}).get("digest")))
    if origin.get("run_hash") != config.run_hash(experiment.get("precision", "")):
        return None  # another run is recorded there, which only the run itself can refuse
    reached = task.config.iterations is not None and summary.get("iterations", 0) >= task.config.iterations
    status = summary.get("status")
    return summary if status in ("done", "diverged") or (status == "stopped" and reached) else None


def progress(directory: Path) -> tuple[float, float | None]:
    """Return how many epochs a run has come, and the validation error in % of the last one, from its record's end."""
    epoch, error = 0.0, None
    for line in _last_lines(directory / "metrics.jsonl"):
        epoch = max(epoch, line["epoch"])
        error = line.get("val_error", error)
    return epoch, error


def _last_lines(path: Path) -> Iterable[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # cut by the tail's beginning, or still being written
            continue
        yield line


def write_outcome(directory: Path, number: int, state: str, reason: str = "") -> None:
    """Leave word of a task's last start: running, over, interrupted, or failed and why."""
    write_json(log_of(directory, number).parent / OUTCOME, {"state": state, "reason": reason})


def read_outcome(directory: Path, number: int) -> dict[str, Any] | None:
    """Return what :func:`write_outcome` wrote last, or None: the task was never started.

    Raises:
        UserError: it was damaged.
    """
    path = log_of(directory, number).parent / OUTCOME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(values[name]) for name in ("state", "reason")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: take it away, then the task counts as never started.") from None


def distinct(words: Sequence[str]) -> list[str]:
    """Return arms' overrides without those that all of them share; a single arm's as they are."""
    split = [text.split(" ") for text in words]
    shared = set.intersection(*map(set, split)) if len(split) > 1 else set()
    return [" ".join(word for word in arm if word not in shared) for arm in split]


def as_table(found: Sequence[Standing]) -> str:
    """Return a line for every task, under a heading."""
    rows = [("task", "state", "epoch", "error %", "restarts", "run", "reason")]
    for task in found:
        error = "–" if task.error is None else f"{task.error:.2f}"
        epoch = f"{task.epoch:.1f} of {task.epochs}"
        rows.append((str(task.task), task.state, epoch, error, str(task.restarts), task.words, task.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
