"""k is the experiment, the hardware is not: what a run computes, wherever its workers are."""

import json
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from largebatch.base.errors import UserError
from largebatch.base.numbers import relative_difference
from largebatch.cli import main as cli
from largebatch.data.source import MemorySource, Target
from largebatch.data.stream import SampleStream
from largebatch.models import SmallResNet
from largebatch.records.provenance import Run
from largebatch.records.read import read_metrics, read_summary
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, leave
from largebatch.training import checkpoint
from largebatch.training import loop as train
from largebatch.training.learner import make_learner, open_data
from largebatch.training.loop import fit
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import train_step
from largebatch.training.validation import Validator

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
# 5 iterations an epoch: the rate rises from 0.1 to 0.4 over the first, and falls at the end of the second.
DATA = [
    "dataset=synthetic",
    "dataset.train_images=163",
    "dataset.val_images=40",
    "dataset.classes=10",
    "dataset.channels=1",
    "dataset.height=8",
    "dataset.width=8",
    "dataset.mean=[0.5]",
    "dataset.std=[0.25]",
    "dataset.crop=pad",
    "dataset.pad=1",
    "dataset.flip=true",
]
RUN = [
    *DATA,
    "k=4",
    "n=8",
    "lr.base_minibatch=8",
    "epochs=3",
    "warmup.epochs=1",
    "schedule.milestones=[2]",
    "device=cpu",
    "threads=1",
    "log_every=1",
]
DROPOUT = ["model=torchvision", "model.name=mobilenet_v3_small", "dataset.channels=3", "iterations=2"]
DROPOUT += ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]", "dataset.height=32", "dataset.width=32"]


def fit_all(runs):
    """Train one run after another in one group of processes: a group takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "leave", lambda: None)  # a group that was left cannot be joined again
        summaries = [fit(Run.of(*run)) for run in runs]
    leave()
    return summaries


def threads_after(*run):
    """Train, and return the names of the threads that this process is left with."""
    fit(Run.of(*run))
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_process_group_outlives_the_run(compose, tmp_path):
    """One that runs on while the interpreter is torn down can crash a process whose run is done."""
    config = compose(*RUN, "processes=2", "iterations=1")
    threads = launch(threads_after, (config, place(config, CPU), tmp_path), 2, threads=1)
    assert threads
    assert [name for name in threads if "gloo" in name] == []


def settings(processes: int) -> dict[str, list[str]]:
    """Return the runs, by name, that P processes can make."""
    named = {}
    for per_pass in (1, 2, 4):
        if 4 // processes % per_pass == 0:
            place = [f"processes={processes}", f"workers_per_pass={per_pass}"]
            for running in ("worker0", "mean"):
                named[f"fp64-{running}-{per_pass}"] = [*place, "precision=fp64", f"bn.running={running}"]
            if per_pass == 4:
                named["joint"] = [*place, "precision=fp64", "bn.kernel=joint"]
            named[f"fp32-{per_pass}"] = [*place, "precision=fp32", "iterations=6"]
    one = [f"processes={processes}", "workers_per_pass=1"]
    if processes < 4:
        named["dropout"] = [*one, "precision=fp64", *DROPOUT]
    if processes == 2:
        named["buckets"] = [*one, "precision=fp32", "exchange.bucket_mb=0.05", "exchange.gradient_as_bucket_view=true"]
        named["static"] = [*one, "precision=fp32", "exchange.static_graph=true"]
        named["compressed"] = [*one, "precision=fp32", "exchange.compress=bf16"]
    named["short"] = [*one, "precision=fp32", "iterations=7"]
    named["resumed"] = [*one, "precision=fp32", "resume=true"]
    named["whole"] = [*one, "precision=fp32"]
    return named


@pytest.fixture(scope="module")
def runs(compose, tmp_path_factory):
    """Train every setting on 1, 2 and 4 processes; return their directories by (processes, name)."""
    root = tmp_path_factory.mktemp("runs")
    directories = {}
    for processes in (1, 2, 4):
        calls = []
        for name, overrides in settings(processes).items():
            config = compose(*RUN, *overrides)
            directory = root / f"{processes}-{name.replace('short', 'resumed')}"
            calls.append((config, place(config, CPU), directory))
            directories[processes, name] = directory
        summaries = launch(fit_all, (calls,), processes, threads=1)
        assert {summary["status"] for summary in summaries} == {"done", "stopped"}
    return directories


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    tensors = {name: value.double() for name, value in a.items()}
    of_all = torch.cat([value.flatten() for value in tensors.values()]).norm().item()
    return max(
        relative_difference((value - b[name]).norm().item(), value.norm().item(), of_all)
        for name, value in tensors.items()
    )


PLACES = [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


@pytest.mark.parametrize("running", ["worker0", "mean"])
@pytest.mark.parametrize(("processes", "per_pass"), PLACES)
def test_placement_does_not_change_weights_or_statistics(runs, processes, per_pass, running):
    one, other = runs[1, f"fp64-{running}-1"], runs[processes, f"fp64-{running}-{per_pass}"]
    assert largest_difference(one, other) < 1e-10


def test_batchnorm_of_all_workers_at_once_is_that_of_each(runs):
    assert largest_difference(runs[1, "fp64-worker0-1"], runs[1, "joint"]) < 1e-10


def test_the_two_policies_differ(runs):
    """What the test above would not see if the buffers never moved."""
    worker0, mean = weights(runs[1, "fp64-worker0-1"]), weights(runs[1, "fp64-mean-1"])
    differs = {name for name, value in worker0.items() if not value.equal(mean[name])}
    assert differs == {name for name in worker0 if name.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize(("processes", "per_pass"), PLACES)
def test_in_float32_the_first_loss_agrees_and_rates_are_equal(runs, processes, per_pass):
    one, other = read_metrics(runs[1, "fp32-1"]), read_metrics(runs[processes, f"fp32-{per_pass}"])
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert [line["rate"] for line in other] == [line["rate"] for line in one]


@pytest.mark.parametrize(("processes", "per_pass"), PLACES)
def test_placement_does_not_change_the_record(runs, processes, per_pass):
    one, other = (read_metrics(runs[p, f"fp64-worker0-{g}"]) for p, g in ((1, 1), (processes, per_pass)))
    assert len(one) == len(other) == 15 + 3
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"seconds", "images_per_second"}:
            if key.endswith("loss"):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-9)
            else:
                assert theirs[key] == mine[key], key


def test_the_runs_warm_up_and_decay(runs):
    rates = [line["rate"] for line in read_metrics(runs[1, "whole"], "iteration")]
    rising = [0.1, 0.16, 0.22, 0.28, 0.34]
    assert rates == pytest.approx([*rising, *[0.4] * 5, *[0.04] * 5])


def test_dropout_is_drawn_for_the_worker_wherever_it_runs(runs):
    assert largest_difference(runs[1, "dropout"], runs[2, "dropout"]) < 1e-10


def without_times(directory: Path) -> list[dict]:
    lines = read_metrics(directory)
    return [{key: line[key] for key in line.keys() - {"seconds", "images_per_second"}} for line in lines]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(runs, processes):
    resumed, whole = runs[processes, "resumed"], runs[processes, "whole"]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert without_times(resumed) == without_times(whole)
    assert read_summary(resumed)["status"] == "done"
    assert "resumed from 000000007-" in (resumed / "log.txt").read_text()


def test_placement_may_change_when_a_run_goes_on(compose, runs, tmp_path):
    overrides = [*RUN, "precision=fp64", "workers_per_pass=4", "bn.running=mean"]
    for more in (["iterations=7"], ["resume=true", "workers_per_pass=2"]):
        config = compose(*overrides, *more)
        fit(Run.of(config, place(config, CPU), tmp_path))
    assert largest_difference(runs[1, "fp64-mean-1"], tmp_path) < 1e-10


@pytest.mark.parametrize("name", ["buckets", "static"])
def test_how_gradients_travel_does_not_change_a_bit_between_two_processes(runs, name):
    assert (runs[2, name] / "model.safetensors").read_bytes() == (runs[2, "whole"] / "model.safetensors").read_bytes()


def test_gradients_of_half_the_bytes_are_rounded_and_make_another_experiment(runs):
    plain, rounded = runs[2, "whole"], runs[2, "compressed"]
    losses = [[line["loss"] for line in read_metrics(run, "iteration")[:3]] for run in (plain, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    one, other = (json.loads((run / "provenance.json").read_text())["experiment"] for run in (plain, rounded))
    assert other == {**one, "exchange": {"compress": "bf16"}}


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def command(*overrides: str) -> int:
    return cli.run(["train", *RUN, "precision=fp32", *overrides])


def test_resuming_a_finished_run_changes_nothing(runs, capsys):
    directory = runs[1, "whole"]
    before = snapshot(directory)
    assert command(f"run_dir={directory}", "resume=true") == 0
    assert snapshot(directory) == before
    assert "done already" in capsys.readouterr().err


def test_resuming_another_experiment_is_refused(runs):
    directory = runs[1, "whole"]
    before = snapshot(directory)
    with pytest.raises(UserError, match=r"bn\.momentum: 0\.1 → 0\.2; lr\.base: 0\.1 → 0\.3; seed: 0 → 1\. Use another"):
        command(f"run_dir={directory}", "resume=true", "lr.base=0.3", "bn.momentum=0.2", "seed=1")
    assert snapshot(directory) == before


def test_a_torn_checkpoint_falls_back_to_the_one_before(compose, runs, tmp_path):
    config = compose(*RUN, "precision=fp32", "checkpoint.every=3", "iterations=7")
    fit(Run.of(config, place(config, CPU), tmp_path))
    newest = checkpoint.candidates(tmp_path / "checkpoints")[0]
    assert newest.name.startswith("000000007-")
    newest.write_bytes(newest.read_bytes()[:-1])
    config = compose(*RUN, "precision=fp32", "resume=true")
    fit(Run.of(config, place(config, CPU), tmp_path))
    assert "resumed from 000000006-" in (tmp_path / "log.txt").read_text()
    assert without_times(tmp_path) == without_times(runs[1, "whole"])


@pytest.mark.parametrize("more", [["epochs=1", "schedule.milestones=[]"], ["iterations=5"], ["iterations=3"]])
def test_a_step_that_destroys_the_weights_is_divergence_also_as_the_last_one(tmp_path, capsys, more):
    """One step at an infinite rate: every loss before it was finite, and no loss comes after it."""
    given = {word.partition("=")[0]: word for word in (*RUN, "lr.base=1e-9", "precision=fp32", *more)}
    words = ["train", *given.values(), f"run_dir={tmp_path}", "warmup=none"]
    steps = 3 if "iterations=3" in more else 5
    with pytest.MonkeyPatch.context() as patch:
        usual = train.set_rate

        def explode(optimizer, rate):
            explode.step += 1
            usual(optimizer, math.inf if explode.step == steps else rate)

        explode.step = 0
        patch.setattr(train, "set_rate", explode)
        assert cli.run(words) == 3
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["iterations"], summary["nonfinite"]) == ("diverged", steps, 0)
    assert not list(tmp_path.glob("checkpoints/best*"))
    epochs = read_metrics(tmp_path, "epoch")
    assert [(line["val_error"], line["val_loss"]) for line in epochs] == ([] if steps == 3 else [(100.0, None)])
    capsys.readouterr()
    assert cli.run(["table", f"runs={tmp_path}", "baseline=none", "format=json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["seeds"], row["diverged"], row["error_mean"]) == (0, 1, None)
    assert cli.run(["table", f"runs={tmp_path}", "baseline=none"]) == 0
    assert "0 of 1: 1 diverged" in capsys.readouterr().out


def test_a_diverged_run_is_a_result(tmp_path):
    overrides = [f"run_dir={tmp_path}", "lr.base=1e6"]
    assert command(*overrides) == 3
    summary = read_summary(tmp_path)
    assert summary["status"] == "diverged"
    assert summary["nonfinite"] > 0
    assert summary["iterations"] < 15
    assert read_metrics(tmp_path)[-1]["loss"] is None
    before = snapshot(tmp_path)
    assert command(*overrides, "resume=true") == 3
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_go_on_with_the_same_bits(compose, tmp_path, name):
    for directory, more in (("whole", []), ("resumed", ["iterations=7"]), ("resumed", ["resume=true"])):
        config = compose(*RUN, f"optimizer={name}", *more)
        fit(Run.of(config, place(config, CPU), tmp_path / directory))
    assert without_times(tmp_path / "resumed") == without_times(tmp_path / "whole")
    assert weights(tmp_path / "whole").keys() == weights(tmp_path / "resumed").keys()
    assert largest_difference(tmp_path / "whole", tmp_path / "resumed") == 0


def test_recomputed_statistics_are_recorded_and_change_nothing(compose, runs, tmp_path):
    config = compose(*RUN, "precision=fp32", "bn.recompute=true", "bn.recompute_batches=3")
    fit(Run.of(config, place(config, CPU), tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == (runs[1, "whole"] / "model.safetensors").read_bytes()
    lines = read_metrics(tmp_path, "epoch")
    assert all(0 <= line["val_error_recomputed"] <= 100 for line in lines)
    assert [line["val_error"] for line in lines] == [
        line["val_error"] for line in read_metrics(runs[1, "whole"], "epoch")
    ]


def test_the_summary_has_both_error_protocols(runs):
    errors = [line["val_error"] for line in read_metrics(runs[1, "whole"], "epoch")]
    summary = read_summary(runs[1, "whole"])
    assert summary["final_error"] == sorted(errors)[1]  # the median of three epochs
    assert (summary["last_error"], summary["best_error"]) == (errors[-1], min(errors))
    assert (summary["iterations"], summary["scheduled_iterations"], summary["minibatch"]) == (15, 15, 32)


def test_a_run_is_plain_pytorch(compose, runs):
    """Three steps of the paper's equation, written out: no DDP, no groups, no stream of ours but its indices."""
    config = compose(*RUN, "precision=fp64")
    source = MemorySource(config.dataset, config.seed, Target(torch.device("cpu"), torch.float64))
    order = SampleStream(163, 4, 8, seed=0).order(0)
    learner = make_learner(config, place(config, CPU), ALONE, classes=10)
    model = SmallResNet(8, classes=10, channels=1).double()
    model.load_state_dict(learner.model.state_dict())
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    others = [p for p in model.parameters() if p not in norms]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": list(norms)}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for iteration, rate in enumerate([0.1, 0.16, 0.22]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        minibatch = order[iteration * 32 : (iteration + 1) * 32]
        loss = 0
        for batch in source.train([(0, part) for part in minibatch.split(8)]):  # a worker each
            loss = loss + F.cross_entropy(model(batch.images), batch.labels, reduction="sum") / 32
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    recorded = [line["loss"] for line in read_metrics(runs[1, "fp64-worker0-1"])[:3]]
    assert losses == pytest.approx(recorded, rel=1e-10)


def batches_for(config, per_pass):
    source = MemorySource(config.dataset, config.seed, Target(torch.device("cpu"), torch.float32))
    stream = SampleStream(source.train_images, config.k, config.n, config.seed)
    return source.train(stream.passes(0, 1, 0, config.k, per_pass))


def saved_bytes_at_most(config) -> int:
    """Return the most bytes that autograd holds at once during a step."""
    placement = place(config, CPU)
    learner = make_learner(config, placement, ALONE, classes=10)
    held = most = 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def let_go(size):
        nonlocal held
        held -= size

    def pack(tensor):
        nonlocal held, most
        kept = Kept(tensor.detach())
        weakref.finalize(kept, let_go, tensor.nbytes)
        held += tensor.nbytes
        most = max(most, held)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        train_step(learner, batches_for(config, placement.workers_per_pass), 0)
    return most


def test_memory_grows_with_workers_per_pass_and_not_with_k(compose):
    few, many = (compose(*DATA, f"k={k}", "n=2", "workers_per_pass=2", "device=cpu") for k in (8, 64))
    assert saved_bytes_at_most(few) == saved_bytes_at_most(many) > 0
    wider = compose(*DATA, "k=8", "n=2", "workers_per_pass=4", "device=cpu")
    assert saved_bytes_at_most(wider) > saved_bytes_at_most(few)


def test_nothing_is_left_to_do_when_iterations_is_lowered(compose, tmp_path):
    one = [*RUN, "processes=1", "precision=fp32"]
    for words, status in ((["iterations=7"], "stopped"), (["iterations=5", "resume=true"], "stopped")):
        config = compose(*one, *words)
        assert fit(Run.of(config, place(config, CPU), tmp_path / "run"))["status"] == status


def test_torn_checkpoints_do_not_crowd_out_the_new_ones(compose, tmp_path, capsys):
    one = [*RUN, "processes=1", "precision=fp32", "checkpoint.every=2"]
    short = compose(*one, "iterations=6")
    fit(Run.of(short, place(short, CPU), tmp_path / "run"))
    kept = checkpoint.candidates(tmp_path / "run" / "checkpoints")
    assert [path.name.rpartition("-")[0] for path in kept] == ["000000006", "best-000000005", "000000004"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    resumed = compose(*one, "iterations=4", "resume=true")
    fit(Run.of(resumed, place(resumed, CPU), tmp_path / "run"))
    assert "does not verify" in capsys.readouterr().err
    kept = checkpoint.candidates(tmp_path / "run" / "checkpoints")
    assert [path.name.rpartition("-")[0] for path in kept] == ["000000004", "000000002"]


def test_lines_of_a_resumed_run_cover_the_iterations_before_it(compose, tmp_path):
    one = [*RUN[:-1], "log_every=5", "processes=1", "precision=fp32"]
    for name, calls in (("whole", [[]]), ("resumed", [["iterations=7"], ["resume=true"]])):
        for words in calls:
            config = compose(*one, *words)
            fit(Run.of(config, place(config, CPU), tmp_path / name))
    whole, resumed = (read_metrics(tmp_path / name, "iteration") for name in ("whole", "resumed"))
    assert resumed == whole


def test_a_run_whose_data_have_changed_is_not_resumed(compose, tmp_path):
    one = [*RUN, "processes=1", "precision=fp32"]
    config = compose(*one, "iterations=7")
    fit(Run.of(config, place(config, CPU), tmp_path / "run"))
    more = compose(*one, "resume=true", "dataset.val_images=41")
    with pytest.raises(UserError, match=r"was trained on \[163, 40\]"):
        fit(Run.of(more, place(more, CPU), tmp_path / "run"))


def test_recomputed_statistics_are_not_compiled_batch_by_batch(compose, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", calls.append)
    )
    calls = []
    config = compose(*RUN, "processes=1", "compile=true", "bn.recompute=true")
    world = World(0, 1, torch.device("cpu"))
    learner = make_learner(config, place(config, CPU), world, 10)
    Validator(learner, open_data(config, place(config, CPU), world))._forward(torch.zeros(8, 1, 8, 8))
    assert calls == []


def test_a_network_without_batchnorm_takes_either_policy(compose):
    config = compose(
        *RUN,
        "processes=1",
        "bn.running=mean",
        "model=timm",
        "model.name=convnext_atto",
        "dataset.height=32",
        "dataset.width=32",
    )
    placement = place(config, CPU)
    learner = make_learner(config, placement, ALONE, 10)
    source = open_data(config, placement, ALONE)
    batches = source.train(sample_stream(config, 163).passes(0, 1, 0, 4, 1))
    set_rate(learner.optimizer, 0.1)
    assert train_step(learner, batches, 0)[:, 2].eq(0).all()


def test_fewer_processes_than_were_placed_do_not_train(compose, tmp_path):
    config = compose(*RUN, "processes=2")
    with pytest.raises(AssertionError, match="2 processes were placed, 1 have joined"):
        fit(Run.of(config, place(config, CPU), tmp_path / "run"))
