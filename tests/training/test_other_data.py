"""A run goes on, is evaluated and is probed with the data that it was trained on, wherever they lie, and no others."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from largebatch.base.errors import UserError
from largebatch.cli.main import run
from largebatch.data import layouts
from largebatch.records.read import DATA, read_provenance, read_summary
from largebatch.training import checkpoint

WORDS = (
    *("dataset=imagefolder", "dataset.height=8", "dataset.width=8", "dataset.resize=8", "model=resnet8", "k=2", "n=2"),
    *("lr.base_minibatch=4", "warmup=none", "threads=1", "device=cpu", "precision=fp32"),
    *("loader.workers=0", "probe.batches=1", "probe.products=2"),
)
FREE = ("device=cpu", "threads=1", "loader.workers=0")


def make(root, seed=0):
    """Write four training images and one validation image for each of the classes a, b and c."""
    draw = np.random.default_rng(seed)
    for split, images in (("train", 4), ("val", 1)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = draw.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}{number}.png")
    return root


def rename(root, before="a", after="z"):
    for split in ("train", "val"):
        (root / split / before).rename(root / split / after)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    return tmp_path


@pytest.fixture
def stopped(here):
    """Return a run that was stopped after the first of its two epochs."""
    assert run(["train", *WORDS, "dataset.root=data", "epochs=2", "iterations=3", "run_dir=run"]) == 0
    assert read_summary(here / "run")["status"] == "stopped"
    return here / "run"


def resume(*words):
    return run(["train", *WORDS, "epochs=2", "run_dir=run", "resume=true", *words])


def refused(words, sentence):
    with pytest.raises(UserError) as error:
        run(words)
    assert sentence in str(error.value)


def without_digest(directory):
    """Make a record what an earlier version would have written."""
    for path in checkpoint.candidates(directory / "checkpoints"):
        found = checkpoint.read(path)
        state = {name: value for name, value in found.state.items() if name not in ("data", "schema")}
        path.unlink()
        prefix = checkpoint.BEST if path.name.startswith(checkpoint.BEST) else ""
        checkpoint.write(directory / "checkpoints", checkpoint.Snapshot(found.tensors, state), 9, prefix)
    (directory / DATA).unlink()


def test_a_run_goes_on_with_a_moved_root_and_with_no_others(stopped, here, capsys):
    (here / "data").rename(here / "moved")
    rename(here / "moved")
    first = "was trained on other data: class 0 is 'b' now and 'a' before"
    refused(
        ["train", *WORDS, "epochs=2", "run_dir=run", "resume=true", "dataset.root=moved"],
        f"run_dir=run {first}. Restore the data, or use another run_dir.",
    )
    for command in ("eval", "probe"):
        refused(
            [command, "run=run", "dataset.root=moved", *FREE],
            f"run {first}. Restore the data, or name them with dataset.root.",
        )
    rename(here / "moved", "z", "a")
    for command in ("eval", "probe"):
        assert run([command, "run=run", "dataset.root=moved", *FREE]) == 0
    assert resume("dataset.root=moved") == 0
    assert "no digest" not in capsys.readouterr().err
    assert read_summary(stopped)["status"] == "done"
    kept = json.loads((stopped / DATA).read_text())
    assert kept["classes"] == ["a", "b", "c"]
    origin = read_provenance(stopped)
    assert origin["data"] == {"digest": kept["digest"], "classes": 3}
    assert origin["experiment"]["dataset"]["digest"] == kept["digest"]
    assert checkpoint.newest(stopped / "checkpoints").state["data"] == kept


def test_a_checkpoint_of_a_set_whose_name_is_its_experiment_is_held_against_the_data_too(here):
    words = ["k=1", "n=64", "epochs=1", "device=cpu", "threads=1", "run_dir=run", "dataset.holdout=20"]
    assert run(["train", *words, "iterations=2"]) == 0
    path = checkpoint.candidates(here / "run" / "checkpoints")[0]
    found = checkpoint.read(path)
    found.state["data"]["train"]["labels"] = "00000000" + found.state["data"]["train"]["labels"][8:]
    found.state["data"]["digest"] = "another"
    state = {name: value for name, value in found.state.items() if name != "schema"}
    path.unlink()
    checkpoint.write(here / "run" / "checkpoints", checkpoint.Snapshot(found.tensors, state), 9)
    refused(
        ["train", *words, "resume=true"],
        "run_dir=run was trained on other data: the labels of the train images 0 … 1 differ, of which the first is one "
        "with label ",
    )


def test_a_record_without_a_digest_is_accepted_with_a_line_and_keeps_its_hash(here, capsys, monkeypatch):
    monkeypatch.setattr(layouts, "with_digest", lambda config: config)
    assert run(["train", *WORDS, "dataset.root=data", "epochs=2", "iterations=3", "run_dir=run"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(here)
    without_digest(here / "run")
    before = read_provenance(here / "run")
    assert "digest" not in before["experiment"]["dataset"]
    rename(here / "data")
    capsys.readouterr()
    assert run(["eval", "run=run", "dataset.root=data", *FREE]) == 0
    assert capsys.readouterr().err.count("run has no digest of its data, which earlier versions did not keep") == 1
    assert run(["probe", "run=run", *FREE]) == 0
    assert capsys.readouterr().err.count("run=run has no digest of its data") == 1
    assert resume("dataset.root=data") == 0
    assert capsys.readouterr().err.count("safetensors has no digest of its data") == 1
    after = read_provenance(here / "run")
    assert after["experiment_hash"] == before["experiment_hash"]
    assert read_summary(here / "run")["status"] == "done"


def test_an_earlier_default_directory_is_found_again(here, monkeypatch):
    monkeypatch.setattr(layouts, "with_digest", lambda config: config)
    assert run(["train", *WORDS, "dataset.root=data", "epochs=2", "iterations=3"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(["train", *WORDS, "epochs=2", "dataset.root=data", "resume=true"]) == 0
    (directory,) = (here / "runs" / "imagefolder-resnet8").iterdir()
    assert read_summary(directory)["status"] == "done"


def test_two_folders_are_two_experiments_by_default(here, capsys):
    make(here / "other", seed=1)
    shutil.copytree(here / "data", here / "copy")
    for root in ("data", "other"):
        assert run(["train", *WORDS, f"dataset.root={root}", "epochs=1"]) == 0
    refused(["train", *WORDS, "dataset.root=copy", "epochs=1"], "already holds a run")  # that of the first run
    assert len(list((here / "runs" / "imagefolder-resnet8").iterdir())) == 2
    capsys.readouterr()
    assert run(["table", "runs=runs", "format=json", "baseline=none"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["seeds"] for row in rows] == [1, 1]


def test_arms_of_two_folders_are_two_runs_and_of_two_copies_one(here):
    make(here / "other", seed=1)
    shutil.copytree(here / "data", here / "copy")
    roots = "data,other,copy"
    refused(
        ["train", "-m", *WORDS, "epochs=1", f"dataset.root={roots}", "hydra.sweep.dir=sweep"],
        "would both be recorded in",
    )
    assert run(["train", "-m", *WORDS, "epochs=1", "dataset.root=data,other", "hydra.sweep.dir=sweep"]) == 0
    records = [path.parent for path in (here / "sweep").glob("*/provenance.json")]
    assert len({read_provenance(record)["experiment_hash"] for record in records}) == 2


def test_images_without_the_digest_that_was_given_are_refused(here):
    refused(
        ["train", *WORDS, "epochs=1", "dataset.root=data", "dataset.digest=abc"],
        "and dataset.digest=abc: restore the data, or leave dataset.digest out.",
    )


@pytest.mark.parametrize("command", ["train", "explain"])
def test_a_set_with_one_class_is_refused(here, command):
    for split in ("train", "val"):
        for name in "bc":
            shutil.rmtree(here / "data" / split / name)
    words = [command, *WORDS, "epochs=1", "dataset.root=data", *(["run_dir=run"] if command == "train" else [])]
    refused(
        [word for word in words if command == "train" or "probe." not in word], "has one class, and a network tells"
    )
    assert not (here / "run").exists()
