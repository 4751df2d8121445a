"""A network of your own: any callable that returns an nn.Module."""

from torch import Tensor, nn


class Block(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape, (batch, width, H, W)."""
        return (maps + self.branch(maps)).relu()


def make(classes: int, channels: int, width: int = 8, blocks: int = 1) -> nn.Module:
    """Return a network from images (batch, channels, H, W) to logits (batch, classes)."""
    stem = nn.Conv2d(channels, width, 3, padding=1)
    body = [Block(width) for _ in range(blocks)]
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
