"""Which engine computes a network in integers here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from largebatch.compress.engines.cuda import Cuda
from largebatch.compress.engines.onnxruntime import OnnxRuntime
from largebatch.compress.engines.x86 import X86
from largebatch.compress.network import Engine
from largebatch.compress.reference import Reference
from largebatch.config import UserError

MAKERS: Mapping[str, Callable[[], Engine]] = {
    "cuda": Cuda,
    "x86": X86,
    "onnxruntime": OnnxRuntime,
    "reference": Reference,
}
# What auto tries, the fastest first.
ON_DEVICE = {"cuda": ("cuda", "reference"), "cpu": ("x86", "reference")}


def choose(name: str, device: str) -> Engine:
    """Return an engine.

    Args:
        name: One of :data:`largebatch.compress.config.ENGINES`; auto: the fastest that runs here.
        device: Where images are: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UserError: it cannot run here.
    """
    if name == "auto":
        engines = [MAKERS[one]() for one in ON_DEVICE.get(device, ("reference",))]
        return next(engine for engine in engines if engine.available() is None)
    engine = MAKERS[name]()
    why_not = engine.available()
    if why_not is not None:
        raise UserError(why_not)
    if name == "cuda" and device != "cuda":
        raise UserError(f"engine=cuda computes on a GPU, and device={device}: take device=cuda, or engine=auto.")
    return engine
