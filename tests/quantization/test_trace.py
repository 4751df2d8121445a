import pytest
import torch
from quantization.networks import mixed, photographs, small_resnet
from torch import nn

from largebatch.base.errors import Fault, UserError
from largebatch.quantization.reference import IntegerNetwork
from largebatch.quantization.trace import trace


@pytest.mark.parametrize("make", [small_resnet, mixed])
def test_the_list_computes_what_the_network_does(make):
    model, images = make(), photographs(5)
    network = trace(model, (3, 16, 16))
    assert all(node.attributes["target"] != "aten.batch_norm.default" for node in network)
    torch.testing.assert_close(IntegerNetwork(network)(images), model(images), rtol=1e-4, atol=1e-5)


def test_layers_have_the_names_of_their_modules():
    network = trace(small_resnet(), (3, 16, 16))
    names = [node.name for node in network]
    assert names[:2] == ["conv1", "relu"]
    assert {"layer2.0.downsample.0", "layer3.0.add", "fc"} <= {*names}
    assert len({*names}) == len(names)


class Looks(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return x.mean((2, 3))


class Two(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x


class Random(nn.Module):
    def forward(self, x):
        return (x + torch.randn_like(x)).mean((2, 3))


class Typed(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), dtype=torch.float64)


class Behind(nn.Module):
    """Uses a tensor that was changed in place without taking what the change gave."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        self.relu(x)
        return x.mean((2, 3))


def test_what_is_changed_in_place_is_changed_for_all():
    names = [(node.name, node.inputs) for node in trace(Behind().eval(), (3, 8, 8))]
    assert names == [("conv", ("images",)), ("relu", ("conv",)), ("mean", ("relu",))]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Looks(), r"at `if x\.sum\(\) > 0:` \(test_trace\.py, line \d+\).* What would do: no if"),
        (Two(), "it gives 2 results instead of logits alone"),
        (Typed(), r"aten\.mean\.dim of Typed cannot be quantized: it is given torch.float64"),
    ],
)
def test_what_cannot_be_listed_is_refused_with_the_operator(model, words):
    with pytest.raises(UserError, match=words):
        trace(model.eval(), (3, 8, 8))


def test_what_computes_something_else_is_a_fault():
    with pytest.raises(Fault, match="Random was traced to operators that compute something else"):
        trace(Random().eval(), (3, 8, 8))
