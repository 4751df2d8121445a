"""Honest, reproducible large-minibatch training: ``largebatch.offload`` and the command ``largebatch``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.base.errors import Fault, UserError
    from largebatch.config.run import Config
    from largebatch.offloading import offload

    __version__: str

__all__ = ["Config", "Fault", "UserError", "__version__", "offload"]

# Imported when they are first used: a command that only reads records does without torch.
_HOMES = {
    "Config": "largebatch.config.run",
    "Fault": "largebatch.base.errors",
    "UserError": "largebatch.base.errors",
    "offload": "largebatch.offloading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("largebatch")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    try:
        return import_module(f"largebatch.{name}")  # a package of this one, such as largebatch.offloading
    except ModuleNotFoundError as error:
        if error.name != f"largebatch.{name}":
            raise
        raise AttributeError(f"module 'largebatch' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
