"""Submit the arms of a sweep to a SLURM cluster, and return at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.largebatch_launchers.arms import compose
from largebatch.commands.submit import submit


class SlurmLauncher(Launcher):
    """Compose every arm here, and run none: neither data nor a GPU is needed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composing takes."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the arms."""
        setup_globals()
        submit(Path(self.config.hydra.sweep.dir), compose(self.hydra_context, self.config, job_overrides))
        return []
