"""BatchNorm folded into the convolution before it, for evaluation alone."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from largebatch.config import UserError


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
    try:
        graph = fx.Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise UserError(
            f"BatchNorm cannot be folded here, since this network's way through its layers depends on its inputs: {error}"
        ) from error
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = [str(node.target) for node in calls]
    folded = 0
    for node in calls:
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        name, first = str(node.target), str(before.target)
        norm, convolution = modules[name], modules[first]
        if (
            type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            or uses.count(name) + uses.count(first) > 2
        ):
            continue
        if type(convolution) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and norm.running_mean is not None:
            _fold(convolution, norm)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
            folded += 1
    return folded


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    with torch.no_grad():
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    convolution.weight, convolution.bias = weight, bias
