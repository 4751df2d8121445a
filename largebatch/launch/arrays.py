"""Sweeps on a SLURM cluster: what a task asks for, and one array for all that ask for the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically
from largebatch.base.numbers import divisors, listed
from largebatch.config.launchers import SlurmConfig
from largebatch.config.run import Config
from largebatch.launch import sbatch
from largebatch.launch.manifest import Arm, Resources, Task
from largebatch.launch.status import over


def resources(config: Config) -> Resources:
    """Return what a run asks the cluster for.

    Raises:
        UserError: GPUs, processes and nodes that don't go with k, or with one another.
    """
    asked = _settings(config)
    gpus = asked.gpus
    if gpus is None:
        fitting = max(d for d in divisors(config.k) if d <= asked.gpus_per_node)
        gpus = 0 if config.device == "cpu" else config.processes or fitting
    processes = gpus or config.processes or 1
    if config.processes not in (None, processes):
        raise UserError(
            f"processes={config.processes} does not go with launcher.gpus={gpus}: a process has a GPU of its own. "
            "Leave processes out, or use launcher.gpus=0."
        )
    if config.k % processes:
        raise UserError(
            f"launcher.gpus={gpus} does not divide k={config.k}: every GPU owns the same number of workers. These do: "
            f"{listed(divisors(config.k))}."
        )
    # Without GPUs a node has room for any number of processes.
    nodes = [d for d in divisors(processes) if gpus // d <= asked.gpus_per_node]
    if asked.nodes not in (None, *nodes):
        raise UserError(
            f"launcher.nodes={asked.nodes} cannot share out {processes} processes evenly"
            + (f", at most {asked.gpus_per_node} GPUs a node (launcher.gpus_per_node)" if gpus else "")
            + f". These can: {listed(nodes)}."
        )
    return Resources(nodes=asked.nodes or nodes[0], processes=processes, gpus=gpus)


def arrays(tasks: Sequence[Task]) -> list[sbatch.Array]:
    """Return an array for every shape of what ``tasks`` ask for, in the order of its first task."""
    shapes: dict[tuple[SlurmConfig, Resources], list[int]] = {}
    for task in tasks:
        shapes.setdefault((_shape(_settings(task.config)), task.resources), []).append(task.number)
    return [
        sbatch.Array(settings, asked.nodes or 1, asked.processes or 1, asked.gpus or 0, tuple(sorted(tasks)))
        for (settings, asked), tasks in shapes.items()
    ]


def on_nodes(arm: Arm) -> Arm:
    """Return an arm whose device is decided: a node without the GPUs it was asked for shall not do with its cores."""
    if arm.values["device"] != "auto":
        return arm
    return replace(arm, values={**arm.values, "device": "cpu" if arm.values["launcher"]["gpus"] == 0 else "cuda"})


def keep_scripts(directory: Path, tasks: Sequence[Task]) -> list[Path]:
    """Write the batch scripts of tasks of the sweep in ``directory`` into it, without submitting them."""
    folder = directory.absolute() / sbatch.SCRIPTS
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, array in enumerate(arrays(tasks)):
        paths.append(folder / f"dry-run-{number}.sh")
        write_atomically(paths[-1], array.script(directory.absolute()).encode())
    return paths


def missing(directory: Path, tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks that have no result yet, and neither wait nor run.

    Raises:
        UserError: this is no SLURM cluster.
        Fault: SLURM does not answer.
    """
    known = sbatch.states(directory)
    alive = {number for number, element in known.items() if element.queued or element.running}
    return [task for task in tasks if task.number not in alive and over(task) is None]


def submit(directory: Path, tasks: Sequence[Task]) -> dict[str, sbatch.Array]:
    """Submit tasks of the sweep in ``directory``, and return their arrays by number at SLURM.

    Raises:
        UserError: this is no SLURM cluster, or it refuses them.
    """
    return sbatch.submit(directory, arrays(tasks))


def _settings(config: Config) -> SlurmConfig:
    if not isinstance(config.launcher, SlurmConfig):
        raise UserError(f"launcher={config.launcher.name} does not submit: use launcher=slurm.")
    return config.launcher


def _shape(settings: SlurmConfig) -> SlurmConfig:
    """Leave out what is in the task's resources already."""
    return replace(settings, gpus=None, nodes=None, dry_run=False)
