"""Small networks in floats, for tests of what makes integers of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from largebatch.models import SmallResNet


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose BatchNorms have statistics and weights of their own."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=draw) + low)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=draw) + 0.5)
    return model.eval().requires_grad_(False)


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return settled(SmallResNet(8, classes=10, channels=3))


class Mixed(nn.Module):
    """Squeeze and excitation, branches, a BatchNorm that follows no convolution, pools, and a layer norm in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.excite = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.stem(F.dropout(self.first(x), training=self.training)), inplace=True)
        x = x * torch.sigmoid(self.excite(x.mean((2, 3), keepdim=True)))
        x = torch.cat([F.relu6(self.left(x)), self.right(x) * 0.5], dim=1)
        x = F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False) + F.max_pool2d(x, 3, 2, padding=1)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: torch.Tensor = self.last(self.norm(x))
        return logits


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return settled(Mixed())


def photographs(count: int, size: int = 16) -> torch.Tensor:
    """Smooth random images, (count, 3, size, size)."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, size=size, mode="bicubic")
