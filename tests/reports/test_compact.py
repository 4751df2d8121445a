import filecmp
import json

import pytest

from largebatch.base.errors import UserError
from largebatch.records.runs import load
from largebatch.reports.compact import compact


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
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] == "epoch"]
    assert (target / "metrics.jsonl").read_text().splitlines() == kept


def test_it_can_be_made_again_and_of_itself(record, tmp_path):
    whole = record(logged=3)
    target = compact(load(whole), tmp_path / "records")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert compact(load(whole), tmp_path / "records") == compact(load(target), tmp_path / "records") == target
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_one_whose_writing_was_cut_short_is_written_anew(record, tmp_path):
    target = compact(load(record()), tmp_path / "records")
    before = (target / "metrics.jsonl").read_bytes()
    (target / "metrics.jsonl").unlink()
    assert compact(load(tmp_path / "runs" / target.name), tmp_path / "records") == target
    assert (target / "metrics.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^out={tmp_path / 'file'} cannot be written: "):
        compact(load(record()), tmp_path / "file")


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
