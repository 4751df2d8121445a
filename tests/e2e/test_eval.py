"""`largebatch eval` as the installed command."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(digits_runs, tmp_path):
    return shutil.copytree(digits_runs, tmp_path / "runs")


def test_an_ensemble_in_the_room_of_two_networks(largebatch, runs):
    done = largebatch("eval", "runs=runs/seed0,runs/seed1", "runs=runs/seed[2-5]", "offload=model", "budget=650kB")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" %, as recorded\n") == 6
    assert " in 6 uploads, 0 B back\n" in done.stdout
    assert json.loads((runs / "seed5" / "evaluations.jsonl").read_text())["peak_weight_bytes"] <= 650_000


def test_help_teaches_when_to_use_what(largebatch):
    done = largebatch("eval", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "== The modes of offload ==" in done.stdout
    assert "batches_per_load=1 " in done.stdout
