import json
import shutil
import sys

import numpy as np
import pytest

from largebatch.base.errors import UserError
from largebatch.records import runs
from largebatch.records.check import Corrupt
from largebatch.records.runs import find, load


def test_a_run_says_what_its_record_says(record):
    errors = [80.0, 40.0, 7.0, 3.0, 5.0, 4.0]  # the last five, sorted: 3, 4, 5, 7, 40
    run = load(record(errors, train_errors=[90.0, 50.0, 8.0, 4.0, 6.0, 5.0], seed=3, seconds=12.5, starts=2))
    assert (run.seed, run.status, run.resumed, run.cut_short) == (3, "done", True, False)
    assert (run.final_error, run.seconds, run.images_per_second) == (5.0, 12.5, 1000.0)
    assert run.epochs["val_error"].tolist() == errors
    assert run.epochs["train_error"].tolist() == [90.0, 50.0, 8.0, 4.0, 6.0, 5.0]
    assert np.isnan(run.epochs["val_loss"]).all()  # null in the record
    assert run.experiment["k"] == 8


def test_a_record_of_another_kind_of_run_has_no_final_error(record):
    assert load(record(status="diverged")).final_error is None


@pytest.mark.parametrize("logged", [0, 1, 7, 500])
def test_epochs_are_found_among_any_number_of_iteration_lines(record, logged):
    run = load(record([60.0, 50.0, 40.0, 30.0, 20.0, 10.0], logged=logged))
    assert run.epochs["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.epochs["val_error"].tolist() == [60, 50, 40, 30, 20, 10]


def test_epochs_of_very_different_lengths_are_found(record):
    path = record() / "metrics.jsonl"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    filler = '{"kind": "iteration", "iteration": 1}\n'
    # After a long epoch the next one is looked for too far away: where the last one is.
    path.write_text(
        filler * 5 + first + filler * 400 + second + "".join(filler + line for line in rest[:-1]) + rest[-1]
    )
    assert load(path.parent).epochs["epoch"].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("left", [0.3, 0.99])
def test_a_line_cut_short_is_left_out_and_noted(record, left):
    path = record(status="running", logged=3) / "metrics.jsonl"
    text = path.read_text()
    last = text.rindex('{"kind": "epoch"')
    path.write_text(text[: last + int(left * (len(text) - last))])
    run = load(path.parent)
    assert run.cut_short
    assert run.epochs_done == 5


def test_a_run_that_has_just_begun_has_no_epochs(record):
    directory = record([], status="running")
    (directory / "summary.json").unlink()
    run = load(directory)
    assert (run.status, run.epochs_done, run.images_per_second) == ("running", 0, None)


def edit(name, change):
    def apply(directory):
        values = json.loads((directory / name).read_text())
        change(values)
        (directory / name).write_text(json.dumps(values))

    return apply


def without_an_epoch(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))


def with_a_word_for_a_number(directory):
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text.replace('"iteration": 10,', '"iteration": "ten",'))


def with_a_torn_epoch(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1][:40] + "\n"
    (directory / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "provenance.json").unlink(), "provenance.json cannot be read: No such file or directory"),
        (lambda d: (d / "provenance.json").write_text('{"sch'), "provenance.json is not JSON"),
        (lambda d: (d / "provenance.json").write_text("[1]"), "provenance.json is not a JSON object"),
        (lambda d: (d / "summary.json").write_text(""), "summary.json is not JSON"),
        (lambda d: (d / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read: No such file or directory"),
        (edit("provenance.json", lambda v: v.pop("seed")), "provenance.json has no seed"),
        (
            edit("provenance.json", lambda v: v["experiment"].pop("lr")),
            "provenance.json has no experiment.lr.base_minibatch",
        ),
        (edit("provenance.json", lambda v: v.update(experiment=3)), "provenance.json has no experiment.k"),
        (
            edit("provenance.json", lambda v: v["experiment"].update(k="8")),
            "provenance.json was edited: its experiment and seed do not have its hashes",
        ),
        (
            edit("provenance.json", lambda v: v.update(seed="one")),
            "provenance.json was edited: its experiment and seed do not have its hashes",
        ),
        (edit("provenance.json", lambda v: v.update(devices=None)), "provenance.json has no list of devices"),
        (edit("summary.json", lambda v: v.pop("status")), "summary.json has no status"),
        (edit("summary.json", lambda v: v.update(final_error="x")), "summary.json says final_error x, not a number"),
        (edit("summary.json", lambda v: v.update(seconds="x")), "summary.json says seconds x, not a number"),
        (edit("summary.json", lambda v: v.update(schema=2)), "summary.json is of schema 2, this program reads 1"),
        (
            edit("summary.json", lambda v: v.update(final_error=9.0)),
            "summary.json says final_error 9.0, and .* say 10.0",
        ),
        (without_an_epoch, "metrics.jsonl has epoch 4 where 3 should be"),
        (with_a_word_for_a_number, "metrics.jsonl has a value of iteration that is not a number"),
        (with_a_torn_epoch, "the line of epoch 2 in metrics.jsonl is not JSON"),
    ],
)
def test_a_corrupt_record_says_what_is_wrong(record, damage, reason):
    directory = record()
    damage(directory)
    with pytest.raises(Corrupt, match=f"^{reason}$"):
        load(directory)


def test_a_run_that_is_done_has_all_its_epochs(record):
    with pytest.raises(Corrupt, match=r"^it is done, and metrics.jsonl has 2 of 6 epochs$"):
        load(record([50.0, 10.0], final_error=30.0))


def test_runs_are_found_by_directory_glob_and_below(record, tmp_path, monkeypatch):
    one, two, other = record(seed=1), record(seed=2), record(seed=1, parent="other/deep")
    (one / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    assert {path.resolve() for path in find(["runs"])} == {one, two}
    replaced = tmp_path / "runs" / "replaced" / "0-s1" / "0"
    shutil.copytree(one, replaced)
    assert {path.resolve() for path in find(["runs"])} == {one, two}
    assert [path.resolve() for path in find(["runs/replaced"])] == [replaced]
    assert [path.resolve() for path in find([str(other)])] == [other]
    assert [path.resolve() for path in find(["runs/*s2*", "runs", str(two)])] == [two, one]
    assert [path.resolve() for path in find(["oth*"])] == [other]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(["~/other"]) == [other]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("runz", "runs=runz matches no run: this directory holds other (1 run), runs (2 runs)."),
        ("runs/k9*", "runs=runs/k9* matches no run: runs holds k8-…"),
        ("empty", "runs=empty matches no run: empty holds none."),
        ("", "runs= matches no run: this directory holds other (1 run), runs (2 runs)."),
        ("runs,other", "runs=runs,other matches no run: this directory holds other (1 run), runs (2 runs)."),
    ],
)
def test_no_run_matches(record, tmp_path, monkeypatch, pattern, sentence):
    record(seed=1), record(seed=2), record(parent="other/deep")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find([pattern])
    assert str(error.value).startswith(sentence.removesuffix("…"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_no_run_matches_beside_what_may_not_be_read(tmp_path, monkeypatch):
    """A path that is wrong from its beginning: the whole disk is not searched, a closed directory is passed over."""
    with pytest.raises(UserError, match=r"^runs=/proc/nothing matches no run: /proc holds none\.$"):
        find(["/proc/nothing"])
    monkeypatch.setattr(runs, "HINTS", 2)
    for name in ("near", "deep/er/still"):
        (tmp_path / "all" / name / "run").mkdir(parents=True)
        (tmp_path / "all" / name / "run" / "summary.json").touch()
    with pytest.raises(UserError, match=r"holds near \(1 run\)\.$"):
        find([str(tmp_path / "all" / "nothing")])


def test_only_a_small_part_of_a_long_record_is_read(record):
    path = record(logged=2000) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3 * 2001 + 1000] = '{"kind": "epoch", "epoch": 77}\n'  # in the middle of the fourth epoch
    path.write_text("".join(lines))
    assert [line["epoch"] for line in runs.epoch_lines(path)[0]] == [1, 2, 3, 4, 5, 6]
