"""What a model writes into its weights and buffers, in any mode and within any budget."""

import copy

import pytest
import torch
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import each, offload

# mode, and the share of all weights that the budget is: 0 is the least that works
WAYS = [("none", None), ("model", None), ("submodule", None), ("submodule", 0.9), ("submodule", 1.0)]


class Calls(nn.Module):
    """Counts in a buffer beside its layer, from the second pass on."""

    def __init__(self, write):
        super().__init__()
        self.first, self.layer, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("calls", torch.zeros(1))
        self.passes, self.write = 0, write

    def forward(self, hidden):
        self.passes += 1
        self.write(self)
        return self.last(self.layer(self.first(hidden))) + self.calls


class Inner(nn.Module):
    """A leaf with a weight and a counter of its own."""

    def __init__(self, write):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("calls", torch.zeros(1))
        self.passes, self.write = 0, write

    def forward(self, hidden):
        self.passes += 1
        self.write(self)
        return hidden @ self.weight + self.calls


def beside(module):
    module.calls.add_(1)


def later(module):
    if module.passes > 1:
        module.calls.add_(1)


def through_data(module):
    module.calls.data.add_(1)


def a_view(module):
    module.calls[:1].mul_(2).add_(1)


def another_tensor(module):
    module.calls = module.calls + 1


def a_new_data(module):
    module.calls.data = module.calls.data + 1


def a_running_mean(module):
    nn.functional.batch_norm(torch.arange(4.0)[:, None], module.calls, torch.ones(1), training=True)


WRITES = [beside, later, through_data, a_view, another_tensor, a_new_data, a_running_mean]


def in_a_parent(write):
    return nn.Sequential(nn.Linear(8, 8), Calls(write), nn.Linear(8, 8))


def in_a_leaf(write):
    return nn.Sequential(nn.Linear(8, 8), Inner(write), nn.Linear(8, 8))


def in_a_childs_buffer(write):
    """The parent writes into a buffer of a module that it calls only later."""
    model = in_a_leaf(lambda module: None)
    model.passes = 0

    def before(module, args):
        module[1].passes += 1
        write(module[1])

    model.register_forward_pre_hook(before)
    return model


def check(make, batches, mode, share, passes=lambda model, batches: [model(batch) for batch in batches]):
    """Compare outputs and state with those of the same model that was never offloaded."""
    torch.manual_seed(0)
    plain = make().eval()
    model = copy.deepcopy(plain)
    with torch.no_grad():
        expected = [plain(batch) for batch in batches]
    budget = None
    if share is not None:
        with offload(model, "cpu", mode="none") as whole:
            pass
        budget = int(share * whole.weight_bytes)
    with offload(model, "cpu", mode=mode, budget=budget, groups="leaf") as statistics:
        outputs = passes(model, batches)
        inside = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    for state in (inside, model.state_dict()):
        assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    return statistics


@pytest.mark.parametrize(("mode", "share"), WAYS)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("place", [in_a_parent, in_a_leaf, in_a_childs_buffer], ids=lambda place: place.__name__)
def test_what_a_pass_writes_is_there_in_the_next_and_afterwards(place, write, mode, share):
    batches = [torch.randn(2, 8) for _ in range(4)]
    statistics = check(lambda: place(write), batches, mode, share)
    assert statistics.passes == 4


@pytest.mark.parametrize(("mode", "share"), WAYS)
def test_an_embedding_that_renormalises_its_weights(mode, share):
    def make():
        return nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 8), nn.Linear(8, 8))

    statistics = check(make, [torch.tensor([1, 2]), torch.tensor([3, 4])], mode, share)
    assert statistics.bytes_from_device >= 10 * 8 * 4


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_nothing_comes_back_of_a_model_that_writes_nothing(mode):
    statistics = check(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), [torch.randn(2, 8)] * 3, mode, None)
    assert statistics.bytes_from_device == 0


def test_batches_that_share_an_upload_write_too():
    check(
        lambda: nn.Sequential(nn.Linear(8, 8), Inner(lambda module: None), nn.Linear(8, 8)),
        [torch.randn(2, 8) for _ in range(5)],
        "submodule",
        None,
        lambda model, batches: list(each(model, batches, 2)),
    )


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
def test_a_weight_that_is_written_between_passes(mode):
    """Also one whose upload is on its way already: the first group of the next pass."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).eval(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    with offload(model, "cpu", mode=mode, groups="leaf"):
        for place in (0, 1, 2):
            model(batch)
            for one in (model, plain):
                one[place].weight.mul_(2)
            with torch.no_grad():
                expected = plain(batch)
            assert torch.equal(model(batch), expected)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["none", "submodule", "model"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "calls", torch.zeros(3)), r"1\.calls, \(1,\) of torch\.float32, was replaced by \(3,\)"),
        (lambda m: setattr(m, "calls", None), r"1\.calls, .* was replaced by NoneType"),
        (lambda m: setattr(m.weight, "data", torch.zeros(2, 2)), r"1\.weight, .* was replaced by \(2, 2\)"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(8, 8))), r"1\.weight, .* a buffer may be replaced"),
    ],
)
def test_another_tensor_that_does_not_fit_is_refused_and_kept(mode, change, reason):
    model = in_a_leaf(lambda module: None).eval()
    with offload(model, "cpu", mode=mode):
        model(torch.randn(2, 8))
        change(model[1])
        state = dict(model[1].named_buffers()) | dict(model[1].named_parameters())
        with pytest.raises(UserError, match=reason):
            model(torch.randn(2, 8))
    after = dict(model[1].named_buffers()) | dict(model[1].named_parameters())
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in after)


class Shows(nn.Module):
    """Gives out a view of its weights, as a position embedding does."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))

    def forward(self, hidden):
        return {"rows": self.table[: len(hidden)], "same": self.table[:1].expand(len(hidden), 8)}


class UsesLater(nn.Module):
    def __init__(self):
        super().__init__()
        self.shows, self.first, self.second, self.last = Shows(), *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden):
        shown = self.shows(hidden)
        return self.last(self.second(self.first(hidden))) + shown["rows"] + shown["same"]


def test_a_view_of_weights_that_a_module_gives_out_stays_what_it_was(transport):
    """Its group is gone when it is used, and another one is in its place."""
    torch.manual_seed(0)
    model, batches = UsesLater().eval(), [torch.randn(2, 8) for _ in range(3)]
    with offload(model, transport.device, mode="none"):
        expected = [model(batch) for batch in batches]
    with offload(model, transport.device, groups="leaf", transport=transport):
        assert all(torch.equal(model(batch), one) for batch, one in zip(batches, expected, strict=True))
