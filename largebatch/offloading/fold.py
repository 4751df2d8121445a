"""BatchNorm folded into the convolution before it, for evaluation alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from largebatch.base.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def fold_batchnorm(model: nn.Module) -> int:
    """Fold every BatchNorm that follows a convolution into it, in place, and return how many were.

    The convolution's weights take the factor γ/√(σ² + ε), its bias the rest; an identity stands where the BatchNorm
    was. Less to carry and to compute; outputs agree up to rounding. There is no way back: fold a copy, or a model that
    was loaded for this.

    Raises:
        UserError: training mode, or a network whose way through its layers depends on its inputs.
    """
    if model.training:
        raise UserError("BatchNorm can be folded in evaluation mode alone: call model.eval() first.")
    folded = 0
    for first, name in _pairs(model):
        convolution, norm = model.get_submodule(first), model.get_submodule(name)
        if isinstance(convolution, CONVOLUTIONS) and isinstance(norm, NORMS) and norm.running_mean is not None:
            _fold(convolution, norm)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity().eval())
            folded += 1
    return folded


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of modules of which the second takes what the first one gives, and nobody else does."""
    try:
        nodes = fx.Tracer().trace(model).nodes
    except (fx.proxy.TraceError, TypeError) as error:
        raise UserError(
            f"BatchNorm cannot be folded: this network's way through its layers depends on its inputs ({error})."
        ) from error
    calls = [node for node in nodes if node.op == "call_module"]
    uses = Counter(str(node.target) for node in calls)
    for node in calls:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            first, second = str(before.target), str(node.target)
            if uses[first] == uses[second] == 1:
                yield first, second


def _fold(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, norm: BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
