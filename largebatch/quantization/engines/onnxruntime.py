"""Networks in integers on onnxruntime, and from there on whatever it runs on."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largebatch.base.errors import UserError, installation
from largebatch.quantization.network import IMAGES, Network, Program
from largebatch.quantization.saturation import refuse_overflow, saturates

PACKAGES = ("onnx", "onnxruntime")


@dataclass(frozen=True)
class OnnxRuntime:
    """onnxruntime on the CPU, from the graph that ``export=onnx`` writes."""

    name: str = "onnxruntime"

    def available(self) -> str | None:
        """Return None where the packages are installed, else the command that installs them."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            return f"engine=onnxruntime needs {' and '.join(missing)}: {installation(*missing)}"
        return None

    def load(self, network: Network) -> Program:
        """Return the network ready to run on as many threads as PyTorch has now.

        Raises:
            UserError: see :func:`start`; or its sums could overflow on this processor: see
                :mod:`largebatch.quantization.saturation`.
        """
        refuse_overflow(self.name, network, overflows)
        return _load(network)


@functools.cache
def overflows() -> bool:
    """Return whether onnxruntime's kernels overflow 16 bits on this processor."""
    return saturates(_load)


def _load(network: Network) -> Program:
    session = start(network)

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {IMAGES: images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def start(network: Network, profile: str | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of the network.

    Args:
        network: What to run.
        profile: Where it writes its profile, without the end of the name; None: it writes none.

    Raises:
        UserError: see :func:`graph.as_onnx`; or the packages are not installed.
    """
    if reason := OnnxRuntime().available():
        raise UserError(reason)
    import onnxruntime

    from largebatch.quantization.engines.onnx_export import as_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    model = as_onnx(network).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
