"""What a run asks a SLURM cluster for."""

import json

import pytest

from largebatch.base.errors import UserError
from largebatch.cli.commands.sweep import SWEEP
from largebatch.config.run import Config
from largebatch.launch import arrays, manifest
from largebatch.launch.manifest import Arm, Resources, Task


def asked(compose, *words: str) -> Resources:
    return arrays.resources(compose("launcher=slurm", "n=1", *words))


@pytest.mark.parametrize(
    ("words", "nodes", "processes", "gpus"),
    [
        (["k=1"], 1, 1, 1),
        (["k=8"], 1, 8, 8),
        (["k=256"], 1, 8, 8),  # 32 workers a GPU
        (["k=12"], 1, 6, 6),  # 8 GPUs do not share 12 workers evenly
        (["k=16", "launcher.gpus_per_node=4"], 1, 4, 4),
        (["k=256", "launcher.gpus=32"], 4, 32, 32),
        (["k=27", "launcher.gpus=9"], 3, 9, 9),  # two nodes would hold 5 and 4
        (["k=8", "launcher.nodes=2"], 2, 8, 8),
        (["k=8", "processes=2"], 1, 2, 2),
        (["k=8", "device=cpu"], 1, 1, 0),
        (["k=8", "device=cpu", "processes=4", "launcher.nodes=2"], 2, 4, 0),
        (["k=8", "launcher.gpus=0", "processes=64", "k=64"], 1, 64, 0),
        (["k=8", "device=cpu", "launcher.gpus=2"], 1, 2, 2),
    ],
)
def test_shapes(compose, words, nodes, processes, gpus):
    assert asked(compose, *words) == Resources(nodes=nodes, processes=processes, gpus=gpus)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["k=8", "launcher.gpus=3"], r"launcher\.gpus=3 does not divide k=8.*These do: 1, 2, 4, 8\."),
        (["k=8", "processes=4", "launcher.gpus=2"], r"processes=4 does not go with launcher\.gpus=2"),
        (["k=16", "launcher.gpus=16", "launcher.nodes=1"], r"launcher\.nodes=1 .* at most 8 GPUs .*: 2, 4, 8, 16\."),
        (["k=8", "launcher.gpus=4", "launcher.nodes=3"], r"launcher\.nodes=3 cannot share out 4 processes evenly"),
        (["launcher.gpus=-1"], r"launcher\.gpus=-1 is too small"),
        (["launcher.options=[exclusive]"], r"'exclusive' is no option of sbatch"),
        (["launcher.max_concurrent=0"], r"launcher\.max_concurrent=0 is too small"),
    ],
)
def test_mistakes(compose, words, sentence):
    with pytest.raises(UserError, match=sentence):
        asked(compose, *words)


def test_tasks_that_ask_for_the_same_share_an_array(compose):
    words = (["k=1"], ["k=8"], ["k=1", "seed=1"], ["k=8", "launcher.time=10"], ["k=2", "launcher.gpus=1"])
    configs = [compose("launcher=slurm", *each) for each in words]
    tasks = [Task(number, "", config, "", arrays.resources(config)) for number, config in enumerate(configs)]
    found = arrays.arrays(tasks)
    assert [(array.tasks, array.gpus, array.settings.time) for array in found] == [
        ((0, 2, 4), 1, None),
        ((1,), 8, None),
        ((3,), 8, "10"),
    ]


@pytest.mark.parametrize(
    ("words", "device"),
    [([], "cuda"), (["launcher.gpus=0"], "cpu"), (["device=cpu"], "cpu"), (["device=cpu", "launcher.gpus=2"], "cpu")],
)
def test_a_node_without_its_gpus_does_not_train_on_its_cores(compose, words, device):
    values = compose("launcher=slurm", *words).to_mapping()
    assert arrays.on_nodes(Arm("", values)).values["device"] == device


def test_settings_come_back_from_a_manifest(compose):
    config = compose("launcher=slurm", "launcher.setup=[module load cuda]", "launcher.time=04:00:00")
    again = Config.from_mapping(json.loads(json.dumps(config.to_mapping())))
    assert again == config
    assert (again.launcher.setup, again.launcher.time) == (("module load cuda",), "04:00:00")


def test_a_key_of_another_launcher_is_refused(compose):
    values = compose("launcher=slurm").to_mapping()
    with pytest.raises(UserError, match=r"'launcher\.gpus' is not a key of this configuration"):
        Config.from_mapping({**values, "launcher": {**values["launcher"], "name": "local"}})
    with pytest.raises(UserError, match=r"launcher=pbs is not known: it takes local, slurm"):
        Config.from_mapping({**values, "launcher": {"name": "pbs"}})


def test_a_sweep_is_looked_at_where_there_is_no_slurm(compose, tmp_path, monkeypatch, capsys):
    manifest.plan(tmp_path, [Arm("seed=3", compose("launcher=slurm", "seed=3").to_mapping())], arrays.resources)
    (tmp_path / "jobs.jsonl").write_text('{"job": "12", "tasks": [0], "offset": 0}\n')
    monkeypatch.setenv("PATH", "/nowhere")
    assert SWEEP.run(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "waiting", "0.0", "of", "90", "–", "0", "seed=3"]
    with pytest.raises(UserError, match="there is no scontrol on this machine"):
        SWEEP.run(["resume", str(tmp_path)])
