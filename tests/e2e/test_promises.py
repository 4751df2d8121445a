"""What the README promises of training, on real images and to the end: minutes, so only `make test-all` runs it."""

import json

import pytest

pytestmark = pytest.mark.acceptance


def test_fashion_mnist_ends_under_10_percent_after_10_epochs(largebatch, tmp_path):
    done = largebatch("train", "k=8", "n=32", "dataset=fashion_mnist", "model=resnet8", "epochs=10", "threads=1")
    assert done.returncode == 0, done.stderr
    (summary,) = tmp_path.glob("runs/fashion_mnist-resnet8/*/summary.json")
    assert json.loads(summary.read_text())["final_error"] < 10


def test_a_sweep_of_twelve_arms_ends_with_a_table_of_its_eight_runs(largebatch, tmp_path):
    """At k=1 and k=8 the reference rate is not above lr.base, so that no warmup takes place: one run for both arms."""
    done = largebatch("train", "-m", "k=1,8,32", "warmup=none,gradual", "seed=0,1", "threads=1")
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/sweeps/*/*/summary.json")]
    assert len(summaries) == 8
    assert done.stderr.count("is the run of") == 4
    assert {(summary["train_images"], summary["val_images"]) for summary in summaries} == {(1437, 360)}
    assert all(summary["status"] == "done" and summary["final_error"] < 5 for summary in summaries if summary["k"] < 32)

    header, *rows = done.stderr.rstrip().splitlines()[-9:]
    assert header.split() == ["run", "status", "iterations", "final", "error", "%"]
    arms = {
        f"k={k} warmup={warmup} seed={seed}"
        for k, warmup in ((1, "none"), (8, "none"), (32, "none"), (32, "gradual"))
        for seed in (0, 1)
    }
    assert {row.split("  ")[0] for row in rows} == arms
