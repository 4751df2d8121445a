"""TensorBoard's own reader finds the scalars and the experiment's values that were written."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from largebatch.records.tensorboard import Events

EPOCH = {
    "kind": "epoch",
    "epoch": 1,
    "iteration": 44,
    "rate": 0.1,
    "train_loss": 2.5,
    "train_error": 75.0,
    "val_error": 62.5,
    "val_error_top5": 12.5,
    "val_loss": 1.5,
    "images_per_second": 1000.0,
    "seconds": 1.25,
    "nonfinite": 0,
}
ITERATION = {"kind": "iteration", "iteration": 10, "epoch": 0.25, "rate": 0.1, "loss": 2.0, "train_error": 87.5}
ORIGIN = {
    "experiment_hash": "abc",
    "experiment": {
        "k": 8,
        "exact": True,
        "lr": {"base": 0.1},
        "dataset": {"name": "digits", "mean": [0.5], "root": None},
    },
}


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    writer = Events(directory, None)
    writer.hparams(ORIGIN)
    writer.scalars(ITERATION)
    writer.scalars(EPOCH)
    writer.close()
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_scalars_have_readable_tags(events):
    read = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert read == {
        "rate/learning_rate": pytest.approx(0.1),
        "loss/train": 2.0,
        "error/train": 87.5,
        "rate/learning_rate_epoch": pytest.approx(0.1),
        "loss/train_epoch": 2.5,
        "error/train_epoch": 75.0,
        "error/val": 62.5,
        "error/val_top5": 12.5,
        "loss/val": 1.5,
        "speed/images_per_second": 1000.0,
        "speed/seconds_per_epoch": 1.25,
    }


def test_the_experiment_is_in_the_hparams(events):
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()} == {
        "k": 8.0,
        "exact": True,
        "lr.base": 0.1,
        "dataset.name": "digits",
        "dataset.mean": "[0.5]",
        "dataset.root": "None",
    }
    assert start.group_name == "abc"


def test_a_start_comes_after_those_before_it_wherever_the_clock_was_set(tmp_path, monkeypatch):
    for start, clock in enumerate((2_000_000_000, 1_000_000_000, 1_500_000_000)):
        monkeypatch.setattr("largebatch.records.tensorboard.time.time", lambda now=clock: float(now))
        events = Events(tmp_path, 10 * start or None)
        events.scalars({**ITERATION, "iteration": 10 * start + 10})
        events.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss/train")] == [10, 20, 30]


def test_what_was_written_after_the_checkpoint_is_void(tmp_path):
    first = Events(tmp_path, None)
    for iteration in (10, 20, 30):
        first.scalars({**ITERATION, "iteration": iteration, "loss": 1.0})
    first.close()
    resumed = Events(tmp_path, 20)
    resumed.scalars({**ITERATION, "iteration": 30, "loss": 2.0})
    resumed.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss/train")] == [(10, 1.0), (20, 1.0), (30, 2.0)]
