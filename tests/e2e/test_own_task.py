"""The template in docs/examples: a network and a data set of the user's own, through everything that a run can do."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SHAPES = ("--config-dir", "conf", "experiment=shapes", "device=cpu", "threads=1", "loader.workers=1")
SMALL = (*SHAPES, "n=4", "dataset.kwargs={size: 64}", "dataset.val_images=30", "epochs=2")


@pytest.fixture(autouse=True)
def template(tmp_path):
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)


def test_one_two_and_four_processes_train_to_equal_weights(largebatch, tmp_path):
    found = []
    for processes in (1, 2, 4):
        done = largebatch("train", *SMALL, "precision=fp64", f"processes={processes}", f"run_dir=p{processes}")
        assert done.returncode == 0, done.stderr
        found.append(load_file(tmp_path / f"p{processes}" / "model.safetensors"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10)
