"""Hand the arms of a sweep, composed, to the command that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class LocalLauncher(Launcher):
    """Compose every arm before the first one runs; where and when they run is decided by the task function's sweep.

    Hydra's own launchers compose an arm when its turn comes, so that the mistake in the last one shows hours later.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composing takes."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Call ``task_function.sweep(directory, arms)``."""
        from largebatch.base.files import at_home

        setup_globals()
        arms = [self._compose(number, words) for number, words in enumerate(job_overrides, start=initial_job_idx)]
        cast(Any, self.task_function).sweep(Path(at_home(str(self.config.hydra.sweep.dir))), arms)
        return []

    def _compose(self, number: int, overrides: Sequence[str]) -> Any:
        from largebatch.launch.manifest import Arm

        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.num, composed.hydra.job.id = number, f"job_{number}"
        HydraConfig.instance().set_config(composed)  # for values such as ${hydra:job.num}
        values = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("hydra", "experiment")])
        words = " ".join(word for word in overrides if not word.startswith("hydra."))
        return Arm(words, cast(dict[str, Any], OmegaConf.to_container(values, resolve=True)))
