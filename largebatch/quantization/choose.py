"""Choose the engine that computes an integer network on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.quantization.engines import x86
from largebatch.quantization.engines.cuda import Cuda
from largebatch.quantization.engines.onnxruntime import OnnxRuntime
from largebatch.quantization.network import Engine, Network
from largebatch.quantization.reference import IntegerNetwork, Reference

MAKERS: Mapping[str, Callable[[], Engine]] = {
    "cuda": Cuda,
    "x86": x86.X86,
    "onnxruntime": OnnxRuntime,
    "reference": Reference,
}
# What auto tries, the fastest first.
ON_DEVICE = {"cuda": ("cuda", "reference"), "cpu": ("x86", "reference")}


def choose(name: str, device: str) -> Engine:
    """Return an engine.

    Args:
        name: One of :data:`largebatch.quantization.config.ENGINES`; auto: the fastest that runs here.
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


def must_avoid_overflow() -> bool:
    """Return whether this machine's kernels for bytes overflow 16 bits: see :mod:`.saturation`."""
    return x86.X86().available() is None and x86.overflows()


class ByEngine(IntegerNetwork):
    """A network in integers that an engine computes; its tensors stay where the engine wants them."""

    def __init__(self, network: Network, engine: Engine) -> None:
        super().__init__(network)
        self.engine, self._program = engine.name, engine.load(network)

    def forward(self, images: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Return logits, float32 (batch, classes), on the device of the images; nothing is watched."""
        return self._program(images.float()).to(images.device)
