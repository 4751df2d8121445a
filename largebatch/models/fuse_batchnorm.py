"""Residual networks that hand BatchNorm what follows it: the addition of the shortcut, and the ReLU."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from largebatch.models.batchnorm import PerWorker
from largebatch.models.resnet import SmallResNet, block_types


class FusedBasicBlock:
    """Mixed into a block of two convolutions, over BatchNorms of :class:`PerWorker`'s."""

    conv1: Any
    conv2: Any
    bn1: Any
    bn2: Any
    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return what the plain block returns."""
        shortcut = x if self.downsample is None else self.downsample(x)
        joined: Tensor = self.bn2.then_relu(self.conv2(self.bn1.then_relu(self.conv1(x))), shortcut)
        return joined


class FusedBottleneck(FusedBasicBlock):
    """Mixed into a block of three convolutions, over BatchNorms of :class:`PerWorker`'s."""

    conv3: Any
    bn3: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return what the plain block returns."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2.then_relu(self.conv2(self.bn1.then_relu(self.conv1(x))))
        joined: Tensor = self.bn3.then_relu(self.conv3(out), shortcut)
        return joined


@functools.cache
def _fused(mixin: type, block: Any) -> type[Any]:
    return type(mixin.__name__, (mixin, block), {})


def fuse(model: nn.Module) -> None:
    """Let the blocks of residual networks of torchvision's and ours call one kernel for all that follows a convolution.

    In place; parameters, buffers and names stay. Other networks are left as they are.

    Args:
        model: With BatchNorms that :class:`largebatch.models.batchnorm.RunningStatistics` has converted.
    """
    for module in model.modules():
        norms = [child for name, child in module.named_children() if name.startswith("bn")]
        if not norms or not all(isinstance(norm, PerWorker) for norm in norms):
            continue
        block: Any = module
        kind: Any = type(block)
        if not kind.__module__.startswith(("torchvision.", "largebatch.")):
            continue  # timm's blocks have parts of their own between these
        if kind in block_types("BasicBlock"):
            block.__class__ = _fused(FusedBasicBlock, kind)
        elif kind in block_types("Bottleneck"):
            block.__class__ = _fused(FusedBottleneck, kind)
        elif kind in (SmallResNet, *block_types("ResNet")):
            block.bn1.clamps, block.relu = True, nn.Identity()
