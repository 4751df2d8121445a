import pytest
import torch
from torch import nn

from largebatch.models import SmallResNet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_474), (56, 855_770)])
def test_depths_have_the_literatures_parameters(depth, parameters):
    # He et al., 2016, section 4.2: 0.27 and 0.85 million, here with convolutions in the shortcuts.
    model = SmallResNet(depth, classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([name for name in layers if "downsample" not in name]) == depth


@pytest.mark.parametrize(("channels", "side", "stride"), [(1, 8, 1), (1, 28, 1), (3, 32, 2)])
def test_shapes(channels, side, stride):
    model = SmallResNet(8, classes=7, channels=channels, stem_stride=stride)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)


def test_stages_halve_the_map():
    model = SmallResNet(14, classes=10)
    x = model.layer1(model.conv1(torch.randn(1, 3, 32, 32)))
    assert x.shape == (1, 16, 32, 32)
    x = model.layer2(x)
    assert x.shape == (1, 32, 16, 16)
    assert model.layer3(x).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("depth", [2, 7, 9])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="is not 6m"):
        SmallResNet(depth, classes=10)
