"""``largebatch probe``: on a run's way, from its checkpoints, and every mistake that can be made with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.cli import main as cli
from largebatch.records.read import read_probes
from largebatch.records.write import write_probes

TINY = [
    *("dataset=synthetic_small", "dataset.height=8", "dataset.width=8", "dataset.train_images=131"),
    *("dataset.val_images=20", "k=4", "n=8", "lr.base_minibatch=8", "epochs=4", "warmup=none", "device=cpu"),
    *("schedule.milestones=[3]", "threads=1", "probe.batches=2", "probe.products=3"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Train ``kept``, whose checkpoints of every epoch stay, and ``bare``, which keeps the best alone."""
    root = tmp_path_factory.mktemp("runs")
    assert cli.run(["train", *TINY, "checkpoint.every=4", "checkpoint.keep=9", f"run_dir={root / 'kept'}"]) == 0
    assert cli.run(["train", *TINY, "checkpoint.minutes=0", f"run_dir={root / 'bare'}"]) == 0
    for path in (root / "bare" / "checkpoints").iterdir():
        path.unlink()
    return root


def test_checkpoints_say_what_the_run_would_have_said_on_its_way(runs, tmp_path, capsys):
    command = ["probe", *TINY, "answer=true", "format=json", f"run_dir={tmp_path / 'run'}"]
    assert cli.run(command) == 0
    on_its_way = json.loads(capsys.readouterr().out)
    assert on_its_way["share_of_run"] > 0
    assert on_its_way["answer"]["probes"] == 2  # after epochs 1 and 2: the rate falls at the third
    assert [one["epoch"] for one in on_its_way["probes"]] == [0, 1, 2, 3, 4]
    words = [word for word in TINY if word.startswith("probe")]
    assert cli.run(["probe", f"run={runs / 'kept'}", *words, "format=json"]) == 0
    from_checkpoints = json.loads(capsys.readouterr().out)
    assert from_checkpoints["share_of_run"] is None
    pairs = zip(on_its_way["probes"][1:], from_checkpoints["probes"], strict=True)
    for one, other in pairs:
        for name in one.keys() - {"seconds", "bn_mean_moved", "bn_variance_moved"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    before = (runs / "kept" / "probes.jsonl").read_bytes()
    assert cli.run(["probe", f"run={runs / 'kept'}", "answer=true"]) == 0  # nothing is measured again
    assert (runs / "kept" / "probes.jsonl").read_bytes() == before
    assert "answer  up to k = " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["k=1"], "k=1 leaves nothing to compare: .* such as probe.steps=32, or take a larger k"),
        (["probe.steps=1"], "probe.steps=1 is too few: .* It takes 2 or more"),
        (["probe.every=0"], "probe.every=0 is too small: it takes 1 or more"),
        (["probe.every=often"], "probe.every=often is not known: it takes a number of epochs, auto or null"),
        (["probe.every=null"], "probe.every=null measures nothing: give a number of epochs"),
        (["optimizer=lars"], "optimizer=lars cannot be probed: .* Use optimizer=sgd, or probe.every=null"),
        (["pitfall=scale_loss"], "pitfall=scale_loss cannot be probed: .* Use pitfall=none"),
        (["runs=runs"], r"runs= is what an answer is compared with: add answer=true"),
        (["margin=0"], "margin=0 is not a number of points above 0"),
        (["answer=yes_please"], "answer=yes_please is of the wrong kind: it takes true or false"),
        (["run=nowhere"], "run=nowhere matches no run"),
        (["run={root}"], "run=.* is not a run, but contains 2: name one, such as run=.*bare"),
        (["run={root}/bare"], r"was not probed: train with probe\.every=1, or keep checkpoints \(checkpoint\.every="),
        (["run={root}/kept", "k=8"], "k= cannot be given with run=, which is probed as it was trained"),
        (["run={root}/kept", "dataset.root=/nowhere", "seed=3"], "seed= cannot be given with run="),
    ],
)
def test_mistakes_are_sentences(runs, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        cli.run(["probe", *(word.format(root=runs) for word in words)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["probe.every=4"],
            "this run has no probe at its full rate after 5.6% of its epochs and before the first decay",
        ),
        (["runs={root}/kept", "baseline=none"], "a comparison with training needs a baseline"),
    ],
)
def test_what_leaves_no_answer_is_refused_before_training(runs, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        cli.run(["probe", *TINY, "answer=true", *(word.format(root=runs) for word in words)])
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_still_training_is_left_alone(runs):
    program = (
        "import sys; from pathlib import Path; from largebatch.runtime.lock import owned\n"
        "with owned(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, runs / "kept"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=r"is still training: wait, or probe it on its way with probe\.every=1"):
            cli.run(["probe", f"run={runs / 'kept'}"])


def test_another_number_of_images_is_not_the_run_s_data(runs):
    directory = runs / "kept"
    lines = read_probes(directory)
    write_probes(directory, [])
    config = directory / "config.yaml"
    text = config.read_text()
    older = text.replace('  kernel: "auto"\n', "")  # a record of when there was no such key
    assert older != text
    config.write_text(older.replace("train_images: 131", "train_images: 163"))
    with pytest.raises(
        UserError, match=r"was trained on \[131, 20\] training and validation images, and now there are"
    ):
        cli.run(["probe", f"run={directory}"])
    config.write_text(text)
    write_probes(directory, lines)


def test_a_record_that_is_not_whole_is_said_before_it_is_probed(runs):
    directory = runs / "kept"
    lines, provenance = read_probes(directory), directory / "provenance.json"
    write_probes(directory, [])
    provenance.rename(directory / "elsewhere.json")
    with pytest.raises(UserError, match=r"kept cannot be read: provenance\.json cannot be read: No such file"):
        cli.run(["probe", f"run={directory}"])
    (directory / "elsewhere.json").rename(provenance)
    write_probes(directory, lines)
