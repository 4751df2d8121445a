"""A run that an earlier version made (commit c0de8c7) stays of use: it is resumed, evaluated and loaded in integers.

tests/frozen/run was stopped at iteration 60 of 88, and evaluated and quantized there; evaluations.jsonl has both
evaluations. tests/frozen/uninterrupted.jsonl is the record of the same run, to its end, by the same version.
"""

import json
import shutil
from pathlib import Path

import pytest

from largebatch.cli.main import run
from largebatch.records.read import read_metrics, read_provenance

FROZEN = Path(__file__).parent / "frozen"
IMAGE = 100 / 360  # points of error; another processor may round a logit to the other side


@pytest.fixture
def frozen(tmp_path):
    """Return a copy of the run, which commands may write to."""
    return Path(shutil.copytree(FROZEN / "run", tmp_path / "run"))


def evaluations(directory: Path) -> list[dict]:
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["members"][0] for line in lines]


def test_it_is_resumed_as_if_it_had_not_been_stopped(frozen, capsys):
    words = read_provenance(frozen)["command"].split()[2:]  # after "largebatch train"
    kept = [word for word in words if not word.startswith(("iterations=", "run_dir="))]
    assert run(["train", *kept, "resume=true", f"run_dir={frozen}"]) == 0
    expected = [json.loads(line) for line in (FROZEN / "uninterrupted.jsonl").read_text().splitlines()]
    found = read_metrics(frozen)
    assert len(found) == len(expected)
    for line, old in zip(found, expected, strict=True):
        if old["kind"] == "iteration":
            assert (line["iteration"], line["rate"]) == (old["iteration"], pytest.approx(old["rate"]))
            assert line["loss"] == pytest.approx(old["loss"], rel=1e-3)
        else:
            assert line["val_error"] == pytest.approx(old["val_error"], abs=2 * IMAGE)
    assert read_provenance(frozen)["run_hash"] == read_provenance(FROZEN / "run")["run_hash"]
    assert (
        capsys.readouterr().err.count("safetensors has no digest of its data, which earlier versions did not keep") == 1
    )


@pytest.mark.parametrize("words", [[], ["quantized=true", "engine=reference"]], ids=["floats", "integers"])
def test_it_is_evaluated_as_it_was(frozen, words, capsys):
    expected = evaluations(FROZEN / "run")[bool(words)]
    assert run(["eval", f"run={frozen}", *words, "threads=1"]) == 0
    found = evaluations(frozen)[-1]
    assert found["iteration"] == expected["iteration"] == 60
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["error"] == pytest.approx(expected["error"], abs=IMAGE)
    assert capsys.readouterr().err.count(f"{frozen} has no digest of its data") == 1
