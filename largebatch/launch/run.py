"""Train one run: decide once where it goes and what it is, start its processes, restart them, correct the summary."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.outcome import STATUS, Outcome, say
from largebatch.base.progress import said_after
from largebatch.base.signals import ENDED, INTERRUPTED
from largebatch.config.groups import KNOWN_BY_DIGEST
from largebatch.config.run import Config
from largebatch.records.provenance import Run
from largebatch.records.read import differences, holds_run, read_data, read_provenance, read_summary
from largebatch.records.write import append_log, ended_by, write_summary
from largebatch.runtime.lock import holder
from largebatch.runtime.placement import Placement, place


def train_run(config: Config) -> Outcome:
    """Train what ``config`` says, unless it is done already; where a process dies, go on from the last checkpoint."""
    with said_after(1, "loading PyTorch …"):
        from largebatch.runtime.processes import RankLost, Stopped, launch
        from largebatch.runtime.world import hardware, started_outside
        from largebatch.training.loop import fit

    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun --max-restarts: this group follows another
        config = replace(config, resume=True)
    with said_after(1, f"looking at this machine and at the data of dataset={config.dataset.name} …"):
        run = run_of(config, place(config, hardware(config.device), *started_outside()))
    directory, restarts, summary = run.directory, 0, _left_by_a_run_that_is_over(run)
    if summary:
        error = summary["final_error"]
        shown = "" if error is None else f" (error {error:.2f} %)"
        say(f"{summary['status']} already: {directory}{shown}. Nothing was changed.")
        return Outcome(STATUS[summary["status"]], str(directory), summary)
    before = read_summary(directory)
    while not summary:
        try:
            summary = launch(fit, (run,), run.placement.processes, run.placement.threads)
        except Stopped as stop:
            summary = read_summary(directory) or {}
            # Its processes were not in the loop yet, or slow.
            if summary == (before or {}) or summary.get("status") in ("running", "failed"):
                summary = {**summary, "status": "interrupted", "signal": stop.signal}
                _correct(directory, summary)
        except BaseException as error:
            if not isinstance(error, RankLost) or restarts == config.launcher.max_restarts:
                _note_failure(directory, error)
                raise
            restarts += 1
            note = f"{error} Restart {restarts} of {config.launcher.max_restarts} (launcher.max_restarts)."
            say(f"largebatch: {note}")
            append_log(directory, note)
            run = replace(run, config=replace(config, resume=True))
    if summary["status"] == "interrupted":
        return Outcome(INTERRUPTED if summary["signal"] == "SIGINT" else ENDED, str(directory), summary)
    return Outcome(STATUS[summary["status"]], str(directory), summary)


def run_of(config: Config, placement: Placement) -> Run:
    """Return the run of a configuration, with the digest of its data where that is part of the experiment.

    A run that an earlier version left goes on as it was named and hashed, without one.

    Raises:
        UserError: the data cannot be found.
    """
    from largebatch.data.layouts import with_digest

    run = Run.of(config, placement)
    before = (read_provenance(run.directory) or {}).get("experiment", {}).get("dataset", {})
    if config.dataset.name not in KNOWN_BY_DIGEST or (config.resume and before and "digest" not in before):
        return run
    return Run.of(replace(config, dataset=with_digest(config.dataset)), placement)


def _left_by_a_run_that_is_over(run: Run) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, or None where there is something to train.

    Raises:
        UserError: the directory holds a run that was not asked for.
    """
    config, directory = run.config, run.directory
    if not holds_run(directory):
        return None
    summary = read_summary(directory) or {"status": "running"}
    if not config.resume:
        over = summary["status"] in ("done", "diverged")
        way = "use another run_dir" if over else "use resume=true to continue it, or another run_dir"
        raise UserError(f"run_dir={directory} already holds a run (status {summary['status']}): {way}.")
    before = read_provenance(directory) or {}
    now = {**run.experiment, "seed": config.seed}
    changed = differences({**before.get("experiment", {}), "seed": before.get("seed")}, now)
    if changed:
        if len(changed) == 1 and changed[0].startswith("dataset.digest:"):
            _refuse_other_data(config, directory)
        raise UserError(
            f"run_dir={directory} holds another experiment, so it cannot be resumed as this one: "
            f"{'; '.join(changed)}. Use another run_dir."
        )
    wanted = min(config.iterations or math.inf, summary.get("scheduled_iterations", math.inf))
    over = summary["status"] == "diverged" or summary.get("iterations", -1) >= wanted
    return summary if over and summary["status"] in STATUS and summary["status"] != "failed" else None


def _refuse_other_data(config: Config, directory: Path) -> None:
    """Raise :class:`UserError` with the first difference between a run's data and those that are there now."""
    from largebatch.data.layouts import open_splits
    from largebatch.training.agreement import check_same

    identity = open_splits(config.dataset).identity()
    check_same(read_data(directory), identity, f"run_dir={directory}", "use another run_dir")


def _note_failure(directory: Path, error: BaseException) -> None:
    """Correct the summary of a run whose rank 0 was killed, or knows only that it lost another rank."""
    summary = read_summary(directory) or {}
    if summary.get("status") in ("running", "failed"):
        _correct(directory, {**summary, **ended_by(error)})


def _correct(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary for processes that could not, unless the directory is another run's by now."""
    if directory.is_dir() and holder(directory) is None:
        with contextlib.suppress(OSError):  # what went wrong is told on the terminal too
            write_summary(directory, summary)
