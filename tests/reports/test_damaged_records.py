"""Whatever a record holds, it leaves out its own run at most: no table, page or figure ends in a traceback."""

import json
import math
import shutil
import sys
import unicodedata

import pytest
from recorded_runs import ending

from largebatch.cli import main as cli
from largebatch.config.build import digest
from largebatch.records.check import Corrupt
from largebatch.records.runs import load
from largebatch.reports.page import page
from largebatch.reports.selection import select
from largebatch.reports.tables import FORMATS, table

HUGE = int("9" * 400)  # above 1e308
VALUES = [None, "", "x", "\x1b[31m", [], [None], ["x", 1], {}, {"a": [1]}, True, 0, -1, 0.5, 10**15, HUGE, math.nan]
DEEP = "[" * 100_000 + "]" * 100_000


def controls(text):
    """Return what a terminal or a reader may take for a command, besides line breaks."""
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs") and char != "\n"]


def with_hashes(provenance):
    """Return a provenance that whoever changed it has signed anew."""
    experiment = provenance["experiment"]
    try:
        provenance["experiment_hash"] = digest(experiment)
        provenance["run_hash"] = digest({**experiment, "seed": provenance["seed"]})
    except (TypeError, ValueError):  # what has no hash is refused for that
        pass
    return provenance


def places(values, path=()):
    """Yield where each value of nested mappings lies."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def put(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    if value is put:
        del values[last]
    else:
        values[last] = value


def refused(directory):
    try:
        load(directory)
    except Corrupt as error:
        return str(error)
    return ""


def all_reports(tmp_path, with_page=True):
    """Make every report of the runs; return which were left out."""
    selection = select([str(tmp_path / "runs")], "none", allow_mixed=True)
    shown = [table(selection, 0.5, shape, None) for shape in FORMATS]
    shown += [page(selection, 0.5)] if with_page else []
    assert not any(map(controls, shown))
    return dict(selection.corrupt)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # a legend of 400 digits takes all the room
@pytest.mark.parametrize("file", ["provenance.json", "summary.json"])
def test_any_value_in_the_place_of_any_other(record, tmp_path, file):
    """Reports are made of all that is read; what is not read is left out, with a reason."""
    record(10.0, k=8, seed=1)
    victim = record(10.0, k=16, seed=0, parent="whole")
    origin = json.loads((victim / "provenance.json").read_text())
    origin |= {"git": {"commit": "abc", "dirty": False}, "versions": {"torch": "2"}, "started": "now"}
    (victim / "provenance.json").write_text(json.dumps(origin))
    text = (victim / file).read_text()
    left_out = 0
    for path in places(json.loads(text)):
        made = []
        for number, value in enumerate((*VALUES, put)):
            values = json.loads(text)
            put(values, path, value)
            if {"experiment", "seed"} <= values.keys() and isinstance(values["experiment"], dict):
                values = values if "hash" in path[0] else with_hashes(values)
            made.append(shutil.copytree(victim, tmp_path / "runs" / f"damaged{number}"))
            (made[-1] / file).write_text(json.dumps(values))
        reasons = {one: reason for one in made if (reason := refused(one))}
        left_out += len(reasons)
        assert all(reason.isprintable() for reason in reasons.values())
        assert all_reports(tmp_path, with_page=path[0] != "experiment") == reasons
        for one in made:
            shutil.rmtree(one)
    assert left_out > {"provenance.json": 200, "summary.json": 30}[file]


@pytest.mark.slow
def test_any_value_in_an_epochs_line(record, tmp_path):
    record(10.0, k=8, seed=1)
    victim = record([50.0, 40.0], k=16, seed=0, status="running", parent="whole")
    text = (victim / "metrics.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    for key in first:
        made = []
        for number, value in enumerate((*VALUES, put)):
            line = dict(second)
            put(line, (key,), value)
            made.append(shutil.copytree(victim, tmp_path / "runs" / f"damaged{number}"))
            (made[-1] / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(line) + "\n")
        assert all_reports(tmp_path) == {one: reason for one in made if (reason := refused(one))}
        for one in made:
            shutil.rmtree(one)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda v: v["experiment"].update(k="eight"),
            "provenance.json has experiment.k eight, not a whole",
        ),
        (
            lambda v: v["experiment"]["lr"].update(base=None),
            "provenance.json has experiment.lr.base None, not a",
        ),
        (lambda v: v["experiment"]["lr"].update(base=HUGE), "provenance.json has experiment.lr.base 9999"),
        (lambda v: v.update(seed="one"), "provenance.json has seed one, not a whole number"),
        (lambda v: v.update(devices=["cpu", 3]), "provenance.json has a device that is not a name"),
        (lambda v: v["experiment"]["schedule"].pop("milestones"), "provenance.json has no experiment.schedule.miles"),
        (
            lambda v: v["experiment"]["model"].update(name="\x1b[2J"),
            "provenance.json has control characters in experiment.model.name",
        ),
    ],
)
def test_what_is_wrong_is_named(record, damage, reason):
    directory = record()
    values = json.loads((directory / "provenance.json").read_text())
    damage(values)
    (directory / "provenance.json").write_text(json.dumps(with_hashes(values)))
    with pytest.raises(Corrupt) as error:
        load(directory)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize("file", ["provenance.json", "summary.json", "metrics.jsonl"])
def test_json_that_is_nested_too_deeply(record, file):
    directory = record(ending(10.0))
    text = DEEP if file != "metrics.jsonl" else '{"kind": "epoch", "epoch": ' + DEEP + "}\n"
    (directory / file).write_text(text)
    with pytest.raises(Corrupt, match="nested too deeply"):
        load(directory)


@pytest.mark.parametrize("shape", FORMATS)
def test_control_characters_in_a_directorys_name_reach_no_terminal(record, tmp_path, monkeypatch, capsys, shape):
    record(10.0, seed=0), record(11.0, k=16, seed=0)
    evil = record(10.0, seed=0, parent="runs/a\x1b]0;title\x07\n\x9b31m\u202e")
    bad = record(10.0, seed=5, parent="runs/b\x1b[2J")
    (bad / "summary.json").write_text("{")
    lost = record([50.0], seed=3, status="diverged", parent="runs/c\x1b[2J")
    assert evil.exists()
    assert lost.exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["largebatch", "table", "runs=runs", f"format={shape}"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert "runs/b?[2J" in err
    assert not controls(out + err)
    monkeypatch.setattr(sys, "argv", ["largebatch", "report", "runs=runs", "out=page.html"])
    with pytest.raises(SystemExit):
        cli.main()
    text = (tmp_path / "page.html").read_text()
    assert not controls(text)
    assert "runs/c?[2J" in text


def test_notes_are_folded_unless_all_are_wanted(record, tmp_path, monkeypatch, capsys):
    record(10.0, seed=0), record(11.0, k=16, seed=0)
    for number in range(6):
        record(10.0, seed=0, parent=f"runs/again{number}")
    monkeypatch.chdir(tmp_path)

    def shown(*words):
        monkeypatch.setattr(sys, "argv", ["largebatch", "table", "runs=runs", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    assert "6 records are of the same run as another one, with the same numbers, and are counted once: " in shown()
    assert shown().count("counted once") == 1
    assert shown("notes=all").count("it is counted once.") == 6
