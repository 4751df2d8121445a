"""Launchers: on this machine, or on a SLURM cluster."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least


@dataclass(frozen=True)
class LauncherConfig:
    """Launcher of the processes of a run, or of a sweep's runs.

    Attributes:
        name: local or slurm.
        max_restarts: How often a run whose process died, or that a cluster took off its nodes, goes on from its last
            checkpoint.
        timeout: Seconds without a batch anywhere, after which a run is ended as hung; null: never.
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
        jobs: Runs of a sweep at once, each in processes of its own.
    """

    jobs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("launcher.jobs", self.jobs, 1)


@dataclass(frozen=True)
class SlurmConfig(LauncherConfig):
    """A SLURM cluster: what each task of a sweep asks it for. Null leaves a request to the cluster.

    Attributes:
        gpus: GPUs of a task, with a process each; null: the largest divisor of k up to gpus_per_node; 0: none, and
            processes counts.
        gpus_per_node: GPUs of a node.
        nodes: Nodes of a task; null: as few as hold its GPUs.
        cpus_per_gpu: Cores of a process, also without a GPU.
        mem: Memory of a node: 64G.
        time: Time of a task: 04:00:00.
        partition: Partition of the cluster.
        account: Account that pays.
        qos: Quality of service.
        max_concurrent: Tasks at once, of those that ask for the same.
        signal_seconds: How long before its time is up a task writes a checkpoint and queues again.
        setup: Lines of shell before the processes: [module load cuda].
        options: More options of sbatch: [--exclusive].
        dry_run: Print the batch scripts, and submit nothing.
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
        for option in self.options:
            if not option.startswith("-"):
                raise UserError(
                    f"launcher.options: '{option}' is no option of sbatch: give such as --exclusive or "
                    "--constraint=a100, one an element."
                )


LAUNCHERS: dict[str, type[LauncherConfig]] = {"local": LocalConfig, "slurm": SlurmConfig}
