"""The experiments on ImageNet are the rows that the paper published, each once, and all of them are in the sweep."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from largebatch.reports.paper import TABLES, Published, published

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "experiment").glob("imagenet_*.yaml")}
ROWS = {table: published(table).rows for table in TABLES}


def row_of(name: str, config) -> Published:
    """Return the published row that a configuration is, of the table that the file's name says; of any without one."""
    tables = [table for table in TABLES if name.startswith(f"imagenet_{table}_")] or TABLES
    wanted = (
        config.minibatch,
        pytest.approx(config.reference_rate),
        config.warmup.name,
        config.model.name,
        config.model.zero_gamma,
    )
    same = [
        row
        for table in tables
        for row in ROWS[table]
        if (row.kn, row.rate, row.warmup, row.model, row.zero_gamma) == wanted
    ]
    assert same, f"{name} is no row of {tables}"
    return same[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_experiment_is_a_row_of_the_paper(compose, name):
    config = compose(f"experiment={name}")
    row = row_of(name, config)
    assert (config.n, config.k, config.epochs) == (32, row.kn // 32, 90)
    assert (config.milestones, config.schedule.factor) == ((30, 60, 80), 0.1)
    assert (config.optimizer.momentum, config.optimizer.nesterov, config.optimizer.weight_decay) == (0.9, True, 1e-4)
    if row.warmup != "none":
        rates = config.rates(1_281_167)
        start = 0.1 if row.warmup == "constant" else config.lr.base
        assert (config.warmup_epochs, rates.rate_at(0)) == (5, pytest.approx(start))
        assert rates.rate_at(5 * config.iterations_per_epoch(1_281_167)) == pytest.approx(row.rate)
    head = FILES[name].partition("defaults:")[0]
    assert f"largebatch train experiment={name} dataset.root=" in head
    error = "without a number" if row.error is None else f"{row.error:.2f} ± {row.std:.2f} %"
    assert error in head


def test_every_published_row_is_an_experiment(compose):
    for table in TABLES:
        mine = [row_of(name, compose(f"experiment={name}")) for name in FILES if name.startswith(f"imagenet_{table}_")]
        assert sorted(row.what + str(row.kn) for row in mine) == sorted(row.what + str(row.kn) for row in ROWS[table])


def test_the_hours_in_the_heads_are_what_predict_says():
    from largebatch.cost_model.model import Question, predict
    from largebatch.cost_model.profile import load
    from largebatch.cost_model.text import duration

    told = 0
    for head in FILES.values():
        found = re.search(r"# (\d+) P100, .*: (.+) \(largebatch predict k=(\d+)(?: gpus=(\d+))?\)", head)
        if found:
            gpus = int(found[1])
            assert int(found[4] or found[3]) == gpus
            assert found[2] == duration(predict(load("paper"), Question(), int(found[3]), gpus).run)
            told += 1
    assert told == len([head for head in FILES.values() if "resnet101" not in head])


def test_the_sweep_of_the_paper_has_every_experiment_once(compose, tmp_path):
    command = tmp_path / "largebatch"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    script = ROOT / "scripts" / "imagenet-paper.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = [script, "/data", "/runs", "launcher.partition=gpu"]
    words = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert {"dataset.root=/data", "hydra.sweep.dir=/runs", "launcher.partition=gpu", "seed=0,1,2,3,4"} <= {*words}
    (names,) = (word.partition("=")[2].split(",") for word in words if word.startswith("experiment="))
    swept = [compose(f"experiment={name}").experiment_hash("bf16") for name in names]
    assert len(set(swept)) == len(names) == 23
    assert {*swept} == {compose(f"experiment={name}").experiment_hash("bf16") for name in FILES}


def test_an_experiment_states_only_what_differs():
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    assert sum(text.count("\n") for text in files) <= 7 * len(files)  # 1,000 lines where all restate the recipe
