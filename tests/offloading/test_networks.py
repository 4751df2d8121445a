"""Known networks give the same bits with weights that travel, and the log of the transport says why."""

import functools

import pytest
import timm
import torch
import torchvision

from largebatch.offloading import GROUPS, offload

NETWORKS = {
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v3": torchvision.models.mobilenet_v3_large,
    "densenet121": torchvision.models.densenet121,
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
}
BATCHES = 2


@functools.cache
def network(name):
    """Return a network, batches, and its outputs with all weights at hand."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(BATCHES)]
    with torch.no_grad():
        return model, batches, [model(batch) for batch in batches]


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in other)


def groups_of(log):
    """Return the copies of each pass, by where their weights lie; what stays on the device comes before them."""
    uses = [entry for entry in log if entry[0] in ("copy", "wait", "record")]
    sources, order = {}, []
    for operation, slot, *source in uses:
        if operation == "copy":
            sources[slot] = source[0]
        elif operation == "record":
            order.append(sources[slot])
    return order


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_have_the_same_bits_and_every_group_comes_once_a_pass(name, kind, recorder):
    model, batches, expected = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with offload(model, "cpu", groups=kind, transport=recorder) as statistics:
        outputs = [model(batch) for batch in batches]
        assert same(model.state_dict(), before)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert same(model.state_dict(), before)

    used = groups_of(recorder.log)
    assert used == used[: statistics.groups] * BATCHES
    assert len(set(used)) == statistics.groups
    # One more copy: the first group of a pass that did not come. And one of what stays on the device.
    kept = statistics.kept_bytes > 0
    assert recorder.order("copy")[kept:] == [*used, used[0]]
    assert statistics.uploads == len(used) + 1
    assert statistics.departures == 0
    assert recorder.most_live <= 2 + kept
    assert statistics.bytes_to_device <= (BATCHES + 1) * statistics.weight_bytes
    assert statistics.bytes_from_device == 0
    assert recorder.pinned == {}


def allocated():
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny"])
def test_a_budget_is_kept_and_used(name, transport):
    model, batches, _ = network(name)
    with offload(model, transport.device, mode="none") as whole:
        expected = [model(batch) for batch in batches]
    with offload(model, transport.device, transport=transport) as least:
        pass
    budget = (least.planned_peak_bytes + whole.weight_bytes) // 2
    before, first = allocated(), len(transport.slots)
    with offload(model, transport.device, budget=budget, transport=transport) as statistics:
        outputs = [model(batch) for batch in batches]
        on_device = sum(slot.memory.numel() for slot in transport.slots[first:])
        if transport.device.type == "cuda":
            assert allocated() - before <= 1.05 * statistics.planned_peak_bytes
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert statistics.peak_bytes == statistics.planned_peak_bytes == on_device
    assert 0.8 * budget < statistics.peak_bytes <= budget
    # What stays does not travel again.
    travelling = statistics.weight_bytes - statistics.kept_bytes
    assert statistics.bytes_to_device <= statistics.kept_bytes + (BATCHES + 1) * travelling
    assert travelling < 0.7 * statistics.weight_bytes


def test_leaf_groups_of_a_resnet_need_a_fifth_of_its_bytes():
    model, _, _ = network("resnet50")
    with offload(model, "cpu", groups="leaf") as statistics:
        pass
    # Two slots for the largest layer, layer4's 3×3 convolution and its BatchNorm: 512·512·9 floats and 4·512, and a
    # counter, each in whole steps of 256 bytes.
    slot = 4 * 512 * 512 * 9 + 4 * 4 * 512 + 256
    assert statistics.planned_peak_bytes == 2 * slot < 0.2 * statistics.weight_bytes


def test_without_prefetch_there_is_one_slot(recorder):
    model, batches, expected = network("vit_tiny")
    with offload(model, "cpu", prefetch=False, transport=recorder) as statistics:
        outputs = [model(batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert statistics.uploads == BATCHES * statistics.groups
    assert len(recorder.order("allocate")) == 2  # the slot, and what stays on the device
