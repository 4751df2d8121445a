import pytest
import torch
from recorder import Recorder
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import offload
from largebatch.offloading.transport import CpuTransport

ONE = 4 * 64 * 64 + 256  # bytes of a Linear(64, 64): weight and bias, in steps of 256


def linear():
    return nn.Linear(64, 64).eval()


def ensemble(count):
    return {f"member {number}": linear() for number in range(count)}


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_ensemble_of_k_is_uploaded_k_times_and_two_are_on_the_device(prefetch, transport):
    models, batches = ensemble(5), [torch.randn(2, 64) for _ in range(3)]
    before = {name: [tensor.clone() for tensor in model.parameters()] for name, model in models.items()}
    with offload(models, transport.device, mode="none"):
        expected = [[model(batch) for batch in batches] for model in models.values()]
    with offload(models, transport.device, mode="model", prefetch=prefetch, transport=transport) as statistics:
        outputs = [[model(batch) for batch in batches] for model in models.values()]
    for one, other in zip(outputs, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    for name, model in models.items():
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before[name], strict=True))
    assert statistics.uploads == 5
    assert statistics.passes == 15
    assert statistics.bytes_to_device == statistics.weight_bytes == 5 * ONE
    assert statistics.bytes_from_device == 0
    assert statistics.peak_bytes == statistics.planned_peak_bytes == (2 if prefetch else 1) * ONE
    # All given back, the last one too.
    assert len(transport.order("release")) == 5
    assert transport.pinned == {}


def test_the_next_model_is_on_its_way_while_one_computes(recorder):
    models, seen = ensemble(3), []
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: seen.append((name, len(recorder.order("copy")))))
    with offload(models, "cpu", mode="model", transport=recorder):
        for model in models.values():
            model(torch.randn(2, 64))
    assert seen == [("member 0", 2), ("member 1", 3), ("member 2", 3)]


def test_the_least_recently_used_goes_first(recorder):
    a, b, c = (linear() for _ in range(3))
    batch = torch.randn(2, 64)
    models = {"a": a, "b": b, "c": c}
    with offload(models, "cpu", mode="model", budget=2 * ONE, prefetch=False, transport=recorder) as statistics:
        for model in (a, b, a, c):  # c takes the place of b, which was used before a
            model(batch)
        assert statistics.uploads == 3
        a(batch)
        assert statistics.uploads == 3
        b(batch)  # takes the place of c
        a(batch)
        assert statistics.uploads == 4
    assert statistics.peak_bytes == 2 * ONE


def test_another_order_than_that_of_the_names_is_learned(recorder):
    a, b, c = (linear() for _ in range(3))
    with offload({"a": a, "b": b, "c": c}, "cpu", mode="model", transport=recorder) as statistics:
        for model in (a, c, b) * 2:
            model(torch.randn(2, 64))
        first_rounds = statistics.uploads
        for model in (a, c, b):
            model(torch.randn(2, 64))
        # Each once, and each before it is needed: three models, two places.
        assert statistics.uploads == first_rounds + 3


def test_models_that_share_weights_travel_together(recorder):
    a, b = linear(), nn.Linear(64, 64).eval()
    b.weight = a.weight
    with offload({"a": a, "b": b}, "cpu", mode="model", transport=recorder) as statistics:
        a(torch.randn(2, 64))
        b(torch.randn(2, 64))
    assert (statistics.groups, statistics.uploads) == (1, 1)
    assert a.weight is b.weight


def test_a_budget_below_the_largest_model_names_it():
    models = {"small": linear(), "large": nn.Linear(64, 128).eval()}
    large = 4 * 64 * 128 + 512
    with pytest.raises(UserError, match=rf"budget=100 bytes is too small: .* large alone is {large:,}.*mode=submodule"):
        offload(models, "cpu", mode="model", budget=100).__enter__()
    with pytest.raises(UserError, match=rf"budget=100 .* mode=none all {ONE + large:,} bytes.*mode=submodule"):
        offload(models, "cpu", mode="none", budget=100).__enter__()
    with offload(models, "cpu", mode="model", budget=large) as statistics:
        for model in models.values():
            model(torch.randn(2, 64))
    assert statistics.peak_bytes == large


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_models_are_as_they_were_after_an_exception(kind, recorder):
    models = ensemble(3)
    pointers = {name: [id(tensor) for tensor in model.parameters()] for name, model in models.items()}
    values = {name: [tensor.tolist() for tensor in model.parameters()] for name, model in models.items()}
    with pytest.raises(kind), offload(models, "cpu", mode="model", transport=recorder):  # noqa: PT012
        models["member 1"](torch.randn(2, 64))
        raise kind
    for name, model in models.items():
        assert [id(tensor) for tensor in model.parameters()] == pointers[name]
        assert [tensor.tolist() for tensor in model.parameters()] == values[name]
        assert all(tensor.requires_grad for tensor in model.parameters())


def test_a_copy_that_fails_is_made_again_when_it_is_needed():
    models, batch = ensemble(2), torch.randn(2, 64)
    with torch.no_grad():
        expected = [model(batch) for model in models.values()]
    first, second = models.values()
    for number in (1, 2):
        transport = Recorder(CpuTransport(), lazy=True, fail_at=number)
        with offload(models, "cpu", mode="model", transport=transport) as statistics:
            with pytest.raises(OSError, match="the bus is broken"):
                first(batch)
            assert torch.equal(first(batch), expected[0])
            assert torch.equal(second(batch), expected[1])
            assert statistics.uploads == 2


class Encoder(nn.Module):
    """Like a pipeline's variational encoder: called by another method than forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def decode(self, hidden):
        return self.inner(hidden)


def test_a_pipeline_of_components_of_which_one_is_called_by_another_method(transport):
    """Text encoder, denoiser used many times, decoder: the shape of a diffusion pipeline."""
    text, denoiser, decoder = nn.Embedding(10, 64).eval(), linear(), Encoder().eval()

    def pipeline():
        hidden = text(torch.arange(4))
        for _ in range(5):
            hidden = hidden - 0.1 * denoiser(hidden)
        return decoder.decode(hidden)

    components = {"text_encoder": text, "unet": denoiser, "vae": decoder}
    with offload(components, transport.device, mode="none"):
        expected = pipeline()
    with offload(components, transport.device, mode="model", transport=transport) as statistics:
        images = pipeline()
    assert torch.equal(images, expected)
    assert statistics.uploads == 3
    assert statistics.peak_bytes <= 2 * ONE


def test_several_models_share_one_ring(recorder):
    models, batches = ensemble(4), [torch.randn(2, 64) for _ in range(2)]
    with torch.no_grad():
        expected = [[model(batch) for batch in batches] for model in models.values()]
    with offload(models, "cpu", mode="submodule", transport=recorder) as statistics:
        outputs = [[model(batch) for batch in batches] for model in models.values()]
    for one, other in zip(outputs, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert statistics.peak_bytes == 2 * ONE
    assert statistics.departures == 0


@pytest.mark.parametrize("mode", ["none", "submodule"])
def test_a_model_within_another_is_refused_where_passes_are_told_apart(mode):
    outer = nn.Sequential(linear(), linear()).eval()
    for models in ({"net": outer, "head": outer[1]}, {"head": outer[1], "net": outer}):
        with pytest.raises(UserError, match="head is a part of net"), offload(models, "cpu", mode=mode):
            pass
    with offload({"net": outer, "head": outer[1]}, "cpu", mode="model"):
        assert torch.isfinite(outer(torch.randn(2, 64))).all()


def test_inputs_are_taken_to_the_device_and_outputs_brought_back():
    """Meta stands for another device: its tensors may go anywhere but back."""
    from largebatch.offloading.inputs import moved

    values = {"images": (torch.ones(2), [torch.ones(1, dtype=torch.int8)]), "name": "x", "none": None}
    there = moved(values, torch.device("meta"))
    assert there["images"][0].device.type == there["images"][1][0].device.type == "meta"
    assert (there["name"], there["none"]) == ("x", None)
