import json
import shutil

import pytest
import torch
import torchvision
from images import make_tree, spoil
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

from largebatch.models.resnet import SmallResNet
from largebatch.records.provenance import Run
from largebatch.records.read import read_metrics
from largebatch.runtime.placement import Hardware, place
from largebatch.training.loop import fit

CPU = Hardware(cores=1, gpus=0, mps=False, bf16=False)


def recorded(run):
    """Return what a run recorded of its last validation."""
    return read_metrics(run, "epoch")[-1]


def kept(run):
    """Return the evaluations in a run's record."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "mode",
    [
        ("offload=none",),
        ("offload=model",),
        ("offload=submodule",),
        ("offload=submodule", "groups=leaf", "prefetch=false"),
        ("offload=submodule", "groups=blocks", "compare=true"),
    ],
    ids=" ".join,
)
def test_every_mode_says_what_the_record_says(runs, facts, mode):
    found = facts(f"run={runs}/seed0", *mode)
    (member,) = found["members"]
    before = recorded(runs / "seed0")
    assert member["error"] == before["val_error"] < 85  # it has learned something that can be lost
    assert member["error_top5"] == before["val_error_top5"]
    assert member["loss"] == before["val_loss"]
    assert member["recorded"] == {key: member[key] for key in ("error", "error_top5", "loss")}
    assert (member["iteration"], found["images"], found["notes"]) == (44, 360, [])
    assert found["bytes_from_device"] == 0
    assert (found["compared"] or {"equal": None})["equal"] == (True if "compare=true" in mode else None)
    assert kept(runs / "seed0") == [found]


def test_a_submodule_at_a_time_takes_less_memory(runs, facts):
    whole = facts(f"run={runs}/seed0")
    parts = facts(f"run={runs}/seed0", "offload=submodule", "groups=leaf", "prefetch=false", "batch=100")
    assert parts["peak_weight_bytes"] < 0.6 * whole["peak_weight_bytes"]  # the largest layer has 44 % of them
    assert parts["bytes_to_device"] == 5 * parts["weight_bytes"]  # for 100, 100, 56; 100 and 4 images
    assert parts["members"][0]["error"] == whole["members"][0]["error"]


def test_several_batches_on_one_upload(runs, facts):
    found = facts(f"run={runs}/seed0", "offload=submodule", "prefetch=false", "batch=100", "batches_per_load=2")
    assert found["bytes_to_device"] == 3 * found["weight_bytes"]  # the first batch alone, then two and two
    assert found["members"][0]["error"] == recorded(runs / "seed0")["val_error"]


def test_folded_batchnorm_agrees_up_to_rounding(runs, facts):
    whole, folded = facts(f"run={runs}/seed0"), facts(f"run={runs}/seed0", "fold_bn=true", "offload=submodule")
    assert folded["notes"] == [
        "BatchNorm is folded into the convolutions (fold_bn=true): figures are the record's up to rounding."
    ]
    assert folded["members"][0]["loss"] == pytest.approx(whole["members"][0]["loss"], rel=1e-5)
    assert folded["members"][0]["loss"] != whole["members"][0]["loss"]


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_six_runs_in_the_room_of_two(runs, facts, combine):
    names = [f"{runs}/seed{seed}" for seed in range(6)]
    one = facts(f"run={names[0]}", "offload=model")
    found = facts(f"runs={runs}/seed*", "offload=model", f"budget={2 * one['weight_bytes']}", f"combine={combine}")
    assert [member["name"] for member in found["members"]] == names
    assert [member["error"] for member in found["members"]] == [
        recorded(runs / f"seed{k}")["val_error"] for k in range(6)
    ]
    assert found["uploads"] == 6
    assert found["bytes_to_device"] == 6 * one["weight_bytes"]
    assert found["peak_weight_bytes"] == 2 * one["weight_bytes"]
    error, top5, loss = by_hand(names, combine)
    assert (found["ensemble"]["error"], found["ensemble"]["error_top5"]) == (error, top5)
    assert found["ensemble"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert all(kept(runs / f"seed{k}")[-1] == found for k in range(6))


@torch.no_grad()
def by_hand(names, combine):
    """Average networks in plain PyTorch, all images at once: error, top-5 error, loss."""
    images, labels = sklearn_digits()
    total = 0
    for name in names:
        model = SmallResNet(8, classes=10, channels=1, stem_stride=1).eval()
        model.load_state_dict(load_file(f"{name}/model.safetensors"))
        logits = model(images).double()
        total += logits.exp() / logits.exp().sum(1, keepdim=True) if combine == "probabilities" else logits
    mean = total / len(names)
    if combine == "logits":
        mean = mean.exp() / mean.exp().sum(1, keepdim=True)
    ranks = (mean > mean.gather(1, labels[:, None])).sum(1)
    error, top5 = (100 * (ranks >= limit).sum().item() / 360 for limit in (1, 5))
    return error, top5, -mean.gather(1, labels[:, None]).log().mean().item()


def sklearn_digits():
    digits = load_digits()
    places = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)[1]
    pixels = torch.from_numpy(digits.images)[places, None] * (255 / 16)
    return ((pixels.round() / 255 - 0.305) / 0.376).float(), torch.from_numpy(digits.target)[places]


def test_an_ensemble_of_copies_is_as_good_as_one(runs, facts):
    shutil.copytree(runs / "seed1", runs / "copy")
    for mode in ("none", "submodule"):
        found = facts(f"runs={runs}/seed1,{runs}/copy", f"offload={mode}")
        assert len(found["members"]) == 2
        before = recorded(runs / "seed1")
        assert found["ensemble"]["error"] == before["val_error"]
        assert found["ensemble"]["error_top5"] == before["val_error_top5"]
        assert found["ensemble"]["loss"] == pytest.approx(before["val_loss"], rel=1e-12)


def test_weights_of_the_best_epoch_and_of_a_run_that_was_stopped(runs, facts):
    stopped = f"run={runs}/stopped"
    last, best = facts(stopped), facts(stopped, "weights=best")
    (checkpoint,) = (runs / "stopped" / "checkpoints").glob("best-*")
    named = facts(stopped, f"weights={checkpoint}")
    for found, iteration in ((last, 60), (best, 44), (named, 44)):
        assert found["members"][0]["iteration"] == iteration
        assert found["notes"] == [f"{runs}/stopped is unfinished (stopped, 1 of 2 epochs)."]
    assert last["members"][0]["recorded"] is None  # it stopped within an epoch
    assert best["members"][0]["error"] == named["members"][0]["error"] == recorded(runs / "stopped")["val_error"]
    assert best["members"][0]["recorded"]["loss"] == best["members"][0]["loss"]


def test_a_run_that_diverged_is_said_so(runs, facts):
    path = runs / "seed0" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "diverged"}))
    assert facts(f"run={runs}/seed0")["notes"] == [f"{runs}/seed0 diverged after 1 epochs."]


def test_figures_that_are_no_numbers_are_the_same_figures(runs, call):
    state = load_file(runs / "seed0" / "model.safetensors")
    save_file({name: value * torch.nan for name, value in state.items()}, runs / "nan.safetensors")
    status, out, err = call(f"run={runs}/seed0", f"weights={runs}/nan.safetensors", "offload=model", "compare=true")
    assert (status, err) == (0, "")
    assert "the same figures" in out


def test_another_precision_is_said_so(runs, facts):
    found = facts(f"run={runs}/seed0", "precision=fp64")
    assert found["notes"] == [f"{runs}/seed0 was trained and validated in fp32, and here in fp64."]
    assert found["precision"] == "fp64"
    assert found["members"][0]["loss"] == pytest.approx(recorded(runs / "seed0")["val_loss"], rel=1e-4)
    assert found["members"][0]["loss"] != recorded(runs / "seed0")["val_loss"]


def test_images_that_a_pitfall_counts_twice_are_counted_twice(compose, tmp_path, facts):
    config = compose(
        *("k=7", "n=16", "epochs=1", "pitfall=padded_eval", "lr.base_minibatch=32", "warmup=none", "device=cpu")
    )
    fit(Run.of(config, place(config, CPU), tmp_path / "run"))
    for batch in ("batch=null", "batch=50"):
        found = facts(f"run={tmp_path}/run", "offload=submodule", batch)
        assert found["images"] == 364
        assert found["members"][0]["error"] == recorded(tmp_path / "run")["val_error"]


def test_a_network_from_a_file(tmp_path, facts):
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=4).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    words = ["model=torchvision", "model.name=mobilenet_v3_small", "dataset=synthetic_small", "dataset.classes=4"]
    words += [f"state_file={tmp_path}/w.safetensors", "dataset.val_images=40", "device=cpu"]
    found = facts(*words, "offload=submodule", "compare=true")
    (member,) = found["members"]
    assert (member["name"], member["iteration"], member["recorded"]) == ("mobilenet_v3_small", None, None)
    # The images of dataset=synthetic are noise, and their labels go round.
    noise = torch.randint(0, 256, (256, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)[:40]
    labels = torch.arange(40) % 4
    with torch.no_grad():
        logits = model((noise / 255 - 0.5) / 0.25)
    assert member["error"] == 100 * (logits.argmax(1) != labels).sum().item() / 40
    assert member["loss"] == pytest.approx(cross_entropy(logits.double(), labels).item(), rel=1e-5)


def test_images_that_cannot_be_read_are_wrong(tmp_path, facts, call):
    root = make_tree(tmp_path / "photographs")
    spoiled = spoil(root / "val" / "astronaut" / "00000000.JPEG")
    model = torchvision.models.mobilenet_v3_small(num_classes=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = ["model=torchvision", "model.name=mobilenet_v3_small", "dataset=imagefolder", f"dataset.root={root}"]
    words += ["dataset.on_error=skip", "dataset.height=32", "dataset.width=32", "loader.workers=0", "k=1", "n=2"]
    words += [f"state_file={tmp_path}/w.safetensors", "batch=5"]
    found = facts(*words)
    assert (found["images"], found["members"][0]["unreadable"]) == (12, 1)
    assert found["members"][0]["error"] >= 100 / 12
    assert [line.partition(": ")[0] for line in found["skipped"]] == [f"corrupt image {spoiled}"]
    assert "1 images, counted as wrong" in call(*words)[1]


def test_a_page_for_people(runs, call):
    before = recorded(runs / "seed0")["val_error"]
    status, out, err = call(f"runs={runs}/seed0,{runs}/stopped", "offload=submodule", "compare=true")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert f"{runs}/seed0 {before:.2f} %, as recorded {runs}/stopped" in words
    assert "and the record has no validation at these weights" in words
    assert "% (mean of probabilities; a member's is " in words
    assert " on the device, " in words
    assert ", 0 B back" in words
    assert "against none the same figures, " in words
    assert " × the time (at best " in words
    assert words.endswith(f"note {runs}/stopped is unfinished (stopped, 1 of 2 epochs).")


def test_a_record_that_cannot_be_written_costs_a_word(runs, call):
    (runs / "seed0" / "evaluations.jsonl").mkdir()
    status, out, err = call(f"run={runs}/seed0")
    assert (status, "as recorded" in out) == (0, True)
    assert err.startswith(f"{runs}/seed0/evaluations.jsonl could not be written, so this evaluation is not recorded")
