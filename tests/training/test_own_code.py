"""A run of the user's own code: recorded, resumed, certified."""

import json

import pytest

from largebatch.cli.main import run

NETS = """
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, classes, channels, drop, fails):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)
        self.drop, self.fails = drop, fails

    def forward(self, images):
        if self.fails and len(images) == 360 % 256:
            raise RuntimeError("the last batch of validation")
        return self.head(F.dropout(self.conv(images).relu().mean((2, 3)), self.drop, self.training))


def make(classes, channels, drop=0.0, fails=False):
    return Net(classes, channels, drop, fails)
"""
SETS = """
import numpy as np
import torch


class Set:
    def __init__(self, size, drifts):
        self.size, self.drifts = size, drifts

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((1, 8, 8), index / self.size) + self.drifts * np.random.default_rng().random(), index % 2


def make(drifts=False):
    return Set(64, drifts), Set(360, drifts)
"""
OWN_SET = ("dataset=python", "dataset.name=sets:make", "loader.workers=0")
WORDS = ("k=2", "n=8", "device=cpu", "threads=1", "model=python", "model.name=nets:make")


@pytest.fixture
def directory(own_code, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    return own_code(nets=NETS, sets=SETS)


def test_a_resume_under_other_code_is_said_in_one_line_and_goes_on(directory, own_code, capsys):
    train = ["train", *WORDS, "epochs=1", "run_dir=run"]
    assert run([*train, "iterations=3"]) == 0
    origin = json.loads((directory / "run" / "provenance.json").read_text())["user_code"]["model.name"]
    assert (origin["name"], origin["file"]) == ("nets:make", str(directory / "nets.py"))
    before = origin["sha256"]["nets.py"]
    assert "other code" not in capsys.readouterr().err
    own_code(nets=NETS + "\n# the same\n")
    assert run([*train, "iterations=5", "resume=true"]) == 0
    starts = [json.loads(line) for line in (directory / "run" / "starts.jsonl").read_text().splitlines()]
    after = starts[1]["user_code"]["model.name"]["sha256"]["nets.py"]
    said = [line for line in capsys.readouterr().err.splitlines() if "other code" in line]
    assert said == [f'resumed with other code or versions: nets.py: "{before}" → "{after}"']
    assert json.loads((directory / "run" / "summary.json").read_text())["iterations"] == 5


def test_the_record_of_a_run_without_own_code_is_as_it_was(directory):
    assert run(["train", *WORDS[:4], "epochs=1", "iterations=1", "run_dir=run"]) == 0
    assert "user_code" not in json.loads((directory / "run" / "provenance.json").read_text())


def test_dropout_that_no_module_shows_is_certified(directory, capsys):
    words = [*WORDS, "model.kwargs={drop: 0.5}", "certify.processes=[1]", "certify.iterations=3", "precision=fp64"]
    assert run(["certify", *words, "run_dir=certified", "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["holds"]
    assert any("draws random numbers of its own" in note for note in facts["notes"])
    assert any("no BatchNorm" in note for note in facts["notes"])


def test_a_fault_of_her_network_in_a_run_is_her_traceback(directory, capsys):
    with pytest.raises(ValueError, match="the last batch of validation") as caught:
        run(["train", *WORDS, "epochs=1", "model.kwargs={fails: true}", "run_dir=run"])
    sentence, place, *_ = str(caught.value).splitlines()
    assert sentence == "model.name=nets:make: RuntimeError: the last batch of validation."
    assert place.endswith("in forward")
    summary = json.loads((directory / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", sentence)


def test_certify_holds_on_her_data_and_says_where_items_are_not_reproducible(directory, capsys):
    words = ["certify", *WORDS, *OWN_SET, "certify.processes=[1]", "certify.iterations=3", "run_dir=c", "format=json"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["holds"]
    drifting = [*words, "dataset.kwargs={drifts: true}"]
    with pytest.raises(ValueError, match="item 0 is another each time that it is read"):
        run(drifting)
    assert run([*drifting, "dataset.reproducible=false"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["holds"]
    assert any(note.startswith("dataset.reproducible=false: an item may differ") for note in facts["notes"])


def test_a_run_of_her_data_is_recorded_explained_and_evaluated_again(directory, capsys):
    train = ["train", *WORDS, *OWN_SET, "epochs=2", "run_dir=run"]
    assert run(train) == 0
    assert sorted(json.loads((directory / "run" / "provenance.json").read_text())["user_code"]) == [
        "dataset.name",
        "model.name",
    ]
    capsys.readouterr()
    assert run(["explain", *WORDS, *OWN_SET, "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["train_images"], facts["val_images"], facts["data"]) == (64, 360, "made by sets:make")
    assert run(["eval", "run=run", "device=cpu", "format=json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    summary = json.loads((directory / "run" / "summary.json").read_text())
    assert evaluated["members"][0]["error"] == summary["last_error"]
