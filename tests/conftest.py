from collections.abc import Callable
from typing import Any

import pytest

from largebatch.cli import configuration_directory
from largebatch.config import Config


def composed(*overrides: str, command: str = "train") -> dict[str, Any]:
    """Compose conf/ with Hydra, as the command line does."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        values = OmegaConf.to_container(compose(command, overrides=list(overrides)), resolve=True)
    values.pop("experiment")
    return values


@pytest.fixture
def compose() -> Callable[..., Config]:
    """Return a function from overrides to the typed configuration of ``largebatch train``."""
    return lambda *overrides: Config.from_mapping(composed(*overrides))
