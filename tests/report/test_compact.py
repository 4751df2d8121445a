import filecmp
import json

import pytest

from largebatch.config import UserError
from largebatch.report.compact import compact
from largebatch.report.runs import load


def test_a_compact_record_says_the_same_with_fewer_lines(record, tmp_path):
    whole = record([60.0, 50.0, 40.0, 30.0, 20.0, 10.0], logged=3, starts=2)
    (whole / "model.safetensors").write_bytes(b"weights")
    target = compact(load(whole), tmp_path / "records")
    assert {path.name for path in target.iterdir()} == {
        *("config.yaml", "provenance.json", "summary.json", "starts.jsonl", "metrics.jsonl"),
    }
    assert filecmp.cmpfiles(whole, target, ["config.yaml", "provenance.json", "summary.json"], shallow=False)[1:] == (
        [],
        [],
    )
    before, after = load(whole), load(target)
    assert {name: column.tolist() for name, column in after.epochs.items() if name != "val_loss"} == {
        name: column.tolist() for name, column in before.epochs.items() if name != "val_loss"
    }
    assert after.resumed
    assert not after.iterations["epoch"].size
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] == "epoch"]
    assert (target / "metrics.jsonl").read_text().splitlines() == kept


def test_it_can_be_made_again_and_of_itself(record, tmp_path):
    whole = record(logged=3)
    target = compact(load(whole), tmp_path / "records")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert compact(load(whole), tmp_path / "records") == compact(load(target), tmp_path / "records") == target
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_it_replaces_no_other_run_and_no_whole_one(record, tmp_path):
    whole = record(logged=3)
    lines = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds a whole run, which a compact record would replace"):
        compact(load(whole), whole.parent)
    assert (whole / "metrics.jsonl").read_bytes() == lines
    other = record(seed=1)
    other.rename(tmp_path / "runs" / "moved")
    (tmp_path / "records").mkdir()
    compact(load(whole), tmp_path / "records").rename(tmp_path / "records" / "moved")
    with pytest.raises(UserError, match=r"moved holds another run: choose another out="):
        compact(load(tmp_path / "runs" / "moved"), tmp_path / "records")
