"""Run the arms of a sweep one after another in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class LocalLauncher(Launcher):
    """Hydra's own local launcher, without directories and logs of its own, and with a line for every arm."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what an arm needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and run every arm; the task function decides what an arm's failure means for the others."""
        setup_globals()
        returns = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.num, composed.hydra.job.id = number, f"job_{number}"
            HydraConfig.instance().set_config(composed)
            arm = " ".join(word for word in overrides if not word.startswith("hydra."))
            print(f"── {number + 1} of {len(job_overrides)}: {arm}", file=sys.stderr, flush=True)
            values = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            result = JobReturn(overrides=list(overrides), cfg=values)
            result.return_value = self.task_function(values)
            result.status = JobStatus.COMPLETED
            returns.append(result)
        return returns
