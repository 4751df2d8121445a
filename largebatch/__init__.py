"""Honest, reproducible large-minibatch training: the Python API of the command ``largebatch``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.api import plot
    from largebatch.api.calls import (
        CertifyReport,
        Interrupted,
        ProbeReport,
        Report,
        certify,
        explain,
        predict,
        probe,
        train,
    )
    from largebatch.api.networks import QuantizedModel, load_images, load_model, quantize
    from largebatch.api.recorded import Run, runs
    from largebatch.api.table import Table, table
    from largebatch.base.errors import Fault, UserError
    from largebatch.config.run import Config
    from largebatch.offloading import offload

    __version__: str

__all__ = [
    "CertifyReport",
    "Config",
    "Fault",
    "Interrupted",
    "ProbeReport",
    "QuantizedModel",
    "Report",
    "Run",
    "Table",
    "UserError",
    "__version__",
    "certify",
    "explain",
    "load_images",
    "load_model",
    "offload",
    "plot",
    "predict",
    "probe",
    "quantize",
    "runs",
    "table",
    "train",
]

# Imported when they are first used: a command that only reads records does without torch.
_HOMES = {
    name: f"largebatch.{module}"
    for module, names in {
        "api.calls": "CertifyReport Interrupted ProbeReport Report certify explain predict probe train",
        "api.networks": "QuantizedModel load_images load_model quantize",
        "api.recorded": "Run runs",
        "api.table": "Table table",
        "base.errors": "Fault UserError",
        "config.run": "Config",
        "offloading": "offload",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("largebatch")
    if name == "plot":
        return import_module("largebatch.api.plot")
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
