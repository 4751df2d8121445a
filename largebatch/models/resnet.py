"""Residual networks for small images, 8×8 to 32×32 (He et al., 2016, section 4.2)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: torchvision's block, whose import takes as long as PyTorch's own.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        downsample = None
        if stride != 1 or inputs != outputs:  # made first, as seeds have always drawn its weights
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs, H / stride, W / stride) for (batch, inputs, H, W)."""
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


class SmallResNet(nn.Module):
    """Three stages of m basic blocks, 6m + 2 layers deep; the second and third halve the map.

    Shortcuts that change shape are 1×1 convolutions with BN, as in the paper's ImageNet networks. Parameter
    names are torchvision's.

    Args:
        depth: 8, 14, 20 … (6m + 2).
        classes: Width of the output.
        channels: Channels of the input.
        stem_stride: Stride of the first convolution; 2 quarters the work.
    """

    def __init__(self, depth: int, classes: int, channels: int = 3, stem_stride: int = 1) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6m + 2 with m of 1 or more")
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: (batch, channels, H, W) to (batch, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def block_types(name: str) -> tuple[Any, ...]:
    """Return the classes of residual blocks of this name: ours, torchvision's and timm's.

    A library that is not imported has made no network, and is not imported for its classes: that takes seconds.
    """
    modules = map(sys.modules.get, (__name__, "torchvision.models.resnet", "timm.models.resnet"))
    return tuple(getattr(module, name) for module in modules if hasattr(module, name))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
