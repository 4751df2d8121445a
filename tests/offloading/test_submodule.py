import contextlib
import copy
import threading
import time
import warnings

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.base.errors import UserError
from largebatch.offloading import each, offload
from largebatch.offloading.transport import CpuTransport


class Chain(nn.Module):
    """Linear layers one after the other, with a function called between the second and the third."""

    def __init__(self, width=16, layers=4, between=lambda hidden: None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.between = between

    def forward(self, hidden):
        for place, layer in enumerate(self.layers):
            if place == 2:
                self.between(hidden)
            hidden = layer(hidden).tanh()
        return hidden


class Tied(nn.Module):
    """An embedding whose weight is also the output's, by two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.inner(self.embedding(words)))


class Twice(Chain):
    """One layer used at two places, and then by another name."""

    def forward(self, hidden):
        first, second, third, _ = self.layers
        return third(first(second(first(hidden))))


class Strange(nn.Module):
    """Weights of every kind: strides, gaps, zero sizes, types, and two views of one storage."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Linear(8, 8)
        self.turned.weight = nn.Parameter(torch.randn(8, 8).t())
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.narrow = nn.Linear(8, 8).bfloat16()
        self.eight = nn.Module()
        self.eight.register_buffer("weight", torch.randint(-128, 127, (8, 8), dtype=torch.int8))
        self.eight.register_buffer("scale", torch.tensor(0.01, dtype=torch.float64), persistent=False)
        self.eight.register_buffer("nothing", torch.zeros(0, 3))
        self.eight.register_buffer("gaps", torch.arange(40.0)[3:30:2])
        self.eight.register_buffer("same", torch.ones(1).expand(8))
        self.eight.forward = lambda hidden: hidden @ (self.eight.weight * self.eight.scale).float() + self.eight.same
        mixed = torch.arange(8.0).double().repeat(4).view(torch.float32)
        self.eight.register_buffer("four_bytes", mixed[1:33])
        self.eight.register_buffer("eight_bytes", mixed.view(torch.float64)[2:10])
        both = torch.randn(72)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.weight = nn.Parameter(both[:64].view(8, 8))
        self.second.weight = nn.Parameter(both[8:].view(8, 8))

    def forward(self, hidden):
        hidden = self.second(self.first(self.turned(hidden)))
        hidden = self.narrow(hidden.bfloat16()).float()
        return self.eight(hidden) + self.conv(hidden.new_ones(1, 4, 3, 3)).sum()


def words():
    return torch.arange(10).view(2, 5)


MODELS = {
    "chain": (Chain, lambda: torch.randn(2, 16)),
    "one layer": (lambda: nn.Linear(16, 4), lambda: torch.randn(2, 16)),
    "tied": (Tied, words),
    "twice": (Twice, lambda: torch.randn(2, 16)),
    "strange": (Strange, lambda: torch.randn(2, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32), lambda: torch.randn(3, 2, 16)),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4)),
                    lambda: torch.randn(2, 16)),
    "no weights": (nn.Tanh, lambda: torch.randn(2, 16)),
}  # fmt: skip


def facts(model):
    """Return all that an exit must restore."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [
        (name, id(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_leaf, t.detach().tolist())
        for name, t in named
    ], hooks


@pytest.mark.parametrize("kind", ["bytes", "leaf"])
@pytest.mark.parametrize("name", MODELS)
def test_any_module_computes_the_same_and_is_afterwards_as_it_was(name, kind, transport):
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, batches = make().eval(), [batch() for _ in range(3)]
    before = facts(model)
    with offload(model, transport.device, mode="none"):
        expected = [model(one) for one in batches]
    assert facts(model) == before
    with offload(model, transport.device, groups=kind, transport=transport), torch.inference_mode():
        outputs = [model(one) for one in batches]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert facts(model) == before
    assert torch.equal(model(batches[0]), expected[0]) or transport.device.type == "cuda"


def test_tied_weights_stay_tied_and_come_for_both_uses(recorder):
    model = Tied().eval()
    with offload(model, "cpu", groups="leaf", transport=recorder) as statistics:
        model(words())
        model(words())
    assert model.head.weight is model.embedding.weight
    assert statistics.groups == 2  # the embedding with the head, the linear layer
    # In each pass the embedding's group twice, but for its second visit next to its first of the second pass.
    assert statistics.departures == 0
    assert statistics.weight_bytes == 768 + 256 + 1280  # 10·16 and 10 floats, 16·16 and 16, in steps of 256 bytes


class Again(nn.Module):
    """Two layers that come twice in a pass, and before another one each time."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden):
        return self.fourth(self.second(self.first(self.third(self.second(self.first(hidden))))))


def test_what_comes_next_depends_on_the_place_in_the_pass(recorder):
    model, batch = Again().eval(), torch.randn(2, 16)
    with offload(model, "cpu", groups="leaf", transport=recorder) as statistics:
        for _ in range(3):
            model(batch)
    assert statistics.departures == 0
    assert statistics.uploads == 3 * 6 + 1


def test_modules_that_are_called_without_the_model_are_no_departure(recorder):
    model, batch = Chain().eval(), torch.randn(2, 16)
    with torch.no_grad():
        expected = model.layers[3](batch)
    with offload(model, "cpu", groups="leaf", transport=recorder) as statistics:
        for _ in range(2):
            assert torch.equal(model.layers[3](batch), expected)
            model(batch)
    assert statistics.departures == 0


def test_two_parameters_over_one_storage_share_it_afterwards():
    model = Strange().eval()
    with offload(model, "cpu"):
        pass
    assert model.first.weight.untyped_storage().data_ptr() == model.second.weight.untyped_storage().data_ptr()


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden):
        hidden = self.first(hidden)
        hidden = self.left(hidden) if hidden.sum() > 0 else self.right(hidden)
        return self.last(hidden)


def test_another_way_than_on_the_first_batch_is_right_and_warns_once(transport):
    model = Branch().eval()
    batch = torch.randn(2, 16)
    ways = [batch if model.first(batch).sum() > 0 else -100 * batch, torch.zeros(2, 16)]
    with torch.no_grad():
        model.first.bias.fill_(-0.01)
        ways[0] = torch.linalg.lstsq(model.first.weight, torch.ones(16)).solution.expand(2, 16)
        assert model.first(ways[0]).sum() > 0 > model.first(ways[1]).sum()
    with offload(model, transport.device, mode="none"):
        expected = [model(way) for way in ways]
    with offload(model, transport.device, groups="leaf", transport=transport) as statistics:
        with pytest.warns(UserWarning, match=r"another way .*: right comes unexpected") as caught:
            outputs = [model(way) for way in ways * 3]
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected * 3, strict=True))
    assert len(caught) == 1
    assert statistics.departures > 1


def test_a_branch_that_was_not_seen_takes_the_place_of_the_other(recorder):
    model = Branch().eval()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(16)), model.first.bias.zero_()
    with offload(model, "cpu", groups="leaf", transport=recorder) as statistics:
        model(torch.ones(2, 16))
        with pytest.warns(UserWarning, match="right comes unexpected"):
            model(-torch.ones(2, 16))
    assert statistics.departures == 1  # what follows is expected again
    # Twice three, the left branch for nothing, and the first layer of a third pass.
    assert statistics.uploads == 3 + 1 + 3 + 1


def test_state_dict_shows_the_hosts_copy_at_any_time():
    seen = []
    model = Chain().eval()
    before = copy.deepcopy(model.state_dict())
    with offload(model, "cpu", groups="leaf"):
        seen.append(copy.deepcopy(model.state_dict()))
        model(torch.randn(2, 16))
        seen.append(copy.deepcopy(model.state_dict()))
        model.between = lambda hidden: seen.append(copy.deepcopy(model.state_dict()))
        model(torch.randn(2, 16))
    assert len(seen) == 3
    assert all(torch.equal(state[key], before[key]) for state in seen for key in before)


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_weights_are_not_loaded_inside(mode):
    """Some are on the device or on their way there: what is loaded would come too late, or be lost."""
    model, other = Chain().eval(), Chain().eval()
    with offload(model, "cpu", mode=mode):
        model(torch.randn(2, 16))
        with pytest.raises(UserError, match="load_state_dict was called inside"):
            model.load_state_dict(other.state_dict())
        with pytest.raises(UserError, match="load_state_dict was called inside"):
            model.layers.load_state_dict(other.layers.state_dict())
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_a_model_can_be_trained_after_a_context_in_inference_mode(mode):
    model, batch = Chain().eval(), torch.randn(2, 16)
    with torch.inference_mode(), offload(model, "cpu", mode=mode):
        model(batch)
    model(batch).sum().backward()
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


class Stop(BaseException):
    """Like KeyboardInterrupt, past every `except Exception`."""


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("leave", [True, False])
def test_an_exception_in_the_middle_of_a_pass(kind, leave, transport):
    def fail(hidden):
        if len(calls) == 1:
            raise kind("in the middle")

    calls = []
    model = Chain(between=fail).eval()
    before, batch = facts(model), torch.randn(2, 16)
    with offload(model, transport.device, mode="none"):
        expected = model(batch)
    for first in (0, 1):  # in the first pass, which is watched; in a later one
        calls[:] = [None] if not first else []
        with pytest.raises(kind), offload(model, transport.device, groups="leaf", transport=transport):  # noqa: PT012
            if first:
                model(batch)
                calls.append(None)
            if leave:
                model(batch)
            with pytest.raises(kind):
                model(batch)
            calls.clear()
            assert torch.equal(model(batch), expected)  # and goes on
            raise kind("and out")
        assert facts(model) == before
        assert transport.pinned == {}


def test_a_copy_that_fails_leaves_the_model_as_it_was():
    model = Chain().eval()
    before, batch = facts(model), torch.randn(2, 16)
    with torch.no_grad():
        expected = model(batch)
    for number in range(1, 9):
        transport = Recorder(CpuTransport(), lazy=True, fail_at=number)
        with offload(model, "cpu", groups="leaf", transport=transport):
            outputs = []
            for _ in range(3):
                with contextlib.suppress(OSError):
                    outputs.append(model(batch))
            assert len(outputs) == 2
            assert all(torch.equal(output, expected) for output in outputs)
        assert facts(model) == before


class NoMorePins(CpuTransport):
    """Host memory that may be pinned is limited."""

    left = 2

    def pin(self, memory):
        self.left -= 1
        if self.left < 0:
            raise OSError("no more pinned memory")


@pytest.mark.parametrize("mode", ["submodule", "model"])
def test_a_start_that_fails_leaves_the_model_as_it_was(mode):
    models = {str(number): Chain().eval() for number in range(3)}
    before = [facts(model) for model in models.values()]
    with pytest.raises(OSError, match="no more"), offload(models, "cpu", mode=mode, transport=NoMorePins()):
        pass
    assert [facts(model) for model in models.values()] == before
    with offload(models, "cpu", mode=mode):
        pass


class Broken(CpuTransport):
    """Like a device after an error, which every later call repeats."""

    def close(self):
        raise OSError("the device is gone")

    def release(self, slot):
        self.close()

    def unpin(self, memory):
        self.close()


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_a_broken_device_gives_the_weights_back(mode):
    models = {str(number): Chain().eval() for number in range(3)}
    before, batch = [facts(model) for model in models.values()], torch.randn(2, 16)
    with pytest.raises(OSError, match="is gone"), offload(models, "cpu", mode=mode, transport=Broken()):  # noqa: PT012
        for model in models.values():
            model(batch)
    assert [facts(model) for model in models.values()] == before


def test_slow_copies_make_it_slow_and_nothing_else():
    model, batch = Chain().eval(), torch.randn(2, 16)
    with torch.no_grad():
        expected = model(batch)
    started = time.perf_counter()
    with offload(model, "cpu", groups="leaf", transport=Recorder(CpuTransport(), lazy=True, slow=0.01)) as statistics:
        assert torch.equal(model(batch), expected)
    assert time.perf_counter() - started >= 0.01 * statistics.uploads == 0.05


class Casts(TorchDispatchMode):
    """Counts casts of weights, which are those to another type of matrices of 16 × 16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == (16, 16)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["submodule", "model"])
def test_under_autocast_no_casts_of_weights_stay_on_the_device(mode):
    """Autocast keeps its casts as long as it lasts: a weight that is cast again in each pass was not kept."""
    models, batch = {"a": Chain().eval(), "b": Chain().eval()}, torch.randn(2, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [model(batch) for model in models.values()]
    with (
        offload(models, "cpu", mode=mode, groups="leaf", prefetch=False),
        torch.autocast("cpu", torch.bfloat16),
        Casts() as casts,
    ):
        for number in (1, 2, 3):
            for model, output in zip(models.values(), expected, strict=True):
                assert torch.equal(model(batch), output)
            assert casts.count == number * 8


def test_the_host_has_no_second_copy():
    """Pages that were never written to don't count, and originals go as they are copied."""
    # 41 MB each: larger than what the C library keeps for later instead of giving it back.
    model = nn.Sequential(*(nn.Linear(3200, 3200) for _ in range(4))).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def resident():
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    before = resident()
    with offload(model, "cpu") as statistics:
        model(torch.randn(1, 3200))
        added = resident() - before - statistics.peak_bytes
    assert added < 0.05 * weights + 2**21


# Several batches an upload


@pytest.mark.parametrize("together", [1, 2, 3])
def test_batches_share_an_upload(together, transport):
    model, threads = Chain().eval(), threading.enumerate()
    batches = [torch.randn(2, 16) for _ in range(6)]
    with offload(model, transport.device, mode="none"):
        expected = list(each(model, batches, together))
    with offload(model, transport.device, groups="leaf", transport=transport) as statistics, torch.inference_mode():
        outputs = list(each(model, iter(batches), together))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    loads = {1: 6, 2: 1 + 3, 3: 1 + 2}[together]  # the first batch goes alone
    assert statistics.uploads == 4 * loads + 1
    assert statistics.passes == 6
    assert threading.enumerate() == threads


def test_batches_that_share_an_upload_are_of_a_whole_model():
    model = Chain().eval()
    with offload(model, "cpu"), pytest.raises(UserError, match="this is a part of one"):
        list(each(model.layers[0], [torch.randn(2, 16)] * 3, 2))


def test_batches_that_part_ways_are_right():
    model = Branch().eval()
    batches = [torch.randn(2, 16) for _ in range(9)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        assert len({bool(model.first(batch).sum() > 0) for batch in batches}) == 2
    with offload(model, "cpu", groups="leaf"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = list(each(model, batches, 4))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_settings_of_the_thread_hold_for_batches_that_share_an_upload():
    model = Chain().eval()
    batches = [torch.randn(2, 16) for _ in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [model(batch) for batch in batches]
    with offload(model, "cpu", groups="leaf"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        outputs = list(each(model, batches, 2))
    assert all(output.dtype == torch.bfloat16 and output.is_inference() for output in outputs)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_settings_of_the_device_hold_for_batches_that_are_not_there_yet():
    model, stream, seen = Chain().eval(), torch.cuda.Stream(), []
    model.register_forward_hook(lambda *_: seen.append(torch.cuda.current_stream() == stream))
    batches = [torch.randn(2, 16) for _ in range(3)]
    with offload(model, "cuda", groups="leaf"), torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        outputs = list(each(model, batches, 2))
    assert all(output.dtype == torch.bfloat16 and output.device.type == "cpu" for output in outputs)
    assert seen == [True] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_device_holds_no_more_than_was_planned():
    """Wide layers and few samples, so that activations are small beside the weights: 8 × 16 MB against 2 groups."""
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).eval()
    images = torch.randn(4, 2048, device="cuda")
    torch.nn.functional.linear(images, images.new_zeros(2, 2048))  # its library's workspace stays for good
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), offload(model, "cuda", groups="leaf") as statistics:
        model(images)
    took = torch.cuda.max_memory_allocated() - before
    assert statistics.planned_peak_bytes < statistics.weight_bytes / 3
    assert took <= statistics.planned_peak_bytes + 2**20


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_one_of_several_batches_fails(kind, recorder):
    def fail(hidden):
        if hidden.isnan().any():
            raise kind("not a number")

    model = Chain(between=fail).eval()
    threads = threading.enumerate()
    before, good, bad = facts(model), torch.randn(2, 16), torch.full((2, 16), torch.nan)
    with torch.no_grad():
        expected = model(good)
    with offload(model, "cpu", groups="leaf", transport=recorder):
        with pytest.raises(kind, match="not a number"):
            list(each(model, [good, good, bad, good], 3))
        assert threading.enumerate() == threads
        assert all(torch.equal(output, expected) for output in each(model, [good] * 3, 2))
    assert facts(model) == before


# Bad input


def test_a_budget_below_the_least_names_it():
    model = Chain().eval()
    least = 2 * (1024 + 256)
    with pytest.raises(UserError, match=r"budget=2,559 bytes is too small: the least .* is 2,560, 2 × 1,280 for lay"):
        offload(model, "cpu", budget=least - 1).__enter__()
    with offload(model, "cpu", budget=least) as statistics:
        assert torch.isfinite(model(torch.randn(2, 16))).all()
    assert statistics.peak_bytes == least


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_training_mode_is_refused(mode):
    model = Chain()
    with pytest.raises(UserError, match=r"training mode.*model\.eval\(\)"), offload(model, "cpu", mode=mode):
        pass
    with offload(model.eval(), "cpu", mode=mode):
        model(torch.randn(2, 16))
        model.train()
        with pytest.raises(UserError, match="training mode"):
            model(torch.randn(2, 16))
    model.eval()
    model.layers[2].train()
    with pytest.raises(UserError, match=r"layers\.2 is in training mode"), offload(model, "cpu", mode=mode):
        pass
    with offload(model.eval(), "cpu"):
        model.layers[2].train()
        with pytest.raises(UserError, match=r"layers\.2 is in training mode"):
            model(torch.randn(2, 16))


def test_gradients_are_refused():
    model = Chain().eval()
    with offload(model, "cpu"), torch.enable_grad(), pytest.raises(UserError, match=r"torch\.no_grad"):
        model(torch.randn(2, 16))


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_nested_offloading_is_refused(mode):
    model = Chain().eval()
    with offload(model, "cpu", mode=mode):
        for one in (model, model.layers[1], {"a": nn.Linear(2, 2).eval(), "b": model}):
            with pytest.raises(UserError, match="offloaded already"), offload(one, "cpu"):
                pass
    with offload(model, "cpu"):
        model(torch.randn(2, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_model_is_refused():
    model = Chain().eval()
    with pytest.raises(UserError, match=r"is compiled.*before torch\.compile"):
        offload(torch.compile(model), "cpu").__enter__()
    model.layers[1].compile()
    with pytest.raises(UserError, match="is compiled"):
        offload(model, "cpu").__enter__()


def test_a_model_that_is_elsewhere_already_is_refused():
    model = Chain().eval().to("meta")
    with pytest.raises(UserError, match=r"layers\.0\.weight is on meta already.*Leave out \.to\(device\)"):
        offload(model, "cpu").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda():
    with pytest.raises(UserError, match=r"device=cuda, but PyTorch finds no CUDA device here.*device=cpu"):
        offload(Chain().eval(), "cuda").__enter__()


def test_another_device():
    with pytest.raises(UserError, match="device=mps cannot be offloaded to: it takes cuda, or cpu"):
        offload(Chain().eval(), "mps").__enter__()


def test_a_sparse_weight_is_refused():
    model = Chain().eval()
    model.layers[0].register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(UserError, match=r"layers\.0\.mask is a Tensor of layout torch\.sparse_coo"):
        offload(model, "cpu").__enter__()


def test_unknown_words():
    with pytest.raises(UserError, match=r"mode=submodules is not known.*Did you mean 'submodule'"):
        offload(Chain().eval(), "cpu", mode="submodules").__enter__()
    with pytest.raises(UserError, match=r"groups=block is not known.*Did you mean 'blocks'"):
        offload(Chain().eval(), "cpu", groups="block").__enter__()
    with pytest.raises(UserError, match="batches_per_load=0 is too small"):
        each(Chain().eval(), [], 0)
