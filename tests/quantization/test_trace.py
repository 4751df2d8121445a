import pytest
import torch
import torch.nn.functional as F
from quantization.networks import mixed, photographs, settled, small_resnet
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

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


class Named(nn.Module):
    def forward(self, x):
        return {"logits": x.mean((2, 3))}


class Counting(nn.Module):
    """Counts its passes in evaluation too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x.mean((2, 3)) / self.passes


class Calls(nn.Module):
    """Calls itself without end."""

    def forward(self, x):
        return self(x)


class Standardized(nn.Conv2d):
    """Weights that are computed from its parameters in every pass."""

    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class Computed(nn.Module):
    """Standardized and normed weights, and a bias by place that a Linear computes from a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Standardized(3, 4, 3, padding=1), weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.by_place, self.last = nn.Linear(2, 4), nn.Linear(4, 5)
        self.register_buffer("places", torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")))

    def forward(self, x):
        bias = self.by_place(self.places.flatten(1).T).view(8, 8, 4).permute(2, 1, 0)
        bias = bias.contiguous().view(4, 64).view(4, 8, 8)  # in no other memory than the one made here
        return self.last(F.relu(self.second(F.relu(self.first(x))) + bias).mean((2, 3)))


class Forms(nn.Module):
    """The same in other words: parts, stacks, symbolic views, padding by name, types and what does nothing."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(3, 8, 4, padding="same", dilation=(1, 2))
        self.branch = nn.Conv2d(4, 4, 3, padding="same")
        self.hidden, self.norm, self.last = nn.Linear(256, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.same(F.pad(x, (0, 0, 0, 0))))
        left, right = x.chunk(2, dim=1)
        first, rest = right.split([1, 3], dim=-3)
        x = torch.cat([self.branch(left), rest, first], 1)
        x = torch.stack([part.float() for part in x.unbind(1)[::2]], 2)
        x = x.contiguous().view(x.size(0), -1)
        x = self.norm(self.hidden(x))
        return self.last(x * torch.arange(6, device=x.device) + torch.zeros(x.size(0), 6, device=x.device))


class Shifted(nn.Module):
    """Writes a mask through views, as shifted windows do, and changes a view of its own maps."""

    def forward(self, x):
        mask = x.new_zeros((8, 8))
        for number, rows in enumerate((slice(0, 4), slice(4, 6), slice(6, 8))):
            mask[rows] = number
        x = torch.roll(x, 2, 2)
        x[:, :, 0].mul_(2)
        return (x + (mask != 1)).mean((2, 3))


class Blocks(nn.Module):
    """Switches autocast and gradients off, in one another, with two results and with one."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = x.relu().float() + 1
            with torch.no_grad():
                z = y * 2
        with torch.no_grad():
            return (z + y).mean((2, 3))


class Mixed16(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return (x.flatten(1) @ torch.ones(192, 5)).float()


class Typed(nn.Module):
    def forward(self, x):
        return x.double().mean((2, 3), dtype=torch.float64)


# PyTorch says that it pads, as is wanted here.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("make", [Computed, Forms, Shifted, Blocks, Typed])
def test_other_forms_compute_the_same(make):
    torch.manual_seed(0)
    model, images = settled(make()), photographs(5, 8)
    network = trace(model, (3, 8, 8))
    expected = model(images.clone()).float()
    torch.testing.assert_close(IntegerNetwork(network)(images.clone()), expected, rtol=1e-5, atol=1e-6)


def targets(network):
    return [node.attributes["target"].split(".")[1] for node in network]


def test_what_depends_on_no_image_is_computed_once():
    network = trace(settled(Computed()), (3, 8, 8))
    assert targets(network) == ["conv2d", "relu", "conv2d", "add", "relu", "mean", "linear"]
    assert [node.name for node in network][::2] == ["first", "second", "relu_2", "last"]
    assert {"weight", "bias"} == {*network.nodes[2].tensors}
    assert targets(trace(Shifted().eval(), (3, 8, 8)))[-2:] == ["add", "mean"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_equal_forms_become_one():
    names = targets(trace(settled(Forms()), (3, 8, 8)))
    assert {"split", "chunk", "stack", "unbind", "view", "batch_norm", "getitem", "to", "pad"}.isdisjoint(names)
    assert names.count("slice") == 4
    assert "constant_pad_nd" in names
    assert names[-4:] == ["mul", "zeros", "add", "linear"]


def test_dropout_in_place_is_no_write():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Dropout(inplace=True), nn.Linear(128, 5))
    assert targets(trace(model.eval(), (3, 8, 8))) == ["conv2d", "flatten", "linear"]


class Steep(nn.Module):
    """Variances from 1 to 1e-12: what float32 rounds is magnified a million times, by any order of operations."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-12)) for _ in range(4))
        )
        for _, norm in self.layers:
            norm.running_var.fill_(1e-6)
            norm.running_mean.copy_(torch.rand(3) - 0.5)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def test_rounding_is_not_blamed_on_the_network():
    torch.manual_seed(0)
    model = Steep().eval().requires_grad_(False)
    assert targets(trace(model, (3, 8, 8))) == ["conv2d"] * 4 + ["mean"]


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
        (Named(), "it gives a dict instead of logits alone. What would do: a forward pass that returns the tensor"),
        (Mixed16(), "it switches autocast on for a part of its layers. What would do: float32 throughout"),
        (Counting(), "it changes its buffer passes in every pass"),
        (Calls(), "Calls cannot be quantized: it does not take images of 3×8×8: maximum recursion depth"),
    ],
)
def test_what_cannot_be_listed_is_refused_with_the_operator(model, words):
    with pytest.raises(UserError, match=words):
        trace(model.eval(), (3, 8, 8))


def test_what_computes_something_else_is_a_fault():
    with pytest.raises(Fault, match="Random was traced to operators that compute something else"):
        trace(Random().eval(), (3, 8, 8))
