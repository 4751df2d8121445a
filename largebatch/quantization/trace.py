"""From a PyTorch network to a list of float operators, with BatchNorm folded into the products before it.

The list is a :class:`~largebatch.quantization.network.Network` whose nodes all are ``float``: what is calibrated, what
integers are compared with, and what they are made from. Its nodes have one more attribute, ``shape``: that of the
tensor without the batch, or None where it has none.
"""

from __future__ import annotations

import copy
import logging
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from largebatch.base.errors import Fault, UserError
from largebatch.quantization.exported import BATCH_NORM, imported
from largebatch.quantization.fold import folded
from largebatch.quantization.network import Network, Node
from largebatch.quantization.reference import IntegerNetwork
from largebatch.quantization.shuffle import shuffled

CHECKED = 2  # images that the list and the network must agree on
# In float64, of the largest logit: ill-conditioned weights lose a part of its 16 digits, another function all of them.
TOLERANCE = 1e-6
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError, IndexError)


def trace(model: nn.Module, image: tuple[int, int, int]) -> Network:
    """Return a network's operators in order, in float32.

    Args:
        model: In evaluation mode, in float32, on the CPU: (batch, C, H, W) to (batch, classes).
        image: (C, H, W).

    Raises:
        UserError: its way through its layers depends on its inputs, or it does what has no place in such a list.
        Fault: the list computes something else than the network.
    """
    assert not model.training
    images = torch.randn((CHECKED, *image), generator=torch.Generator().manual_seed(0))
    expected = _logits(model, images)
    network = imported(_exported(model, images), type(model).__name__, image)
    in_float64 = _in_type(network, torch.float64)
    without_norms = folded(shuffled(in_float64))
    with torch.inference_mode():
        got = IntegerNetwork(network)(images)
        # The same operators in the same order have the same bits. Where they aren't, float64 tells whether it matters.
        if not _close(got, expected, 0):
            exact = IntegerNetwork(in_float64)(images.double())
            if not _close(exact, copy.deepcopy(model).double()(images.double()), TOLERANCE):
                raise _something_else(
                    model, got, expected, "it draws random numbers, or has a state beyond its weights"
                )
        # Folding BatchNorm changes how float32 is rounded, which ill-conditioned weights magnify without end.
        if any(node.attributes["target"] == BATCH_NORM for node in network):
            exact, got = (IntegerNetwork(one)(images.double()) for one in (in_float64, without_norms))
            if not _close(got, exact, TOLERANCE):
                raise _something_else(model, got, exact, "folding its BatchNorms into its convolutions changed it")
    return _in_type(without_norms, torch.float32)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of a network, which are refused where they are none."""
    name = type(model).__name__
    try:
        with torch.inference_mode():
            logits = model(images)
    except REFUSALS as error:
        shape = "×".join(map(str, images.shape[1:]))
        raise UserError(
            f"{name} cannot be quantized: it does not take images of {shape}: {_first_line(error)} What would do: "
            "images of the size and channels that it was built for."
        ) from error
    if isinstance(logits, tuple | list):
        raise UserError(f"{name} cannot be quantized: it gives {len(logits)} results instead of logits alone.")
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{name} cannot be quantized: it gives a {type(logits).__name__} instead of logits alone. What would do: a "
            "forward pass that returns the tensor of logits."
        )
    return logits


def _exported(model: nn.Module, images: Tensor) -> ExportedProgram:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # what it warns of is in the error too
        return export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except REFUSALS as error:
        raise UserError(_cannot_export(model, error)) from error
    finally:
        logger.setLevel(level)


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    largest = float(expected.abs().nan_to_num().max())
    return torch.allclose(got, expected, rtol=0, atol=tolerance * largest, equal_nan=True)


def _something_else(model: nn.Module, got: Tensor, expected: Tensor, why: str) -> Fault:
    return Fault(
        f"{type(model).__name__} was traced to operators that compute something else (logits differ by "
        f"{float((got - expected).abs().max()):g}): {why}."
    )


def _in_type(network: Network, dtype: torch.dtype) -> Network:
    """Return a list of float operators in another type of floats."""

    def argument(value: Any) -> Any:
        if isinstance(value, list):
            return [argument(one) for one in value]
        if isinstance(value, dict):
            return {"dtype": name} if value.get("dtype") in ("float32", "float64") else value
        return value

    def node(one: Node) -> Node:
        words = {key: argument(value) for key, value in one.attributes.get("keywords", {}).items()}
        attributes = {**one.attributes, "arguments": argument(one.attributes["arguments"]), "keywords": words}
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in one.tensors.items()}
        return replace(one, attributes=attributes, tensors=tensors)

    name = str(dtype).removeprefix("torch.")
    return replace(network, nodes=tuple(map(node, network)))


def _first_line(error: Exception) -> str:
    found = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return found[:300]


def _cannot_export(model: nn.Module, error: Exception) -> str:
    """Say which line of the network cannot be traced, and what would do."""
    library = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(library)]
    last = frames[-1]
    where = f" at `{last.line}` ({Path(last.filename).name}, line {last.lineno})" if last.filename != __file__ else ""
    return (
        f"{type(model).__name__} cannot be quantized: its operators cannot be listed once for all images{where}: "
        f"{_first_line(error)} What would do: no if, loop or number that depends on the values of a tensor "
        "(torch.where chooses without an if), and no operator outside PyTorch."
    )
