import pytest
import torch
from quantization.networks import photographs, settled
from torch import nn

from largebatch.quantization.pipeline import quantize


class Halves(nn.Module):
    """A convolution of 4 · 27 · 64 = 6,912 multiplications an image, and a product of maps with 4 · 4 · 64 = 1,024."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        return (x @ x.transpose(1, 2)).flatten(1)


def test_the_share_of_integers_by_hand():
    torch.manual_seed(0)
    made = quantize(settled(Halves()), (3, 8, 8), [photographs(4, 8)])
    assert made.integer_share() == pytest.approx(6912 / (6912 + 1024))
    assert made.keeping(["conv"]).integer_share() == 0
    # 108 bytes of weights, 4 biases and 4 scales of 4 bytes, over 112 numbers of 4 bytes
    assert made.size_ratio() == pytest.approx((108 + 32) / 448)
    assert made.keeping(["conv"]).size_ratio() == 1
