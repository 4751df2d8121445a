"""Launchers: on this machine, or on a SLURM cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_MEMORY = re.compile(r"0|\d+[KMGT]B?", re.IGNORECASE)


@dataclass(frozen=True)
class LauncherConfig:
    """Launcher of the processes of a run, or of a sweep's runs.

    Attributes:
        name: local or slurm.
        max_restarts: Restarts of a run from its last checkpoint after its process died or a cluster stopped it.
        timeout: Seconds without a batch in any process, after which a run is ended as hung. Null: never.
    """

    name: str
    max_restarts: int
    timeout: float | None

    def __post_init__(self) -> None:
        at_least("launcher.max_restarts", self.max_restarts, 0)
        at_least("launcher.timeout", self.timeout, 1)


@dataclass(frozen=True)
class LocalConfig(LauncherConfig):
    """On this machine, or by whatever set RANK and WORLD_SIZE.

    Attributes:
        jobs: Runs of a sweep at the same time, each in its own processes.
    """

    jobs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("launcher.jobs", self.jobs, 1)


@dataclass(frozen=True)
class SlurmConfig(LauncherConfig):
    """A SLURM cluster: what each task of a sweep asks it for. Null leaves a request to the cluster.

    Attributes:
        gpus: GPUs of a task, with one process each. Null: the largest divisor of k up to gpus_per_node. 0: none;
            processes decides.
        gpus_per_node: GPUs per node.
        nodes: Nodes of a task. Null: as few as hold its GPUs.
        cpus_per_gpu: Cores of a process, also without a GPU.
        mem: Memory per node, such as 64G.
        time: Time limit of a task, such as 04:00:00.
        partition: Partition of the cluster.
        account: Account that is charged.
        qos: Quality of service.
        max_concurrent: Largest number of tasks at the same time, among those with the same resources.
        signal_seconds: Seconds before the time limit at which a task writes a checkpoint and is requeued.
        setup: Lines of shell that run before the processes, such as [module load cuda].
        options: More options of sbatch, such as [--exclusive].
        dry_run: Print the batch scripts and submit nothing.
    """

    gpus: int | None
    gpus_per_node: int
    nodes: int | None
    cpus_per_gpu: int | None
    mem: str | None
    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    max_concurrent: int | None
    signal_seconds: int
    setup: tuple[str, ...]
    options: tuple[str, ...]
    dry_run: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("gpus_per_node", "nodes", "cpus_per_gpu", "max_concurrent", "signal_seconds"):
            at_least(f"launcher.{key}", getattr(self, key), 1)
        at_least("launcher.gpus", self.gpus, 0)
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(
                f"launcher.time={self.time} is no time of SLURM's: it takes minutes, hours:minutes:seconds such as "
                "04:00:00, or days-hours:minutes:seconds such as 2-00:00:00."
            )
        if self.mem is not None and not _MEMORY.fullmatch(self.mem):
            unit = f", and a number alone would be megabytes: {self.mem}G?" if self.mem.isdecimal() else ""
            raise UserError(
                f"launcher.mem={self.mem} is no memory: it takes a number with its unit, such as 64G{unit}."
            )
        for option in self.options:
            if not option.startswith("-"):
                raise UserError(
                    f"launcher.options: '{option}' is no option of sbatch: give such as --exclusive or "
                    "--constraint=a100, one an element."
                )


LAUNCHERS: dict[str, type[LauncherConfig]] = {"local": LocalConfig, "slurm": SlurmConfig}
