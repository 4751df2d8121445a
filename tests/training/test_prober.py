"""A run that is probed is the same run, on any number of processes, and its record says what was measured."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call

from largebatch.base.errors import UserError
from largebatch.data.stream import SampleStream
from largebatch.records.provenance import Run
from largebatch.records.read import read_metrics, read_probes
from largebatch.records.write import add_probe
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, leave
from largebatch.training import loop as train
from largebatch.training.drift import hessian_product, sharpness
from largebatch.training.learner import make_learner, open_data
from largebatch.training.loop import fit
from largebatch.training.prober import Prober

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
RUN = [
    *("dataset=synthetic_small", "dataset.height=8", "dataset.width=8", "dataset.train_images=131"),
    *("dataset.val_images=20", "k=4", "n=8", "lr.base_minibatch=8", "epochs=3", "warmup.epochs=1"),
    *("schedule.milestones=[2]", "device=cpu", "threads=1", "precision=fp64"),
]
PROBE = ["probe.every=2", "probe.batches=2", "probe.products=3"]
DROPOUT = ["model=torchvision", "model.name=mobilenet_v3_small", "dataset.height=32", "dataset.width=32", "epochs=1"]
PROBED = {
    1: {
        "one": [],
        "two a pass": ["workers_per_pass=2"],
        "dropout": [*DROPOUT, "schedule.milestones=[]", "precision=fp32"],
    },
    2: {"averaged": ["processes=2"], "exact": ["processes=2", "exact=true", "bn.running=mean"]},
}


def fit_all(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "leave", lambda: None)  # a group that was left cannot be joined again
        for run in runs:
            fit(Run.of(*run))
    leave()


@pytest.fixture(scope="module")
def runs(compose, tmp_path_factory) -> Path:
    """Train each of PROBED with and without probes; return the directory, with ``<name>`` and ``<name>, probed``."""
    root = tmp_path_factory.mktemp("probed")
    for processes, settings in PROBED.items():
        calls = []
        for name, words in settings.items():
            for suffix, probe in (("", []), (", probed", PROBE)):
                config = compose(*RUN, *words, *probe)
                calls.append((config, place(config, CPU), root / f"{name}{suffix}"))
        launch(fit_all, (calls,), processes, threads=1)
    return root


@pytest.mark.parametrize("name", [name for settings in PROBED.values() for name in settings])
def test_probing_changes_no_bit_of_a_run(runs, name):
    one, other = (runs / name, runs / f"{name}, probed")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    timed = ("seconds", "images_per_second")
    plain, probed = (
        [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(directory)]
        for directory in (one, other)
    )
    assert plain == probed
    assert read_probes(one) == []
    assert read_probes(other)


def test_a_network_that_cannot_be_differentiated_twice_has_no_sharpness(runs):
    """Hard sigmoids: torch has no second derivative of them."""
    (line,) = read_probes(runs / "dropout, probed")
    assert (line["sharpness"], line["rate_times_sharpness"]) == (None, None)
    assert len(line["end_point"]) == 4


def test_lines_are_made_at_the_start_and_when_they_are_due(runs):
    lines = read_probes(runs / "one, probed")
    assert [(line["iteration"], line["epoch"]) for line in lines] == [(0, 0.0), (8, 2.0)]
    start, later = lines
    assert [len(start[name]) for name in ("cosine", "distance", "end_point")] == [3, 3, 4]
    assert (start["rate"], start["small_rate"]) == (0.1, 0.025)  # warmup begins at η
    assert later["rate"] == pytest.approx(0.04)  # after the milestone
    assert later["rate_times_sharpness"] == pytest.approx(0.04 * later["sharpness"])
    assert later["stability_bound"] == pytest.approx(3.8 / 2.8)
    assert start["bn_mean_moved"] is None
    assert later["bn_mean_moved"] > 0
    assert later["bn_variance_moved"] > 0


@pytest.mark.parametrize("name", ["two a pass", "averaged", "exact"])
def test_what_is_measured_does_not_depend_on_where_the_workers_are(runs, name):
    for one, other in zip(read_probes(runs / "one, probed"), read_probes(runs / f"{name}, probed"), strict=True):
        skipped = {"seconds"} | ({"bn_mean_moved", "bn_variance_moved"} if name == "exact" else set())
        for key in one.keys() - skipped:
            assert other[key] == (None if one[key] is None else pytest.approx(one[key], rel=1e-6)), key


@pytest.fixture
def standing(compose):
    """Return a prober of a run that has not begun, with its learner, data and configuration."""

    def make(*words):
        config = compose(*RUN, *words)
        placement = place(config, CPU)
        source = open_data(config, placement, ALONE)
        learner = make_learner(config, placement, ALONE, source.classes)
        return Prober(learner, source), learner, source, config

    return make


def test_the_line_is_that_of_the_run_s_own_next_steps(standing):
    """The same minibatches, network and update, written out by hand with the optimizer of PyTorch."""
    prober, learner, source, config = standing("probe.batches=2", "probe.products=40", "probe.layers=true")
    line = prober.measure(0)
    stream = SampleStream(source.train_images, 4, 8, config.seed)
    batches = list(source.train((0, stream.samples(0, worker, 1)) for worker in range(4)))
    model, fixed, moving = learner.model, [], []
    for norm in model.modules():
        norm.track_running_stats = False  # as workers other than 0 are
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.1 / 4

    def slope(batch):
        found = torch.autograd.grad(F.cross_entropy(model(batch.images), batch.labels), list(model.parameters()))
        return torch.cat([part.flatten() for part in found]), found

    for batch in batches:
        moving.append(slope(batch)[0])
        here = {name: value.detach().clone() for name, value in model.named_parameters()}
        for name, value in model.named_parameters():
            value.data.copy_(start[name])
        fixed.append(slope(batch)[0])
        for name, value in model.named_parameters():
            value.data.copy_(here[name])
        for value, part in zip(model.parameters(), slope(batch)[1], strict=True):
            value.grad = part
        learner.optimizer.step()
    apart = torch.stack(fixed).sum(0) - torch.stack(moving).sum(0)
    assert line["end_point"][-1] == pytest.approx(float(apart.norm() / torch.stack(moving).sum(0).norm()), rel=1e-8)
    assert line["cosine"][-1] == pytest.approx(float(F.cosine_similarity(fixed[3], moving[3], dim=0)), rel=1e-8)
    mean, squares = torch.stack(fixed).mean(0).square().sum(), torch.stack(fixed).square().sum(1).mean()
    assert line["gradient_squared"] == pytest.approx(float((4 * mean - squares) / 3), rel=1e-6)
    assert line["noise_trace"] == pytest.approx(float(8 * 4 * (squares - mean) / 3), rel=1e-8)
    assert {name for name, _ in model.named_modules()} >= line["layers"].keys()
    by_layer = sum(figures["noise_trace"] for figures in line["layers"].values())
    assert by_layer == pytest.approx(line["noise_trace"], rel=1e-8)
    product = hessian_product(
        lambda w, batch: F.cross_entropy(functional_call(model, w, (batch.images,)), batch.labels),
        start,
        lambda: batches[:2],
    )
    vector = torch.randn(sum(value.numel() for value in start.values()), dtype=torch.float64)
    assert line["sharpness"] == pytest.approx(sharpness(product, vector, 80, 0.01).value, rel=0.05)


@pytest.mark.parametrize(
    ("epochs", "every"),
    [(16, None), (17, 18), (32, 33), (33, 17), (680, 17)],  # a probe takes 13 gradients, an epoch 16
)
def test_probes_by_cost_take_their_share_at_most(standing, epochs, every):
    prober, *_ = standing("probe.every=auto", "probe.batches=1", "probe.products=3", f"epochs={epochs}")
    assert prober.every == every
    if every:
        assert (epochs // every + 1) * 13 <= 0.05 * 16 * epochs


def test_a_network_that_is_not_trained_has_no_gradient(standing):
    _, learner, source, _ = standing()
    learner.model.requires_grad_(False)
    with pytest.raises(UserError, match=r"model\.name=resnet8 has no parameter that is trained"):
        Prober(learner, source)


def test_a_run_that_goes_on_keeps_the_lines_up_to_there(compose, tmp_path):
    words = [*RUN, "probe.batches=1", "probe.products=1", "probe.every=1"]
    stopped, goes_on = compose(*words, "iterations=6"), compose(*words, "resume=true")
    fit(Run.of(stopped, place(stopped, CPU), tmp_path / "run"))
    assert [line["iteration"] for line in read_probes(tmp_path / "run")] == [0, 4]
    add_probe(tmp_path / "run", {"iteration": 8, "left": "by a start that was killed later"})
    with (tmp_path / "run" / "probes.jsonl").open("a") as file:
        file.write('{"iteration": 9, "cut')
    fit(Run.of(goes_on, place(goes_on, CPU), tmp_path / "run"))
    lines = read_probes(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 4, 8, 12]
    assert all("end_point" in line for line in lines)
    json.loads((tmp_path / "run" / "summary.json").read_text())
    assert load_file(tmp_path / "run" / "model.safetensors")


def test_probes_that_never_come_are_said_before_the_run(compose, tmp_path, capfd):
    config = compose(*RUN, "probe.every=auto", "epochs=1", "schedule.milestones=[]", "iterations=1")
    fit(Run.of(config, place(config, CPU), tmp_path / "run"))
    assert "probe.every=auto: never: one would take more than 5 % of this run" in capfd.readouterr().err
    assert read_probes(tmp_path / "run") == []
