"""model=python: a network of the user's own, and arguments for those of libraries."""

import re
from importlib import metadata

import pytest
import torch

from largebatch.base import user_code
from largebatch.base.errors import UserError
from largebatch.models.build import build_model, check_shapes, draws_numbers

NETS = """
from torch import nn
from torch.nn import functional as F

import layers


class Net(nn.Module):
    def __init__(self, classes, channels, width=4, drop=0.0):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, width, 3), nn.Linear(width, classes)
        self.drop = drop

    def forward(self, images):
        return self.head(F.dropout(layers.pool(self.conv(images)), self.drop, self.training))


def make(classes, channels, **kwargs):
    return Net(classes, channels, **kwargs)


def word(classes, channels):
    return "a network"


def narrow(classes, channels):
    return Net(classes - 1, channels)


NOT_CALLABLE = 3
"""
LAYERS = """
def pool(maps):
    if maps.shape[-1] < 3:
        raise IndexError("the map is too small")
    return maps.mean((2, 3))
"""


@pytest.fixture
def model(own_code, compose):
    own_code(nets=NETS, layers=LAYERS)

    def configured(name="nets:make", *words):
        return compose("model=python", f"model.name='{name}'", *words).model

    return configured


def test_a_callable_of_the_working_directory_makes_the_network_with_its_arguments(model):
    found = build_model(model("nets:make", "model.kwargs={width: 7}"), 10, 3)
    assert found.conv.weight.shape == (7, 3, 3, 3)
    assert found.head.weight.shape == (10, 7)
    check_shapes(model(), 10, (2, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("null", r"model.name is missing: it takes module:callable, such as model.name=my_package.mine:make, or the "),
        ("nets", "model.name=nets is not known: it takes module:callable"),
        ("nest:make", "there is no module nest in this directory .* nor among the installed packages"),
        ("nets:mkae", r"nets.py has no 'mkae'\. Did you mean 'make'\?"),
        ("nets:NOT_CALLABLE", "is not callable, but of type int"),
        ("nets:word", r"returned str: it is called with \(classes=10, channels=3\), and has to return an nn.Module"),
    ],
)
def test_a_name_that_makes_no_network_is_refused(model, name, words):
    with pytest.raises(UserError, match=words):
        build_model(model(name), 10, 3)


def test_an_exception_is_one_sentence_and_the_frames_of_her_own_code(model):
    with pytest.raises(UserError) as caught:
        build_model(model("nets:make", "model.kwargs={wdth: 7}"), 10, 3)
    sentence, *trace = str(caught.value).splitlines()
    assert sentence == (
        "model.name=nets:make: TypeError: Net.__init__() got an unexpected keyword argument 'wdth'. It is called with "
        "(classes=10, channels=3, wdth=7), and has to return an nn.Module."
    )
    assert re.search(r'/nets.py", line \d+, in make$', trace[0])
    assert not re.search("largebatch/|torch/", "\n".join(trace))


def test_an_exception_of_a_forward_pass_names_what_the_network_was_given(model):
    with pytest.raises(UserError) as caught:
        check_shapes(model(), 10, (8, 3, 4, 4))
    sentence, *trace = str(caught.value).splitlines()
    assert sentence == (
        "model.name=nets:make: IndexError: the map is too small. The network was called with a torch.float32 tensor of "
        "shape (2, 3, 4, 4)."
    )
    assert [line.split('"')[1].rpartition("/")[2] for line in trace if "File" in line] == ["nets.py", "layers.py"]


def test_an_output_of_another_width_is_refused(model):
    words = r"shape \(n, classes\) = \(2, 10\) in training mode, but Tensor of shape \(2, 9\)"
    with pytest.raises(UserError, match=words):
        check_shapes(model("nets:narrow"), 10, (8, 3, 8, 8))


@pytest.mark.parametrize(
    ("text", "words", "frames"),
    [
        ("import not_there", "No module named 'not_there'", 1),
        ("1 / 0", "ZeroDivisionError", 1),
        ("def make(", "SyntaxError", 2),
    ],
)
def test_a_module_that_cannot_be_imported_shows_where(own_code, text, words, frames):
    own_code(broken=text)
    with pytest.raises(UserError, match=words) as caught:
        user_code.load("model.name", "broken:make")
    assert str(caught.value).startswith("model.name=broken:make cannot be imported: ")
    assert str(caught.value).count("broken.py") == frames


def test_random_numbers_are_found_wherever_they_are_drawn(model):
    image = torch.empty(3, 8, 8, device="meta")
    for drop in (0.0, 0.5):
        network = build_model(model("nets:make", f"model.kwargs={{drop: {drop}}}"), 10, 3)
        assert draws_numbers(network, image) == bool(drop)


def test_an_installed_plug_in_has_a_name_of_its_own(own_code, compose, monkeypatch):
    own_code(nets=NETS, layers=LAYERS)
    entry = metadata.EntryPoint("narrow", "nets:narrow", user_code.MODELS)
    monkeypatch.setattr(user_code.metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    assert build_model(compose("model=python", "model.name=narrow").model, 10, 3).head.out_features == 9
    with pytest.raises(UserError, match=r"or the name of a plug-in \(narrow\)"):
        build_model(compose("model=python", "model.name=nrrow").model, 10, 3)


def test_the_digests_are_of_all_her_files_that_are_imported(model):
    assert user_code.digests({"model.name": "nets:make"}) == {}
    build_model(model(), 10, 3)
    found = user_code.digests({"model.name": "nets:make"})["model.name"]
    assert found["name"] == "nets:make"
    assert found["file"].endswith("/nets.py")
    assert {name: len(digest) for name, digest in found["sha256"].items()} == {"layers.py": 16, "nets.py": 16}


def test_timms_networks_take_arguments(compose):
    vit = compose("model=timm", "model.name=vit_tiny_patch16_224", "model.kwargs={img_size: 32, patch_size: 8}").model
    check_shapes(vit, 10, (2, 3, 32, 32))
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 does not take model.kwargs=\{'image': 32\}"):
        build_model(compose("model=timm", "model.name=vit_tiny_patch16_224", "model.kwargs={image: 32}").model, 10, 3)
    with pytest.raises(UserError, match=r"our small networks take no model\.kwargs"):
        build_model(compose("model.kwargs={width: 2}").model, 10, 1)


def test_name_and_arguments_are_part_of_the_experiment(compose):
    words = ("model=python", "model.name='nets:make'")
    hashes = {
        compose(*words, *more).experiment_hash("fp32")
        for more in ((), ("model.kwargs={a: 1}",), ("model.kwargs={a: 2}",))
    }
    assert len(hashes) == 3
    assert "kwargs" not in compose(*words).experiment("fp32")["model"]
    assert compose().user_code == {}
    for wrong, said in (("{a b: 1}", "is not the name of an argument"), ("3", "it takes a mapping such as")):
        with pytest.raises(UserError, match=said):
            compose(*words, f"model.kwargs={wrong}")
