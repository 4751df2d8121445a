"""Memory, types and views are after the context what they were; what cannot be kept is refused with a sentence."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from largebatch.base.errors import UserError
from largebatch.offloading import offload

MODES = ["none", "submodule", "model"]


class Lazy(nn.Module):
    """Weights that are conjugate or negative only as views."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64).conj())
        self.register_buffer("plain", torch.randn(8, dtype=torch.complex64))
        self.register_buffer("conjugate", self.plain.conj())  # of the same memory
        self.register_buffer("negative", torch.randn(8, dtype=torch.complex64).conj().imag)

    def forward(self, hidden):
        return (hidden.to(torch.complex64) @ self.phase * self.plain + self.conjugate).real + self.negative


@pytest.mark.parametrize("mode", MODES)
def test_conjugate_and_negative_views_stay_views(mode):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(8, 8), Lazy(), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    before = {key: (tensor.resolve_conj().resolve_neg().clone(), tensor.is_conj(), tensor.is_neg())
              for key, tensor in model.state_dict().items()}  # fmt: skip
    assert before["1.negative"][2]
    assert before["1.conjugate"][1]
    with torch.no_grad():
        expected = model(batch)
    with offload(model, "cpu", mode=mode, groups="leaf"):
        assert torch.equal(model(batch), expected)
        assert torch.equal(model(batch), expected)
    for key, tensor in model.state_dict().items():
        values, conjugate, negative = before[key]
        assert torch.equal(tensor, values)
        assert (tensor.is_conj(), tensor.is_neg()) == (conjugate, negative)
    assert torch.equal(model(batch), expected)
    lazy = model[1]
    lazy.plain[0] = 5 + 1j
    assert lazy.conjugate[0] == 5 - 1j


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_somebody_else_sees_is_the_same_afterwards(mode):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    outside = model[0].weight.detach()  # as an average of weights may hold it
    model[1].share_memory()
    both = torch.randn(200)
    model[2].weight, model[2].bias = nn.Parameter(both[10:74].view(8, 8)), nn.Parameter(both[100:108])
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with offload(model, "cpu", mode=mode):
        model(torch.randn(2, 8))
        model[0].weight.add_(1)
    assert [parameter.data_ptr() for parameter in model.parameters() if parameter is not model[0].bias] == [
        pointer for pointer, parameter in zip(pointers, model.parameters(), strict=True)
        if parameter is not model[0].bias
    ]  # fmt: skip
    assert torch.equal(outside, model[0].weight)
    assert model[1].weight.is_shared()
    model[2].weight.data.fill_(7)
    assert (both[10:74] == 7).all()
    assert model[2].bias.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_storages_have_the_sizes_that_they_had(mode):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    before = [tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()]
    with offload(model, "cpu", mode=mode):
        model(torch.randn(2, 3))
        inside = [tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()]
    assert before == inside == [tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.inner(self.embedding(words)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", ["bytes", "leaf"])
def test_a_model_is_saved_inside_and_afterwards(mode, groups, tmp_path):
    model = Tied().eval()
    before = copy.deepcopy(model.state_dict())

    def check(name):
        other = Tied()
        safetensors.torch.save_model(model, str(tmp_path / name))
        safetensors.torch.load_model(other, str(tmp_path / name))
        assert all(torch.equal(other.state_dict()[key], before[key]) for key in before)
        torch.save(model.state_dict(), tmp_path / name)
        size = sum(tensor.nbytes for tensor in model.parameters())
        assert (tmp_path / name).stat().st_size < size + 4000
        assert all(torch.equal(torch.load(tmp_path / name)[key], before[key]) for key in before)

    with offload(model, "cpu", mode=mode, groups=groups):
        check("before.pt")
        model(torch.arange(4))
        check("inside.pt")
    check("after.pt")
    torch.save(model, tmp_path / "whole.pt")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.layers.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.share_memory(),
        lambda m: nn.Sequential(m).half(),
    ],
)
def test_another_type_or_place_is_refused(mode, change):
    model = nn.Module()
    model.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.forward = model.layers.forward
    model.eval()
    with offload(model, "cpu", mode=mode):
        with pytest.raises(UserError, match="inside of an offloading context"):
            change(model)
        model.float().to("cpu")  # what changes nothing is no change
        assert model(torch.randn(2, 4)).dtype == torch.float32
    assert model.half()(torch.randn(2, 4).half()).dtype == torch.float16


@pytest.mark.parametrize("mode", MODES)
def test_requires_grad_is_what_it_is_made(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[0].bias.requires_grad_(False)
    with offload(model, "cpu", mode=mode):
        model(torch.randn(2, 4))
        model[0].bias.requires_grad_(True)
        model[1].requires_grad_(False)
        model(torch.randn(2, 4))
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    model(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("take", "reason"),
    [
        (copy.deepcopy, "was copied inside of an offloading context"),
        (lambda model: copy.deepcopy({"net": model[0]}), "was copied inside of an offloading context"),
        (pickle.dumps, "was pickled inside of an offloading context"),
        (torch.jit.script, r"was given to torch\.jit\.script inside"),
        (lambda model: torch.jit.trace(model, torch.randn(1, 4)), r"was traced by torch\.jit inside"),
        (lambda model: torch.compile(model, backend="eager")(torch.randn(1, 4)), r"compiled.*before torch\.compile"),
        (lambda model: model.compile(backend="eager") or model(torch.randn(1, 4)), r"before torch\.compile"),
        (
            lambda model: torch.compile(lambda batch: model(batch) + 1, backend="eager")(torch.randn(1, 4)),
            r"before torch\.compile",
        ),
    ],
    ids=["deepcopy", "deepcopy of a part", "pickle", "script", "trace", "compile", ".compile", "a compiled caller"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TorchScript's and the compiler's
def test_copies_and_compilers_are_refused_inside(mode, take, reason):
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval(), torch.randn(1, 4)
    with torch.no_grad():
        expected = model(batch)
    with offload(model, "cpu", mode=mode):
        with pytest.raises(UserError, match=reason):
            take(model)
        model._compiled_call_impl = None
        assert torch.equal(model(batch), expected)
    assert torch.equal(copy.deepcopy(model)(batch), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_that_is_compiled_inside_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with offload(model, "cpu"):
        model[1].compile(backend="eager")
        with pytest.raises(UserError, match=r"1 is compiled.*before torch\.compile"):
            model(torch.randn(2, 4))
        model[1]._compiled_call_impl = None
        model[1].forward = torch.compile(model[1].forward, backend="eager")
        with pytest.raises(UserError, match=r"1 is compiled.*before torch\.compile"):
            model(torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_torchscript_and_a_compiled_forward_are_refused_before(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    scripted = torch.jit.script(nn.Linear(4, 4).eval())
    traced = torch.jit.trace(nn.Linear(4, 4).eval(), torch.randn(1, 4))
    for one in (scripted, traced, nn.Sequential(nn.Linear(4, 4), scripted).eval()):
        with pytest.raises(UserError, match=r"is TorchScript.*before torch\.jit"), offload(one, "cpu", mode=mode):
            pass
    model[1].forward = torch.compile(model[1].forward, backend="eager")
    with pytest.raises(UserError, match=r"1 is compiled.*before torch\.compile"), offload(model, "cpu", mode=mode):
        pass
