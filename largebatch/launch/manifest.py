"""A sweep's directory: which runs it is made of, where each is recorded, and which code they were planned with.

Files:

``manifest.jsonl``
    A line a task: ``number`` (from 0), ``words`` (the arm's overrides, for people), ``config`` (as
    :meth:`Config.from_mapping` takes it; ``run_dir`` is relative to the sweep's directory, so that a sweep can be
    moved, but absolute where the words gave one outside), ``hash`` (of experiment and seed, with the precision as
    configured), ``resources``.
``sweep.json``, ``code-*.diff``
    The calls that planned it: see :mod:`largebatch.launch.origin`.
``tasks/<number>/``
    ``log.txt``, what the task printed; ``outcome.json``, how its last start ended; ``lock``, while it runs.
``replaced/``
    Records of runs that ``sweep.force=true`` ran again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically
from largebatch.config.build import build
from largebatch.config.keys import complete
from largebatch.config.run import Config
from largebatch.records.read import default_directory

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Arm:
    """One combination of a sweep's values: its overrides as they were typed, and what they compose to."""

    words: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resources:
    """Resources that a task requests from a scheduler, in total; null if none are allotted.

    ``processes`` are its ranks, shared out evenly over ``nodes``, as are its ``gpus``.
    """

    nodes: int | None = None
    processes: int | None = None
    gpus: int | None = None


@dataclass(frozen=True)
class Task:
    """A run of a sweep. ``config.run_dir`` is its directory, as seen from here; ``config.resume`` is true."""

    number: int
    words: str
    config: Config
    hash: str
    resources: Resources = field(default_factory=Resources)

    @property
    def directory(self) -> Path:
        """The run's."""
        return Path(self.config.run_dir or "")


def nothing_allotted(config: Config) -> Resources:
    """Ask for nothing: the run finds what this machine has."""
    return Resources()


def plan(
    directory: Path, arms: Sequence[Arm], resources: Callable[[Config], Resources] = nothing_allotted
) -> list[Task]:
    """Write a sweep's manifest, or add to it, and return the tasks of ``arms``, in their order.

    Every arm is checked before anything is written. An arm whose run has a task already keeps its number, and
    takes over what it says now of keys that don't decide the result.

    Args:
        directory: The sweep's; made where it does not exist.
        arms: At least one.
        resources: What a run asks a scheduler for.

    Raises:
        UserError: an arm that is refused, by name; two that would be recorded in one directory.
    """
    tasks = read(directory) if (directory / NAME).exists() else []
    numbers = {_place(task): task.number for task in tasks}
    planned: dict[Path, Task] = {}
    for arm in arms:
        try:
            config = Config.from_mapping(arm.values)
            asked = resources(config)
        except UserError as error:
            if not arm.words:
                raise
            raise UserError(f"nothing was started, because of the arm '{arm.words}': {error}") from None
        task = _task(directory, len(numbers), arm.words, config, asked)
        place = _place(task)
        if place in planned:
            raise UserError(
                f"nothing was started, because the arms '{planned[place].words}' and '{arm.words}' would both be "
                f"recorded in {task.directory}. Keys that don't decide the result are in no run's name: give each "
                "arm its own run_dir, such as 'run_dir=\"runs/p${processes}\"'."
            )
        number = numbers.setdefault(place, task.number)
        if number < len(tasks) and tasks[number].hash != task.hash:
            raise UserError(
                f"nothing was started, because {task.directory} belongs to task {number} of this sweep, "
                f"'{tasks[number].words}', which is another experiment: give '{arm.words}' its own run_dir."
            )
        planned[place] = replace(task, number=number)
    written = {task.number: task for task in (*tasks, *planned.values())}
    write(directory, written.values())
    for number in written:
        log_of(directory, number).parent.mkdir(parents=True, exist_ok=True)
    return list(planned.values())


def _task(directory: Path, number: int, words: str, config: Config, resources: Resources) -> Task:
    """Return a task that can be started from any directory, by any number of starts."""
    run_hash = config.run_hash(config.precision)
    run_dir = Path(config.run_dir or default_directory(config, run_hash, directory))
    root = config.dataset.root
    settled = replace(
        config,
        run_dir=str(run_dir),
        resume=True,
        sweep=replace(config.sweep, force=False),  # else a task that is started again would begin anew
        dataset=replace(config.dataset, root=root if root is None else str(Path(root).absolute())),
    )
    _inside_or_given(directory, settled, words)
    return Task(number, words, settled, run_hash, resources)


def _place(task: Task) -> Path:
    """Return the one name of a run directory."""
    return task.directory.resolve()


def _inside_or_given(directory: Path, config: Config, words: str) -> None:
    """Refuse a run directory that holds the sweep's, or lies outside it though the arm's own words did not ask so."""
    place, sweep = Path(config.run_dir or "").resolve(), directory.resolve()
    given = any(word.startswith("run_dir=") for word in words.split())
    if not given and not place.is_relative_to(sweep):
        raise UserError(
            f"the arm '{words}' would be recorded in {config.run_dir}, outside of its sweep's {directory}, and did not "
            "ask for that: give run_dir=… on the command line, or nothing."
        )
    if sweep.is_relative_to(place):  # every report would take the whole sweep for this one run
        raise UserError(
            f"the arm '{words}' would be recorded in {config.run_dir}, which contains the sweep {directory}: give "
            "another run_dir, or none."
        )


def write(directory: Path, tasks: Iterable[Task]) -> None:
    """Replace the manifest: a reader sees the old or the new one, never a part of either."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in tasks:
        place, sweep = _place(task), directory.resolve()
        named = place.relative_to(sweep) if place.is_relative_to(sweep) else place
        line = {**dataclasses.asdict(task), "config": {**task.config.to_mapping(), "run_dir": str(named)}}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(directory / NAME, "".join(lines).encode())


def read(directory: Path) -> list[Task]:
    """Return a sweep's tasks; a task's number is its place in the list.

    Raises:
        UserError: there is no sweep, or its manifest was damaged or edited.
    """
    path = directory / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(_no_sweep(directory)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    tasks: list[Task] = []
    places: set[Path] = set()
    for number, text in enumerate(lines):
        try:
            tasks.append(_parsed(directory, number, json.loads(text)))
        except ValueError as error:  # a UserError among them
            raise UserError(f"line {number + 1} of {path} cannot be used: {error}") from None
        if _place(tasks[-1]) in places:
            raise UserError(f"line {number + 1} of {path} cannot be used: another task is recorded in the same place.")
        places.add(_place(tasks[-1]))
    return tasks


def _parsed(directory: Path, number: int, values: Any) -> Task:
    if not isinstance(values, dict):
        raise UserError("it is not a JSON object.")
    if isinstance(values.get("config"), dict):  # a sweep that an earlier version planned goes on
        values = {**values, "config": complete(values["config"])}
    task = build(Task, values)
    if task.number != number:
        raise UserError(f"task {task.number} stands in the place of task {number}.")
    if task.config.run_hash(task.config.precision) != task.hash:
        raise UserError("its configuration does not have its hash: one of them was edited.")
    if not task.config.run_dir:
        raise UserError("it names no run_dir.")
    config = replace(task.config, run_dir=str(directory / task.config.run_dir))
    _inside_or_given(directory, config, task.words)
    return replace(task, config=config)


def _no_sweep(directory: Path) -> str:
    if not directory.is_dir():
        return (
            f"there is no directory {directory}: give a sweep's, such as one in runs/sweeps.{_sweeps(directory.parent)}"
        )
    return f"{directory} holds no {NAME}, so it is no sweep.{_sweeps(directory)}"


def _sweeps(parent: Path) -> str:
    """Name the sweeps in a directory, the newest few."""
    found = sorted((path.parent for path in parent.glob(f"*/{NAME}")), key=lambda path: path.stat().st_mtime)
    return f" Sweeps there: {', '.join(map(str, found[:-6:-1]))}." if found else ""


def task_of(directory: Path, tasks: Sequence[Task], word: str) -> Task:
    """Return the task that a user named.

    Raises:
        UserError: the word is not the number of one.
    """
    if not (word.isascii() and word.isdecimal()) or int(word) >= len(tasks):
        raise UserError(f"TASK {word} is not one of {directory}: it takes a whole number from 0 to {len(tasks) - 1}.")
    return tasks[int(word)]


def log_of(directory: Path, number: int) -> Path:
    """Return the file that takes what a task prints; its directory exists from :func:`plan` on."""
    return directory / "tasks" / str(number) / "log.txt"
