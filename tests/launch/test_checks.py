"""Mistakes in any arm of a sweep, of its network or its data, are refused before the first arm starts."""

import json
import subprocess
import sys

import pytest

from largebatch.base.errors import UserError
from largebatch.cli.main import run

FEW = ("epochs=1", "device=cpu", "threads=1", "hydra.sweep.dir=sweep")
SLURM = ("launcher=slurm", "launcher.dry_run=true", "device=cpu", "hydra.sweep.dir=sweep")
TIMM = ("model=timm", "dataset=cifar10")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*TIMM, "model.name=resnet18,resnett50", *FEW], "arm '.*resnett50.*': .* is not a timm model.*'resnet50'"),
        ([*TIMM, "model.name=resnet18,vit_tiny_patch16_224", *FEW], "does not take images of 3×32×32: Input height"),
        (["dataset=imagenet", "dataset.root=nowhere", "seed=0,1", *FEW], "nowhere does not exist"),
        (["dataset=imagefolder", "dataset.root=nowhere", "seed=0,1", *FEW], "nowhere does not exist"),
        (["dataset=imagenet", "seed=0,1", *FEW], "dataset=imagenet needs dataset.root"),
        ([*TIMM, "model.name=resnet18,resnett50", *SLURM], "arm '.*resnett50.*': .* is not a timm model"),
    ],
    ids=["name", "shape", "imagenet", "imagefolder", "no root", "slurm"],
)
def test_nothing_is_started(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LARGEBATCH_DATA", raising=False)
    with pytest.raises(UserError, match="nothing was started, because of the arm") as caught:
        run(["train", "-m", *words])
    assert caught.match(sentence)
    assert list(tmp_path.iterdir()) == []


def test_data_that_only_the_nodes_have_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "-m", "dataset=imagefolder", "dataset.root=/nowhere/at/all", "seed=0,1", *SLURM]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("dataset.root=/nowhere/at/all is not on this machine: the nodes must have it.") == 1
    assert "#SBATCH --array=0-1" in printed.out


def test_a_dry_run_leaves_a_sweep_whose_scripts_run(tmp_path, monkeypatch, capsys):
    """The script, run as element 1 of a job by a stand-in for srun, trains task 1 of the planned sweep."""
    monkeypatch.chdir(tmp_path)
    few = ("k=2", "n=16", "iterations=1", "threads=1", "lr.base_minibatch=32", "processes=1")
    assert run(["train", "-m", "seed=0,1", *few, *SLURM]) == 0
    printed = capsys.readouterr()
    script = tmp_path / "sweep" / "slurm" / "dry-run-0.sh"
    assert script.read_text() == printed.out
    assert f"sbatch {script}" in printed.err
    assert "largebatch sweep resume sweep" in printed.err
    assert len((tmp_path / "sweep" / "manifest.jsonl").read_text().splitlines()) == 2
    command = next(line for line in printed.out.splitlines() if "sweep run" in line)
    assert sys.executable in command
    done = subprocess.run(
        [sys.executable, "-m", "largebatch", "sweep", "run", "sweep", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "sweep").glob("*-s1-*/summary.json")
    assert json.loads(record.read_text())["iterations"] == 1
