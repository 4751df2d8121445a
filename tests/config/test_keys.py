"""Configurations that were recorded before a key existed build today, and keep their hashes."""

from pathlib import Path

from largebatch.config.keys import ADDED, complete, without_added
from largebatch.config.run import Config
from largebatch.records.read import read_config, read_provenance
from largebatch.records.runs import find

ROOT = Path(__file__).parents[2]


def test_every_committed_configuration_has_its_recorded_hashes():
    directories = find([str(ROOT / "results"), str(ROOT / "tests" / "frozen")])
    assert len(directories) > 200
    for directory in directories:
        origin = read_provenance(directory)
        config = Config.from_mapping(read_config(directory))
        precision = origin["experiment"]["precision"]
        found = (config.experiment_hash(precision), config.run_hash(precision))
        assert found == (origin["experiment_hash"], origin["run_hash"]), directory


def test_a_stored_value_is_kept_and_a_missing_one_is_that_of_its_time():
    stored = {"k": 8, "bn": {"running": "mean", "kernel": "joint"}, "launcher": {"name": "local"}}
    found = complete(stored)
    assert found["bn"] == {"running": "mean", "kernel": "joint"}
    assert found["launcher"] == {"name": "local", "max_restarts": 0, "timeout": None, "jobs": 1}
    assert found["cuda_graphs"] is False
    assert found["probe"]["every"] is None
    assert stored == {"k": 8, "bn": {"running": "mean", "kernel": "joint"}, "launcher": {"name": "local"}}


def test_a_cluster_is_given_no_key_that_only_this_machine_has():
    assert "jobs" not in complete({"launcher": {"name": "slurm"}})["launcher"]


def test_today_adds_nothing_to_a_whole_configuration(compose):
    for words in ((), ("launcher=slurm",), ("experiment=imagenet_1h",)):
        values = compose(*words).to_mapping()
        assert complete(values) == values


def test_every_added_key_is_a_key_of_today(compose):
    values = compose().to_mapping()
    for key in ADDED:
        group, _, name = key.rpartition(".")
        assert name in (values[group] if group else values), key


def test_an_added_key_enters_an_experiment_only_where_it_differs(compose):
    usual, compressed = compose(), compose("exchange.compress=bf16")
    assert "exchange" not in usual.experiment("fp32")
    assert compressed.experiment("fp32")["exchange"] == {"compress": "bf16"}
    assert compressed.experiment_hash("fp32") != usual.experiment_hash("fp32")


def test_nothing_but_added_keys_is_left_out():
    experiment = {"k": 8, "cuda_graphs": False, "probe": {"every": None}, "bn": {"kernel": "joint", "momentum": 0.1}}
    assert without_added(experiment) == {"k": 8, "bn": {"kernel": "joint", "momentum": 0.1}}
