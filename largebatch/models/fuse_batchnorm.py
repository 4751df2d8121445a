"""Residual networks that hand BatchNorm what follows it: the addition of the shortcut, and the ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from largebatch.models.batchnorm import PerWorker
from largebatch.models.resnet import SmallResNet


class FusedBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's block of two convolutions, over BatchNorms of :class:`PerWorker`'s."""

    bn1: Any
    bn2: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return what the plain block returns."""
        shortcut = x if self.downsample is None else self.downsample(x)
        joined: Tensor = self.bn2.then_relu(self.conv2(self.bn1.then_relu(self.conv1(x))), shortcut)
        return joined


class FusedBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's block of three convolutions, over BatchNorms of :class:`PerWorker`'s."""

    bn1: Any
    bn2: Any
    bn3: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return what the plain block returns."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2.then_relu(self.conv2(self.bn1.then_relu(self.conv1(x))))
        joined: Tensor = self.bn3.then_relu(self.conv3(out), shortcut)
        return joined


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
        if type(module) is BasicBlock:
            module.__class__ = FusedBasicBlock
        elif type(module) is Bottleneck:
            module.__class__ = FusedBottleneck
        elif isinstance(module, ResNet | SmallResNet):
            module.bn1.clamps, module.relu = True, nn.Identity()
