"""The arms of a sweep, composed."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from largebatch.sweep.manifest import Arm


def compose(context: HydraContext, config: DictConfig, overrides: Sequence[Sequence[str]]) -> list[Arm]:
    """Return the arms that Hydra's sweeper has found, each with its values, as ``Config.from_mapping`` takes them.

    Args:
        context: Hydra's.
        config: The configuration that the sweep was started with.
        overrides: Of every arm.
    """
    arms = []
    for words in overrides:
        composed = context.config_loader.load_sweep_config(config, list(words))
        ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("hydra", "experiment")])
        values = typing.cast("dict[str, typing.Any]", OmegaConf.to_container(ours, resolve=True))
        arms.append(Arm(" ".join(word for word in words if not word.startswith("hydra.")), values))
    return arms
