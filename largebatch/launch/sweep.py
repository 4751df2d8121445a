"""``largebatch train -m``: many runs, planned together, and run on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.base.outcome import FAULT, STATUS, Outcome, say
from largebatch.base.signals import ENDED, INTERRUPTED, Ended, ended_by_signals
from largebatch.config.launchers import LocalConfig
from largebatch.config.run import Config
from largebatch.launch import arrays
from largebatch.launch.arms import attempt, exit_status
from largebatch.launch.checks import check_networks, with_digests
from largebatch.launch.manifest import NAME, Arm, Task, log_of, nothing_allotted, plan
from largebatch.launch.origin import note_call
from largebatch.launch.run import train_run
from largebatch.launch.sbatch import ranges
from largebatch.launch.status import distinct, over, read_outcome, write_outcome
from largebatch.records.read import REPLACED, describe, holds_run, read_summary
from largebatch.runtime.lock import holder, owned


def sweep_arms(directory: Path, arms: Sequence[Arm]) -> int:
    """Plan the arms of ``train -m``, run or submit those that are not done, and return the exit status.

    Raises:
        UserError: an arm is refused; nothing was started.
    """
    to_slurm = arms[0].values["launcher"]["name"] == "slurm"
    if to_slurm:
        arms = [arrays.on_nodes(arm) for arm in arms]
    try:
        check_networks(arms, here=not to_slurm)
        arms = without_repeats(with_digests(arms, here=not to_slurm))
    except UserError:
        _remove_unplanned(directory)
        raise
    try:
        with be_owner(directory):
            tasks = plan(directory, arms, arrays.resources if to_slurm else nothing_allotted)
            for task, arm in zip(tasks, arms, strict=True):
                if arm.values["sweep"]["force"]:
                    put_away(directory, task)
            say_other_code(directory, tasks[0])
            if to_slurm and arms[0].values["launcher"]["dry_run"]:
                return show(directory, tasks)
            return submit(directory, tasks) if to_slurm else run_here(directory, tasks)
    except UserError:
        _remove_unplanned(directory)
        raise


def without_repeats(arms: Sequence[Arm]) -> list[Arm]:
    """Leave out arms that are the same run as an earlier one, number for number, and say which.

    They have the same rate at every iteration, whatever names that has, and are equal in all else. An arm that names
    its own run_dir stays, and so does an arm that is refused: the plan says why.
    """
    first: dict[str, tuple[str, str]] = {}
    kept = []
    for arm in arms:
        try:
            config = Config.from_mapping(arm.values)
        except UserError:
            kept.append(arm)
            continue
        run = config.run_hash(config.precision)
        words, same = first.setdefault(config.same_rates_key(config.precision), (arm.words, run))
        if same == run or config.run_dir:
            kept.append(arm)
        else:
            say(f"'{arm.words}' is the run of '{words}': the rate is the same at every iteration. It is trained once.")
    return kept


def _remove_unplanned(directory: Path) -> None:
    """Remove what Hydra and the lock have left in a directory that has not become a sweep's."""
    if not (directory / NAME).exists():
        for name in ("multirun.yaml", "lock"):
            (directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it was not ours alone
            os.removedirs(directory)


def say_other_code(directory: Path, task: Task) -> None:
    """Note this start of the sweep, and say so where its code is not that of the one before."""
    changed = note_call(directory, task.config.launcher)
    if changed:
        say(f"The code has changed since this sweep was last started: {'; '.join(changed)}.")


@contextlib.contextmanager
def be_owner(directory: Path, patience: float = 3.0) -> Iterator[None]:
    """Be the only process that plans or runs this sweep, or this task of one."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owned(directory, patience))
        except UserError:
            owner = holder(directory)
            who = f"process {owner.pid} on {owner.host}" if owner else "another process"
            raise UserError(f"{directory} is in the hands of {who}: wait until it has ended.") from None
        yield


def put_away(directory: Path, task: Task) -> None:
    """Move the record of a run that is to be run again to where nothing is lost and no report finds it."""
    if not holds_run(task.directory):
        return
    if owner := holder(task.directory):
        raise UserError(f"sweep.force=true cannot begin {task.directory} again: process {owner.pid} is running it.")
    place = directory / REPLACED / f"{task.number}-{task.directory.name}"
    place.mkdir(parents=True, exist_ok=True)
    target = place / str(len(list(place.iterdir())))
    shutil.move(task.directory, target)
    say(f"The earlier record of {task.directory} was moved to {target}.")


def submit(directory: Path, tasks: Sequence[Task]) -> int:
    """Submit those tasks to SLURM that have no result yet, and are not on their way to one; say how to look at them."""
    missing = arrays.missing(directory, tasks)
    if len(missing) < len(tasks):
        say(f"{len(tasks) - len(missing)} of {len(tasks)} tasks are complete or running.")
    for job, array in arrays.submit(directory, missing).items():
        asked = f"nodes={array.nodes} processes={array.processes} gpus={array.gpus}"
        say(f"submitted job {job}: tasks {ranges(array.tasks)}, each with {asked}")
    say(f"to see their states: largebatch sweep status {shlex.quote(str(directory))}")
    return 0


def show(directory: Path, tasks: Sequence[Task]) -> int:
    """Print the batch scripts of the tasks that have no result yet, and keep them where sbatch may take them from."""
    scripts = arrays.keep_scripts(directory, [task for task in tasks if over(task) is None])
    print("\n".join(path.read_text(encoding="utf-8") for path in scripts), end="")
    names = " ".join(shlex.quote(str(path)) for path in scripts)
    say(
        f"Nothing was submitted. The sweep is planned in {directory}: submit it with largebatch sweep resume "
        f"{shlex.quote(str(directory))}" + (f", or by hand with sbatch {names}" if names else "")
    )
    return 0


def run_here(directory: Path, tasks: Sequence[Task]) -> int:
    """Run tasks on this machine; end with a table of them all."""
    launcher = tasks[0].config.launcher
    jobs = launcher.jobs if isinstance(launcher, LocalConfig) else 1
    outcomes = _in_turn(directory, tasks) if jobs == 1 else _at_once(directory, tasks, jobs)
    statuses = [outcome.status for outcome in outcomes.values()]
    left = [task for task in tasks if over(task) is None]
    if left:
        command = f"largebatch sweep resume {shlex.quote(str(directory))}"
        say(f"\n{len(left)} of {len(tasks)} are not done. To continue: {command}")
    words = distinct([task.words for task in tasks])
    nothing = Outcome(ENDED, summary={"status": "waiting"})
    rows = [(arm, outcomes.get(task.number, nothing).summary) for arm, task in zip(words, tasks, strict=True)]
    say("\n" + describe(rows))
    return exit_status(statuses)


def _in_turn(directory: Path, tasks: Sequence[Task]) -> dict[int, Outcome]:
    """Run tasks in this process until all have ended, or one was interrupted."""
    outcomes: dict[int, Outcome] = {}
    words = distinct([task.words for task in tasks])
    for position, task in enumerate(tasks):
        say(f"── {position + 1} of {len(tasks)}: {words[position]}")
        outcomes[task.number] = _done_already(task) or attempt(partial(run_task, directory, task))
        if outcomes[task.number].status in (INTERRUPTED, ENDED):
            break
    return outcomes


def _at_once(directory: Path, tasks: Sequence[Task], jobs: int) -> dict[int, Outcome]:
    """Run tasks in processes of their own, a line for each that begins or ends."""
    from largebatch.launch.parallel import run_at_once

    places = {task.number: f"── {place} of {len(tasks)}" for place, task in enumerate(tasks, start=1)}
    words = dict(zip(places, distinct([task.words for task in tasks]), strict=True))
    outcomes: dict[int, Outcome] = {}
    for task in tasks:
        if done := _done_already(task):
            outcomes[task.number] = done

    def started(task: Task) -> None:
        say(f"{places[task.number]} started: {words[task.number]}")

    def ended(task: Task, status: int) -> None:
        outcome = outcomes[task.number] = _outcome_of_process(directory, task, status)
        error = outcome.summary.get("final_error")
        shown = "" if error is None else f", error {error:.2f} %"
        say(f"{places[task.number]} {outcome.summary['status']}{shown}: {words[task.number]}")
        if outcome.status == FAULT:
            say(f"largebatch: {outcome.summary['reason']} Its log is {log_of(directory, task.number)}.")

    left = [task for task in tasks if task.number not in outcomes]
    if left:
        run_at_once(directory, left, jobs, started, ended)
    return outcomes


def _outcome_of_process(directory: Path, task: Task, status: int) -> Outcome:
    """Return what a task came to whose process ended with ``status``, negative where a signal killed it."""
    seen = read_summary(task.directory) or {}
    if status in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1):  # before it could heed them
        status = INTERRUPTED if status == -signal.SIGINT else ENDED
        write_outcome(directory, task.number, "interrupted")
    elif status < 0:
        write_outcome(directory, task.number, "failed", f"It was killed by {signal.Signals(-status).name}.")
    if status in (INTERRUPTED, ENDED):
        return Outcome(status, str(task.directory), {**seen, "status": "interrupted"})
    if summary := over(task):
        return Outcome(STATUS[summary["status"]], str(task.directory), summary)
    reason = (read_outcome(directory, task.number) or {}).get("reason") or f"It ended with exit status {status}."
    return Outcome(FAULT, str(task.directory), {**seen, "status": "failed", "reason": reason})


def _done_already(task: Task) -> Outcome | None:
    summary = over(task)
    if summary is None:
        return None
    say(f"{summary['status']} already: {task.directory}. Nothing was changed; sweep.force=true runs it again.")
    return Outcome(STATUS[summary["status"]], str(task.directory), summary)


def run_task(directory: Path, task: Task) -> Outcome:
    """Run one task in this process or rank, and leave word in the sweep of how it ended."""
    with ended_by_signals():
        try:
            if os.environ.get("RANK", "0") != "0":
                return train_run(task.config)
            with be_owner(log_of(directory, task.number).parent):
                return _noted(directory, task)
        except (KeyboardInterrupt, Ended) as stop:
            status = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else ENDED
            return Outcome(status, str(task.directory), {"status": "interrupted"})


def _noted(directory: Path, task: Task) -> Outcome:
    """Train, and leave word of it before and after."""
    try:
        write_outcome(directory, task.number, "running")
        outcome = train_run(task.config)
    except (KeyboardInterrupt, Ended):
        write_outcome(directory, task.number, "interrupted")
        raise
    except Exception as error:
        write_outcome(directory, task.number, "failed", str(error).partition("\n")[0] or type(error).__name__)
        raise
    state = {INTERRUPTED: "interrupted", ENDED: "interrupted", FAULT: "failed"}.get(outcome.status, "over")
    write_outcome(directory, task.number, state)
    return outcome
