import json
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from largebatch.base.errors import UserError
from largebatch.config.run import Config
from largebatch.records import provenance, read, write
from largebatch.records.write import Position, Record
from largebatch.runtime.placement import Hardware, place

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)


@pytest.fixture
def origin(compose):
    return provenance.provenance(provenance.Run.of(compose(), place(compose(), CPU)), ["cpu"])


def test_a_record_reads_as_it_was_written(compose, origin, tmp_path):
    directory = tmp_path
    book = Record.open(directory, compose(), origin, None)
    assert read.read_summary(directory) == {"schema": 1, "status": "running"}
    book.metric({"kind": "iteration", "iteration": 1, "epoch": 0.2, "rate": 0.1, "loss": math.nan})
    book.metric({"kind": "epoch", "epoch": 1, "iteration": 5, "rate": 0.1, "val_error": 12.5})
    book.summary({"status": "done", "final_error": 12.5, "best_error": math.inf})
    book.log("a line")
    book.close()
    assert read.read_metrics(directory, "epoch") == [
        {"kind": "epoch", "epoch": 1, "iteration": 5, "rate": 0.1, "val_error": 12.5}
    ]
    assert read.read_metrics(directory)[0]["loss"] is None
    assert read.read_summary(directory) == {
        "schema": 1,
        "status": "done",
        "final_error": 12.5,
        "best_error": None,
    }
    assert read.read_provenance(directory)["run_hash"] == compose().run_hash("fp32")
    assert Config.from_mapping(yaml.safe_load((directory / "config.yaml").read_text())) == compose()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d a line\n", (directory / "log.txt").read_text())
    assert read.holds_run(directory)
    assert not list(directory.glob(".*"))


def test_tensorboard_reads_the_figures_and_the_experiment(compose, origin, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    book = Record.open(tmp_path, compose(), origin, None)
    book.metric({"kind": "epoch", "epoch": 1, "iteration": 5, "rate": 0.5, "val_error": 12.5})
    book.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("error/val")] == [(5, 12.5)]
    assert metadata.SESSION_START_INFO_TAG in events.PluginTagToContent(metadata.PLUGIN_NAME)


def test_resuming_cuts_the_lines_after_the_checkpoint(compose, origin, tmp_path):
    book = Record.open(tmp_path, compose(), origin, None)
    line = {"kind": "iteration", "iteration": 1, "rate": 0.1}
    book.metric(line)
    position = Position(iteration=1, record_bytes=book.size())
    book.metric({**line, "iteration": 2})
    book.close()
    book = Record.open(tmp_path, compose(), origin, position)
    book.metric({**line, "iteration": 3})
    book.close()
    assert [line["iteration"] for line in read.read_metrics(tmp_path)] == [1, 3]
    assert [start["iteration"] for start in read.read_starts(tmp_path)] == [0, 1]


def test_a_record_that_has_lost_lines_is_not_gone_on_with(compose, origin, tmp_path):
    Record.open(tmp_path, compose(), origin, None).close()
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than when the checkpoint at iteration 7 was"):
        Record.open(tmp_path, compose(), origin, Position(iteration=7, record_bytes=1))


def test_a_clock_that_goes_backwards_changes_no_record(compose, origin, tmp_path, monkeypatch):
    ticks = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr(write.time, "time", lambda: next(ticks))
    line = {"kind": "iteration", "iteration": 1, "rate": 0.1}
    book = Record.open(tmp_path, compose(), origin, None)
    book.metric(line)
    position = Position(iteration=1, record_bytes=book.size())
    book.close()
    book = Record.open(tmp_path, compose(), origin, position)
    book.metric({**line, "iteration": 2})
    book.close()
    assert [line["iteration"] for line in read.read_metrics(tmp_path)] == [1, 2]


def test_the_configuration_reads_as_it_was_written(compose, origin, tmp_path):
    Record.open(tmp_path, compose("schedule.milestones=[3,6]"), origin, None).close()
    assert read.read_config(tmp_path) == compose("schedule.milestones=[3,6]").to_mapping()


def test_a_configuration_of_another_writer_is_not_guessed_at(tmp_path):
    with pytest.raises(UserError, match=r"config.yaml cannot be read as a run's configuration: .*No such file"):
        read.read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model:\n    name: resnet8\n")
    with pytest.raises(UserError, match=r"config.yaml cannot be read as a run's configuration: Expecting value"):
        read.read_config(tmp_path)


def test_a_line_cut_short_ends_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": 1}\n{"kind": "epo')
    assert read.read_metrics(tmp_path) == [{"kind": "epoch", "epoch": 1}]


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_summary_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert read.read_summary(tmp_path) is None


def test_a_directory_that_cannot_be_made_is_named(compose, origin, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*/file/run cannot be written"):
        Record.open(tmp_path / "file" / "run", compose(), origin, None)


def test_only_listed_variables_are_recorded(compose, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "a secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    values = provenance.provenance(provenance.Run.of(compose(), place(compose(), CPU)), ["cpu"])
    assert values["environment"]["OMP_NUM_THREADS"] == "3"
    assert "a secret" not in json.dumps(values)


def test_default_directories_tell_runs_apart(compose):
    path = read.default_directory(compose(), compose().run_hash("fp32"))
    digest = compose().run_hash("fp32")[:8]
    assert str(path) == f"runs/digits-resnet8/k8-n32-gradual-s0-{digest}"
    others = [compose(override) for override in ("seed=1", "lr.base=0.2", "bn.running=mean")]
    assert len({path, *(read.default_directory(config, config.run_hash("fp32")) for config in others)}) == 4


def test_default_directories_have_safe_names(compose, tmp_path):
    config = compose("model=timm", "model.name='hf-hub:timm/a b'", "dataset=synthetic")
    path = read.default_directory(config, config.run_hash("fp32"))
    assert path.parent.name == "synthetic-hf-hub-timm-a-b"
    assert read.default_directory(config, config.run_hash("fp32"), tmp_path).parent == tmp_path


@given(st.text())
def test_safe_names_are_safe(text):
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", read.safe_name(text))


def test_differences_name_every_key():
    before = {"k": 8, "lr": {"base": 0.1, "scaling": "linear"}, "same": [1, 2]}
    now = {"k": 8, "lr": {"base": 0.2, "scaling": "linear"}, "same": (1, 2), "new": True}
    assert read.differences(before, now) == ["lr.base: 0.1 → 0.2", "new: null → true"]


def test_a_table_of_runs_lines_up():
    rows = [("k=1", {"status": "done", "iterations": 40, "final_error": 2.5}), ("k=32 seed=1", {})]
    assert read.describe(rows).splitlines() == [
        "run          status  iterations  final error %",
        "k=1          done    40          2.50         ",
        "k=32 seed=1  failed  –           –            ",
    ]


def test_reading_and_writing_records_needs_no_torch(compose, origin, tmp_path):
    program = """
import json, sys
from pathlib import Path
from largebatch.config.run import Config
from largebatch.records import read, write
values, origin, directory = json.loads(sys.argv[1])
book = write.Record.open(Path(directory), Config.from_mapping(values), origin, None)
book.metric({"kind": "epoch", "epoch": 1, "iteration": 5, "rate": 0.5})
book.close()
read.read_metrics(Path(directory))
sys.exit("torch" in sys.modules)
"""
    arguments = json.dumps([compose().to_mapping(), origin, str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", program, arguments], check=False, env={**os.environ})
    assert done.returncode == 0
