"""``runs.jsonl``: written from directories, read as they are."""

import json
from pathlib import Path

import pytest
from unpacked import unpacked

from largebatch.base.errors import UserError
from largebatch.records.check import Corrupt
from largebatch.records.packed import NAME, unpack
from largebatch.records.read import read_config, read_metrics, read_probes, read_starts
from largebatch.records.runs import find, load
from largebatch.reports.compact import compact

ROOT = Path(__file__).parents[2]


def columns(run):
    return {name: column.tolist() for name, column in run.epochs.items() if name != "val_loss"}


def test_a_run_in_the_file_says_the_same_as_its_directory(record, tmp_path):
    whole = record([60.0, 50.0, 40.0, 30.0, 20.0, 10.0], logged=3, starts=2)
    (whole / "model.safetensors").write_bytes(b"weights")
    (whole / "probes.jsonl").write_text('{"iteration": 3, "cosine": [0.5]}\n')
    file = compact([load(whole)], tmp_path / "records")
    assert file == tmp_path / "records" / NAME
    assert [path.name for path in file.parent.iterdir()] == [NAME]
    place = file.parent / whole.name
    before, after = load(whole), load(place)
    assert columns(before) == columns(after)
    assert (before.summary, before.provenance, before.starts) == (after.summary, after.provenance, after.starts)
    assert read_config(place) == read_config(whole)
    assert read_starts(place) == read_starts(whole)
    assert read_probes(place) == read_probes(whole) == [{"iteration": 3, "cosine": [0.5]}]
    kept = [json.dumps(line) for line in read_metrics(whole, "epoch")]
    assert file.read_text(encoding="utf-8").splitlines()[1:7] == kept


def test_it_can_be_made_again_and_of_itself(record, tmp_path):
    file = compact([load(record(logged=3)), load(record(seed=1))], tmp_path / "records")
    before = file.read_bytes()
    again = [load(place) for place in find([str(file)])]
    assert compact(reversed(again), file.parent) == compact(again[1:], file) == file
    assert file.read_bytes() == before


def test_runs_of_the_file_are_found_as_directories_are(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [record(), record(seed=1)]
    compact(map(load, places), Path("records"))
    names = sorted(Path("records", place.name) for place in places)
    for pattern in ("records", "records/runs.jsonl", "records/k*", "rec*/k*", str(tmp_path / "records" / "k*")):
        assert [path.resolve() for path in find([pattern])] == [path.resolve() for path in names]
    assert find([f"records/{names[0].name}", "records/*-s1-*"]) == names
    with pytest.raises(UserError, match=r"runs=records/x matches no run: records holds runs\.jsonl \(2 runs\)\."):
        find(["records/x"])


def test_directories_of_compact_records_are_read_as_before(tmp_path):
    file = ROOT / "results" / "digits-curves" / NAME
    unpacked(file, tmp_path / "old")
    packed = {path.name: load(path) for path in find([str(file)])}
    assert len(packed) == 9
    for path in find([str(tmp_path / "old")]):
        before, after = load(path), packed[path.name]
        assert columns(before) == columns(after)
        assert (before.summary, before.provenance, read_config(path)) == (
            after.summary,
            after.provenance,
            read_config(after.directory),
        )
    assert compact(map(load, find([str(tmp_path / "old")])), tmp_path / "new").read_bytes() == file.read_bytes()


def test_what_is_damaged_is_named(record, tmp_path):
    file = compact([load(record()), load(record(seed=1))], tmp_path / "records")
    first, *_ = names = sorted(unpack(file))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"epoch": 2,', '"epoch": 2', 1), encoding="utf-8")
    with pytest.raises(Corrupt, match=r"the line of epoch 2 in metrics\.jsonl is not JSON"):
        load(file.parent / first)
    assert load(file.parent / names[1]).status == "done"
    for broken, sentence in (
        (text.replace('"provenance"', '"provenence"', 1), r"line 1 of .*runs\.jsonl cannot be used \(KeyError"),
        (text + text, r"is there twice"),
        (text.partition("\n")[2], r"line 1 .*it belongs to no run"),
    ):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            find([str(file)])


def test_a_place_that_cannot_be_written_is_named(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^out={tmp_path / 'file'} cannot be written: "):
        compact([load(record())], tmp_path / "file")


def test_it_replaces_no_other_run(record, tmp_path):
    whole = record(logged=3)
    file = compact([load(whole)], tmp_path / "records")
    before = file.read_bytes()
    record(seed=1).rename(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / whole.name)
    with pytest.raises(UserError, match=rf"has another run of the name {whole.name}: choose another out="):
        compact([load(tmp_path / whole.name)], tmp_path / "records")
    assert file.read_bytes() == before
    assert (whole / "metrics.jsonl").is_file()
