"""Honest, reproducible large-minibatch training: ``largebatch.offload`` and the command ``largebatch``."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.base.errors import Fault, UserError
    from largebatch.offloading import offload

__version__ = metadata.version("largebatch")
__all__ = ["Fault", "UserError", "offload"]

# Imported when they are first used: a command that only reads records does without torch.
_HOMES = {"Fault": "largebatch.base.errors", "UserError": "largebatch.base.errors", "offload": "largebatch.offloading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'largebatch' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
