"""Compiled runs: few graphs, whatever counts in a pass, and the same network learned."""

import functools
import shutil

import pytest
import torch
from torch import nn

from largebatch.cli.main import run
from largebatch.records.provenance import Run
from largebatch.records.read import read_metrics
from largebatch.runtime.placement import Hardware, place
from largebatch.training.loop import fit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"),  # its own
]
CPU = Hardware(cores=1, gpus=0, mps=False, bf16=False)
SMALL = [
    "dataset=synthetic_small",
    "dataset.height=8",
    "dataset.width=8",
    "dataset.pad=1",
    "dataset.train_images=32",
    "dataset.val_images=300",  # batches of 256 and 44
    "model=resnet8",
    "n=4",
    "epochs=2",
    "threads=1",
    "device=cpu",
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Keep away from what a test that was killed has left, and leave no graphs to the tests that follow."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    yield
    torch.compiler.reset()


@pytest.fixture
def traced_only(monkeypatch):
    """Let networks be traced into graphs, which then run as they are: making code of each takes a minute."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))


def graphs() -> int:
    """Return how many graphs the compiler has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def compare_with_eager(compose, directory, words) -> None:
    """Check that a run makes two graphs, one for training and one for validation, and learns what an eager one does."""
    epochs = []
    for compiled in (False, True):
        config = compose(*SMALL, *words, "k=4", "precision=fp64", f"compile={str(compiled).lower()}")
        before = graphs() if compiled else 0
        fit(Run.of(config, place(config, CPU), directory / str(compiled)))
        epochs.append([line for line in read_metrics(directory / str(compiled)) if line["kind"] == "epoch"])
    assert graphs() - before == 2
    assert len(epochs[0]) == 2
    for eager, compiled in zip(*epochs, strict=True):
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-9)
        assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-9)  # by the running statistics


def test_the_compiler_makes_one_graph_for_all_passes_and_one_for_all_of_validation(compose, tmp_path):
    compare_with_eager(compose, tmp_path, ["workers_per_pass=1"])


@pytest.mark.parametrize(
    "words",
    [
        ["workers_per_pass=1", "bn.recompute=true"],
        ["workers_per_pass=2", "bn.kernel=joint", "channels_last=true"],
        ["workers_per_pass=2", "bn.running=mean"],
        ["workers_per_pass=2", "bn.kernel=separate"],
    ],
    ids=["recompute", "joint", "mean", "separate"],
)
def test_one_graph_serves_all_passes_and_one_all_of_validation(compose, tmp_path, traced_only, words):
    compare_with_eager(compose, tmp_path, words)


def test_arms_of_a_sweep_do_not_share_the_compilers_limit(tmp_path, traced_only):
    words = [*SMALL, "compile=true", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert run(["train", "-m", *words, "k=1,2,4,8"]) == 0


def test_placements_of_a_certificate_do_not_share_the_compilers_limit(tmp_path, traced_only):
    words = [*SMALL, "k=8", "compile=true", "certify.processes=[1]", f"run_dir={tmp_path / 'certified'}"]
    assert run(["certify", *words]) == 0
