"""``largebatch sweep``: look at a sweep, go on with it, end it, or run one task of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from largebatch.base.errors import UserError, nearest
from largebatch.base.files import at_home
from largebatch.base.outcome import say
from largebatch.base.progress import Redrawn
from largebatch.cli.arguments import BOOLEAN, WIDTH, Vocabulary, Word, is_asked_for_help, verb_first
from largebatch.cli.command import PlainCommand
from largebatch.config.launchers import SlurmConfig
from largebatch.launch import sbatch
from largebatch.launch.manifest import Task, log_of, read, task_of
from largebatch.launch.status import Standing, as_table, standings
from largebatch.launch.sweep import be_owner, run_here, run_task, say_other_code, submit
from largebatch.runtime.lock import Holder, holder

LOG_LINES = 20
WATCH_SECONDS = 2.0  # between two looks at the records


@dataclass(frozen=True)
class _Verb:
    """A word after ``sweep``: the words that it takes, what it does in a line and at length, and the function."""

    takes: str
    summary: str
    help: str
    run: Callable[[list[str]], int]


def _run(words: list[str]) -> int:
    directory, word = _places("run", words, 2)
    return run_task(directory, task_of(directory, read(directory), word)).status


def _status(words: list[str]) -> int:
    directory, *rest = words
    given = STATUS_WORDS.read(rest)
    if given is None:
        return 0
    directory = at_home(directory)
    watch, shape = given.flag("watch"), given.text("format")
    if watch and shape == "json":
        raise UserError("watch=true is for people, and format=json for programs: take one of them.")
    place = Path(directory)
    if watch:
        return _watch(place)
    found = _standings(place)
    if shape == "json":
        print(
            json.dumps(
                {"directory": directory, "tasks": [dataclasses.asdict(standing) for standing in found]}, indent=2
            )
        )
    else:
        print(as_table(found))
    return 0


def _watch(directory: Path) -> int:
    """Show a table that follows the sweep until nothing more will happen by itself, or Ctrl-C."""
    lines = Redrawn(sys.stdout)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            found = _standings(directory)
            if sys.stdout.isatty():
                lines.show(as_table(found))
            waited_for = ("queued", "running", "waiting") if holder(directory) else ("queued", "running")
            if not any(standing.state in waited_for for standing in found):
                break
            time.sleep(WATCH_SECONDS)
    if not sys.stdout.isatty():
        print(as_table(_standings(directory)))
    return 0


def _resume(words: list[str]) -> int:
    directory, _ = _places("resume", words, 1)
    read(directory)  # before it is owned: a directory that is no sweep is left as it is
    with be_owner(directory):
        tasks = read(directory)
        numbers = [standing.task for standing in _standings(directory, tasks) if standing.missing]
        if not numbers:
            say(f"Nothing of {directory} is left to be run.")
            return 0
        left = [tasks[number] for number in numbers]
        say_other_code(directory, left[0])
        return submit(directory, left) if _is_submitted(tasks) else run_here(directory, left)


def _cancel(words: list[str]) -> int:
    directory, _ = _places("cancel", words, 1)
    tasks = read(directory)
    if _is_submitted(tasks):
        ended = sbatch.cancel(directory)
        say(f"Cancelled: {', '.join(ended)}." if ended else f"Nothing of {directory} waits or runs.")
        return 0
    # The process that runs the sweep passes the signal on to its tasks: a second one would end them at once.
    owner = holder(directory)
    owners = [owner] if owner else [held for task in tasks if (held := _runner(directory, task))]
    for held in owners:
        if held.host != socket.gethostname():
            raise UserError(f"{directory} is being run on {held.host}, by process {held.pid}: cancel it there.")
        try:
            os.kill(held.pid, signal.SIGTERM)
        except PermissionError:
            raise UserError(f"{directory} is being run by another user, in process {held.pid}: ask them.") from None
        except ProcessLookupError:  # it has just ended
            continue
    if owners:
        say(f"The tasks will write checkpoints and stop. To continue later: largebatch sweep resume {directory}")
    else:
        say(f"Nothing of {directory} runs.")
    return 0


def _logs(words: list[str]) -> int:
    directory, word = _places("logs", words, 2)
    task = task_of(directory, read(directory), word)
    own = [log_of(directory, task.number), task.directory / "log.txt"]
    found = [path for path in (*own, *sorted((task.directory / "logs").glob("*.log"))) if path.is_file()]
    if not found:
        print(f"Task {task.number} of {directory} has not printed anything: {_standings(directory, [task])[0].state}.")
        return 0
    for path in found:
        print(path)
    print(f"\nThe last lines of {found[0]}:")
    print("\n".join(found[0].read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]))
    return 0


def _is_submitted(tasks: Sequence[Task]) -> bool:
    return any(isinstance(task.config.launcher, SlurmConfig) for task in tasks)


def _runner(directory: Path, task: Task) -> Holder | None:
    """Return the process that runs a task."""
    return holder(log_of(directory, task.number).parent)


def _standings(directory: Path, tasks: Sequence[Task] | None = None) -> list[Standing]:
    """Return where tasks stand, all of a sweep's by default; a scheduler is asked where there is one."""
    tasks = read(directory) if tasks is None else tasks
    if not (_is_submitted(tasks) and shutil.which("scontrol")):  # records can be looked at anywhere
        return standings(directory, tasks)
    return standings(directory, tasks, sbatch.states(directory))


def _places(verb: str, words: list[str], count: int) -> tuple[Path, str]:
    """Return DIR, and TASK where ``count`` is 2, else ""."""
    if len(words) != count:
        extra = f" '{words[count]}' is one argument too many." if len(words) > count else ""
        raise UserError(f"sweep {verb} takes {VERBS[verb].takes}.{extra} See `largebatch sweep {verb} --help`.")
    return Path(at_home(words[0])), words[1] if count == 2 else ""


STATUS_WORDS = Vocabulary(
    "sweep status DIR",
    "Print a line for every task of a sweep: its state, completed epochs, its error in %, the number of restarts, and "
    "the cause of a failure. The states: waiting (not started), queued (at the scheduler), running, done, stopped "
    "(early, because of iterations=…), diverged (a result), interrupted (it continues from its checkpoint), failed.",
    (
        Word("watch", "false", "Update a table in the terminal until no task runs, or Ctrl-C.", BOOLEAN),
        Word("format", "text", "Output format.", ("text", "json")),
    ),
    (
        ("sweep status runs/sweeps/20260101-120000-000000", "print the states"),
        ("sweep status runs/paper watch=true", "follow it"),
        ("sweep status runs/paper format=json", "for a program"),
    ),
)
VERBS = {
    "status": _Verb("DIR [watch=true] [format=json]", "print the states of its tasks", "", _status),
    "resume": _Verb(
        "DIR",
        "run or submit what is missing, interrupted or failed",
        "Run the tasks that are missing, interrupted or failed, in the way that the sweep was started: on this "
        "machine or "
        "with SLURM. Interrupted runs continue from their last checkpoint. Complete runs are left alone; the command "
        "that started the sweep, with hydra.sweep.dir=DIR and sweep.force=true, runs them again. If the code has "
        "changed since the last start, a line is printed.",
        _resume,
    ),
    "cancel": _Verb(
        "DIR",
        "stop what runs, with a checkpoint, and start nothing more",
        "Tell running tasks to write a checkpoint and stop. Tasks of SLURM are removed from the queue. "
        "`largebatch sweep resume DIR` continues it.",
        _cancel,
    ),
    "logs": _Verb(
        "DIR TASK",
        "print the paths of a task's logs, and their last lines",
        "Print the paths of a task's logs, and their last lines. TASK is its number in `largebatch sweep status DIR`.",
        _logs,
    ),
    "run": _Verb(
        "DIR TASK",
        "run one task on this machine, as a batch script does",
        "Run or resume one task of a sweep in this process. With RANK and WORLD_SIZE set, every rank runs this. "
        "Batch scripts call it. Exit status: as of `largebatch train`.",
        _run,
    ),
}


def _usage() -> str:
    calls = {f"sweep {name} {verb.takes}": verb.summary for name, verb in VERBS.items()}
    width = max(map(len, calls))
    return "\n".join(
        [
            "largebatch sweep: manage a sweep of `largebatch train -m` in DIR, by default in runs/sweeps.",
            "",
            *(f"  {call:<{width}}  {summary}" for call, summary in calls.items()),
            "",
            "largebatch sweep VERB --help describes each. Exit status of run and resume:",
            "0 all complete, 1 a task failed, 75 ended, 130 interrupted; 2 a mistake in the arguments.",
        ]
    )


def sweep(words: list[str]) -> int:
    """Do what the words after ``sweep`` say, and return the exit status."""
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    name, *rest = words
    if name not in VERBS:
        raise UserError(f"'sweep {name}' is not known: sweep takes {', '.join(VERBS)}.{nearest(name, VERBS)}")
    if is_asked_for_help(rest):
        verb = VERBS[name]
        print(
            STATUS_WORDS.help()
            if name == "status"
            else f"largebatch sweep {name} {verb.takes}\n\n{fill(verb.help, WIDTH)}"
        )
        return 0
    rest = verb_first(rest)
    if not rest or rest[0].startswith(("watch=", "format=")):
        raise UserError(f"sweep {name} takes {VERBS[name].takes}: give the sweep's directory first.")
    return VERBS[name].run(rest)


SWEEP = PlainCommand("show, resume or cancel a sweep, or run one task of it", sweep)
