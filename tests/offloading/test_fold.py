import pytest
import torch
import torchvision
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import fold_batchnorm


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


@torch.no_grad()
def test_a_resnet_has_no_batchnorm_left_and_the_same_outputs():
    model, images = with_statistics(torchvision.models.resnet18()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    assert fold_batchnorm(model) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert fold_batchnorm(model) == 0


class Shared(nn.Module):
    """Convolutions whose BatchNorm may not be folded: seen by another one too, used twice, and none before it."""

    def __init__(self):
        super().__init__()
        self.norm0 = nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images):
        seen = self.conv1(self.norm0(images))
        images = self.norm1(seen) + seen
        return self.norm2(self.conv2(self.norm2(self.conv2(images))))


@torch.no_grad()
def test_what_others_see_is_left_alone():
    model, images = with_statistics(Shared()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = model(images)
    assert fold_batchnorm(model) == 0
    assert torch.equal(model(images), expected)


class Depends(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_networks_that_cannot_be_folded():
    with pytest.raises(UserError, match=r"model\.eval\(\) first"):
        fold_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="way through its layers depends on its inputs"):
        fold_batchnorm(Depends().eval())
