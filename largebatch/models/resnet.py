"""Residual networks for small images, 8×8 to 32×32 (He et al., 2016, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

WIDTHS = (16, 32, 64)


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


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
