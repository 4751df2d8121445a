"""Launchers: on this machine, or on a SLURM cluster."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least


@dataclass(frozen=True)
class LauncherConfig:
    """Who starts the processes of a run, or of a sweep's runs.

    A run whose process died, or that a cluster took off its nodes, goes on from its last checkpoint up to
    ``max_restarts`` times. A run in which no batch goes on anywhere for ``timeout`` seconds is ended as hung; null
    waits for ever.
    """

    name: str
    max_restarts: int
    timeout: float | None

    def __post_init__(self) -> None:
        at_least("launcher.max_restarts", self.max_restarts, 0)
        at_least("launcher.timeout", self.timeout, 1)


@dataclass(frozen=True)
class LocalConfig(LauncherConfig):
    """On this machine, or by whatever set RANK and WORLD_SIZE. ``jobs`` arms of a sweep run at once."""

    jobs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("launcher.jobs", self.jobs, 1)


@dataclass(frozen=True)
class SlurmConfig(LauncherConfig):
    """A SLURM cluster: what each task of a sweep asks it for. Null leaves a request to the cluster.

    A task has one process a GPU: ``gpus`` of them in all, or where that is null the largest divisor of k up to
    ``gpus_per_node``; 0 asks for no GPU, and ``processes`` counts. They are spread over ``nodes``, null for as few as
    hold them. ``cpus_per_gpu`` are the cores of a process (there is one without a GPU too), ``mem`` the memory of a
    node (64G) and ``time`` that of a task (04:00:00). ``max_concurrent`` tasks of a shape run at once.
    ``signal_seconds`` before its time is up, a task writes a checkpoint and queues again. ``setup`` are lines of
    shell that come before the processes (module load cuda), ``options`` further ones of sbatch (--exclusive).
    ``dry_run`` prints the batch scripts, and submits nothing.
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
