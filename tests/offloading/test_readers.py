"""Modules that read weights of others, which they do not call: learned in the first pass."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import GROUPS, each, offload
from largebatch.offloading.plan import Bus, make_plans

BUS = Bus(bytes_per_second=1e9, seconds_per_copy=1e-6)
WIDTH = 16
LAYER = 4 * WIDTH * WIDTH + 256  # bytes of a Linear: weight and bias, in steps of 256


class Attention(nn.Module):
    """Reads the weights of its children, as Swin does."""

    def __init__(self):
        super().__init__()
        self.query, self.project = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        turned = self.project.weight.t().contiguous()
        return nn.functional.linear(hidden, self.query.weight, self.query.bias) @ turned + self.project.bias


class Reader(nn.Module):
    """Reads the weight of a layer elsewhere, also through .data."""

    def __init__(self, other):
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), [other]

    def forward(self, hidden):
        return nn.functional.linear(self.own(hidden), self.other[0].weight) + self.other[0].bias.data


def attentions():
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), Attention(), Attention()).eval()


def elsewhere():
    first = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(first, nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), Reader(first)).eval()


class Top(nn.Module):
    """Reads, as the whole model, a layer's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden):
        return self.third(self.second(self.first(hidden))) @ self.second.weight


MAKE = {"attentions": attentions, "elsewhere": elsewhere, "top": lambda: Top().eval()}


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", MAKE)
def test_weights_that_others_read_are_there_and_the_plan_says_so(name, groups, prefetch, transport):
    torch.manual_seed(0)
    model, batches = MAKE[name](), [torch.randn(2, WIDTH) for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    with offload(model, transport.device, mode="none"):
        expected = [model(batch) for batch in batches]
    plan = make_plans({"": model}, 4, BUS, groups=groups, prefetch=prefetch, examples={"": batches[0]})[1]
    with (
        offload(model, transport.device, groups=groups, prefetch=prefetch, transport=transport) as statistics,
        torch.inference_mode(),
    ):
        outputs = [model(batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert statistics.planned_peak_bytes <= statistics.peak_bytes == plan.peak_bytes
    if prefetch:  # a first pass finds room for what it lends in the second slot
        assert statistics.planned_peak_bytes == plan.peak_bytes
    assert statistics.departures == 0
    if not prefetch:
        assert statistics.bytes_to_device == plan.moved_bytes


def test_a_reader_travels_with_what_it_reads_below_it(recorder):
    """Two slots for the first layer, as before; an attention of two layers is smaller."""
    with offload(attentions(), "cpu", groups="leaf", transport=recorder) as statistics:
        pass
    with offload(model := attentions(), "cpu", groups="leaf", transport=recorder) as learned:
        model(torch.randn(2, WIDTH))
    assert statistics.groups == 2 + 4
    assert learned.groups == 2 + 2
    assert statistics.planned_peak_bytes == learned.planned_peak_bytes == 2 * (4 * WIDTH * 4 * WIDTH + 256)
    assert learned.kept_bytes == 0


def test_what_is_read_elsewhere_stays_on_the_device(recorder):
    model = elsewhere()
    with offload(model, "cpu", groups="leaf", transport=recorder) as statistics:
        model(torch.randn(2, WIDTH))
        assert statistics.kept_bytes == LAYER
        uploads = statistics.uploads
        model(torch.randn(2, WIDTH))
        model(torch.randn(2, WIDTH))
    assert statistics.groups == 3
    assert statistics.uploads == uploads + 3 * 2 + 1  # and the first of a pass that did not come


@pytest.mark.parametrize("name", MAKE)
def test_a_budget_is_kept_while_it_is_learned(name, recorder):
    model, batch = MAKE[name](), torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = model(batch)
    with offload(model, "cpu", groups="leaf") as least:
        model(batch)
    with offload(model, "cpu", mode="none") as whole:
        pass
    for budget in (least.peak_bytes, (least.peak_bytes + whole.weight_bytes) // 2, whole.weight_bytes):
        with offload(model, "cpu", groups="leaf", budget=budget, transport=recorder) as statistics:
            for _ in range(3):
                assert torch.equal(model(batch), expected)
        assert statistics.peak_bytes <= budget
        plan = make_plans({"": model}, 3, BUS, budget=budget, groups="leaf", examples={"": batch})[1]
        assert plan.fits
        assert plan.peak_bytes == statistics.peak_bytes


def test_a_budget_without_room_for_what_is_read_is_refused_and_planned_as_too_small():
    model, batch = elsewhere(), torch.randn(2, WIDTH)
    with offload(model, "cpu", groups="leaf") as first:
        pass
    with offload(model, "cpu", groups="leaf") as learned:
        model(batch)
    assert learned.peak_bytes > first.peak_bytes
    budget = learned.peak_bytes - 1
    plan = make_plans({"": model}, 3, BUS, budget=budget, groups="leaf", examples={"": batch})[1]
    assert not plan.fits
    assert plan.peak_bytes == learned.peak_bytes
    with offload(model, "cpu", groups="leaf", budget=budget):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"budget={budget:,} bytes is too small"):
                model(batch)


def test_batches_that_share_an_upload_are_learned_first():
    model, batches = elsewhere(), [torch.randn(2, WIDTH) for _ in range(7)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    with offload(model, "cpu", groups="leaf"):
        outputs = list(each(model, batches, 2))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


NETWORKS = {
    "swin_t": lambda: torchvision.models.swin_t(),
    "beit": lambda: timm.create_model("beit_base_patch16_224", depth=2, img_size=32),
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=56),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_whose_attention_reads_weights(name, recorder):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    batch = torch.randn(1, 3, *{"swin_t": (32, 32), "beit": (32, 32), "eva02": (56, 56)}[name])
    with torch.no_grad():
        expected = model(batch)
    plan = make_plans({"": model}, 3, BUS, examples={"": batch})[1]
    with offload(model, "cpu", transport=recorder) as statistics:
        for _ in range(3):
            assert torch.equal(model(batch), expected)
    assert statistics.peak_bytes == plan.peak_bytes <= 1.01 * statistics.planned_peak_bytes < statistics.weight_bytes
