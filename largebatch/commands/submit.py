"""What ``largebatch train launcher=slurm`` does on the login node."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from largebatch.commands.outcome import say
from largebatch.launch.slurm import ranges
from largebatch.sweep import slurm
from largebatch.sweep.manifest import Arm, Task, plan


def submit(directory: Path, arms: Sequence[Arm]) -> None:
    """Submit the arms of a sweep, or print their batch scripts, and say how to look at it.

    Raises:
        UserError: an arm that is refused, or a cluster that refuses them.
    """
    if any(arm.values["launcher"]["dry_run"] for arm in arms):
        print("\n".join(slurm.scripts(directory, arms)), end="")
        return
    tasks = plan(directory, [slurm.on_nodes(arm) for arm in arms], slurm.resources)
    submit_missing(directory, tasks)


def submit_missing(directory: Path, tasks: Sequence[Task]) -> None:
    """Submit those of ``tasks`` that have no result yet and are not on their way, and say so.

    Raises:
        UserError: this is no SLURM cluster, or it refuses them.
        Fault: SLURM does not answer.
    """
    missing = slurm.missing(directory, tasks)
    for job, array in slurm.submit(directory, missing).items():
        asked = f"nodes={array.nodes} processes={array.processes} gpus={array.gpus}"
        say(f"submitted job {job}: tasks {ranges(array.tasks)}, each with {asked}")
    if len(missing) < len(tasks):
        say(f"{len(tasks) - len(missing)} of {len(tasks)} tasks are done already, or on their way.")
    say(f"how they do: largebatch sweep status {shlex.quote(str(directory))}")
