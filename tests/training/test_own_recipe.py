"""loss=python, optimizer=python, optimizer=adamw, optimizer.clip_norm and dataset.transform."""

import json
import math
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from largebatch.base import user_code
from largebatch.base.errors import UserError
from largebatch.cli.main import run
from largebatch.config.groups import LoaderConfig, LossConfig
from largebatch.data.augment import Transform
from largebatch.data.source import Target, open_source
from largebatch.training import checkpoint
from largebatch.training.loss import make_loss, validation_loss
from largebatch.training.optimizer import clip, make_optimizer, parameter_groups, set_rate

RECIPE = '''
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

COLOURS = v2.Compose([v2.RandomRotation(30), v2.RandomInvert(0.5)])
RANDAUGMENT = rand_augment_transform("rand-m9-n2", {})


def focal(outputs, labels):
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


def mean(outputs, labels):
    return F.cross_entropy(outputs, labels)


def colours(image, generator):
    return COLOURS(image)


def randaugment(image, generator):
    return RANDAUGMENT(image)


def shift(image, generator):
    return image.rotate(90 * int(torch.randint(4, (1,), generator=generator)))


def smaller(image, generator):
    return image.resize((3, 3))


class Counting(torch.optim.SGD):
    """SGD whose rate falls with a count that lies in the groups."""

    def __init__(self, groups, lr, weight_decay=0.0, slow=1.0):
        super().__init__(groups, lr=lr, weight_decay=weight_decay, momentum=0.5)
        for group in self.param_groups:
            group.update(count=0, slow=slow)

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            group["lr"] /= 1 + group["slow"] * group["count"]
        super().step()


class Nested(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [1, 2]


def nothing(groups, lr):
    return None
'''
WORDS = ("k=2", "n=8", "device=cpu", "threads=1")


@pytest.fixture
def recipe(own_code, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    return own_code(recipe=RECIPE)


def stepped(optimizer, model, steps=3, rate=0.1):
    for step in range(steps):
        set_rate(optimizer, rate)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.3 + step - number)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def line():
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def test_adamw_by_hand(compose):
    config, model = (
        compose("optimizer=adamw", "optimizer.weight_decay=0.1", "optimizer.kwargs={eps: 1e-6}").optimizer,
        line(),
    )
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    found = stepped(make_optimizer(parameter_groups(model, config.weight_decay), config), model)
    for number, (w, after) in enumerate(zip(weights, found, strict=True)):
        m = v = torch.zeros_like(w)
        for step in range(3):
            g = 0.3 + step - number
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w * (1 - 0.1 * 0.1)
            w = w - 0.1 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
        torch.testing.assert_close(after, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("norm", "factor"), [(1.0, 1 / math.sqrt(2 * 0.9 + 0.01)), (100.0, 1.0)])
def test_a_gradient_is_scaled_down_to_the_norm(compose, norm, factor):
    config, model = compose("optimizer.momentum=0", "optimizer.nesterov=false").optimizer, line()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(parameter_groups(model, 0.0), config)
    clip(optimizer, norm)
    set_rate(optimizer, 1.0)
    weight, bias = model.weight, model.bias
    weight.grad, bias.grad = torch.full_like(weight, math.sqrt(0.9)), torch.full_like(bias, 0.1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before[0] - factor * math.sqrt(0.9), rtol=0, atol=1e-6)
    torch.testing.assert_close(bias.detach(), before[1] - factor * 0.1, rtol=0, atol=1e-6)


def test_an_optimizer_of_her_own_goes_on_to_the_bit(recipe, compose, tmp_path):
    config = compose("optimizer=python", "optimizer.name='recipe:Counting'", "optimizer.kwargs={slow: 0.5}").optimizer
    whole, model = line(), line()
    expected = stepped(make_optimizer(parameter_groups(whole, 0.1), config), whole, steps=6)
    optimizer = make_optimizer(parameter_groups(model, 0.1), config)
    stepped(optimizer, model)
    tensors, state = checkpoint.pack(model, optimizer)
    path = checkpoint.write(tmp_path, checkpoint.Snapshot(tensors, {"iteration": 3, "optimizer": state}), keep=1)
    resumed = line()
    again = make_optimizer(parameter_groups(resumed, 0.1), config)
    checkpoint.unpack(checkpoint.read(path), resumed, again)
    assert again.param_groups[0]["count"] == 3
    for step in range(3, 6):
        set_rate(again, 0.1)
        for number, parameter in enumerate(resumed.parameters()):
            parameter.grad = torch.full_like(parameter, 0.3 + step - number)
        again.step()
    assert all(one.equal(other) for one, other in zip(resumed.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("null", "optimizer.name is missing"),
        (
            "recipe:nothing",
            r"returned a NoneType: it is called with \(groups of parameters, lr=0.0\), and has to return a t",
        ),
        (
            "recipe:Counting",
            r"unexpected keyword argument 'fast'.* It is called with \(groups of parameters, lr=0.0, fast=1\)",
        ),
    ],
)
def test_what_is_no_optimizer_is_refused(recipe, compose, name, said):
    more = ["optimizer.kwargs={fast: 1}"] * (name == "recipe:Counting")
    config = compose("optimizer=python", f"optimizer.name='{name}'", *more).optimizer
    with pytest.raises(UserError, match=said):
        make_optimizer(parameter_groups(line(), 0.0), config)


def test_a_state_that_no_checkpoint_holds_is_refused(recipe, compose):
    config, model = compose("optimizer=python", "optimizer.name='recipe:Nested'").optimizer, line()
    optimizer = make_optimizer(parameter_groups(model, 0.0), config)
    stepped(optimizer, model)
    with pytest.raises(UserError, match="Nested keeps a list as 'history' of a parameter's state"):
        checkpoint.pack(model, optimizer)


def test_a_loss_is_one_value_a_sample(recipe):
    outputs, labels = torch.randn(5, 3), torch.arange(5) % 3
    focal = make_loss(LossConfig("recipe:focal", 0.0))(outputs, labels)
    plain = F.cross_entropy(outputs, labels, reduction="none")
    torch.testing.assert_close(focal, (1 - (-plain).exp()).square() * plain)
    smooth = make_loss(LossConfig("cross_entropy", 0.1))(outputs, labels)
    torch.testing.assert_close(smooth, 0.9 * plain - 0.1 * outputs.log_softmax(1).mean(1))
    assert validation_loss(LossConfig("cross_entropy", 0.1)) is None
    with pytest.raises(
        UserError, match=r"recipe:mean returned a Tensor of shape \(\): it is called with \(outputs, labels\)"
    ):
        make_loss(LossConfig("recipe:mean", 0.0))(outputs, labels)
    with pytest.raises(UserError, match="label_smoothing is the cross-entropy's"):
        LossConfig("recipe:focal", 0.1)


def test_certify_holds_with_a_loss_of_her_own_and_clipping(recipe, capsys):
    words = ["loss=python", "loss.name=recipe:focal", "optimizer.clip_norm=0.5", "precision=fp64"]
    assert (
        run(["certify", *WORDS, *words, "certify.processes=[1]", "certify.iterations=3", "run_dir=c", "format=json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["holds"]


def test_validation_measures_with_her_loss(recipe, capsys):
    train = ["train", *WORDS, "loss=python", "loss.name=recipe:focal", "epochs=1", "run_dir=run"]
    assert run(train) == 0
    epoch = json.loads((recipe / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert run(["eval", "run=run", "device=cpu", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"][0]["loss"] == epoch["val_loss"]
    assert 0 < epoch["val_loss"] < 2.3


@pytest.mark.parametrize(
    ("words", "scaling", "why"),
    [
        (
            ("optimizer=adamw",),
            "sqrt",
            "lr.scaling=sqrt: adamw divides a gradient by its own size, so that the rate grows",
        ),
        (("optimizer=lamb", "lr.scaling=linear"), "linear", "lr.scaling=linear: lamb divides"),
        (
            ("optimizer=python", "optimizer.name='recipe:Counting'"),
            "sqrt",
            "an optimizer of your own is taken for one that",
        ),
        (("optimizer=sgd",), "linear", ""),
    ],
)
def test_explain_says_how_the_rate_scales_and_why(recipe, capsys, words, scaling, why):
    assert run(["explain", *WORDS, *words, "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    notes = [note for note in facts["notes"] if "lr.scaling" in note]
    assert facts["scaling"] == scaling
    assert [why in note for note in notes] == [True] * bool(why)


def test_what_was_not_given_is_no_part_of_the_experiment(compose):
    found = compose().experiment("fp32")
    assert "loss" not in found
    assert not {"kwargs", "clip_norm"} & found["optimizer"].keys()
    hashes = {
        compose(*words).experiment_hash("fp32")
        for words in ((), ("loss.label_smoothing=0.1",), ("optimizer.clip_norm=1",))
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("name", ["colours", "randaugment", "shift"])
def test_a_transform_is_decided_by_seed_epoch_and_index(recipe, name):
    pixels = torch.arange(192).to(torch.uint8).view(3, 8, 8)
    transform = Transform(f"recipe:{name}")
    found = [transform(pixels, 0, 0, index) for index in range(12)]
    assert all(one.shape == pixels.shape for one in found)
    assert len({one.numpy().tobytes() for one in found}) > 2
    torch.manual_seed(5)
    assert all(transform(pixels, 0, 0, index).equal(found[index]) for index in (11, 3))


def test_training_images_alone_are_transformed(recipe, compose):
    def opened(*words):
        data = compose("dataset.crop=none", *words).dataset
        loader = LoaderConfig(workers=0, prefetch=None)
        return open_source(data, loader, 0, Target(torch.device("cpu"), torch.float32), cores=1)

    plain, changed = opened(), opened("dataset.transform='recipe:shift'")
    indices = torch.arange(6)
    one, other = (next(iter(source.train([(0, indices)]))).images for source in (plain, changed))
    turned = [
        any(image.rot90(turn, (1, 2)).equal(after) for turn in range(4))
        for image, after in zip(one, other, strict=True)
    ]
    assert all(turned)
    assert not one.equal(other)
    assert next(plain.validation([range(4)])).images.equal(next(changed.validation([range(4)])).images)
    again = next(iter(changed.train([(0, indices[3:4])]))).images
    assert again.equal(other[3:4])


def test_a_transform_that_returns_no_such_image_is_refused(recipe):
    with pytest.raises(
        UserError, match=r"recipe:smaller returned RGB of \(3, 3\) for RGB of \(8, 8\): it is called with"
    ):
        Transform("recipe:smaller")(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, 0, 0)
    with pytest.raises(
        UserError, match=r"it takes images, uint8 \(1 or 3, H, W\), and these are torch.float32 of shape \(6,\)"
    ):
        Transform("recipe:shift")(torch.zeros(6), 0, 0, 0)


def test_explain_lists_the_plug_ins_that_are_installed(monkeypatch, capsys):
    entry = metadata.EntryPoint("shapes", "shapes:make", user_code.DATASETS)
    monkeypatch.setattr(user_code.metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    assert run(["explain", *WORDS]) == 0
    assert "dataset plug-ins  shapes\n" in capsys.readouterr().out
