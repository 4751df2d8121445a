"""The check for a GPU: its dry run on the CPU does every step, and leaves what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
STEPS = ["environment", "tests", "certify", "digits", "exchange", "kernels", "folder", "memory", "resnet50", "rest"]


def check(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


def test_a_step_that_does_not_exist_is_refused(tmp_path):
    done = check(str(tmp_path / "out"), "--only", "kernel")
    assert done.returncode == 2
    assert done.stderr == f"--only kernel is no step. These are: {', '.join(STEPS)}.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_dry_run_does_every_step_and_leaves_few_files(tmp_path):
    done = check(str(tmp_path), "--dry-run")
    results = json.loads((tmp_path / "check.json").read_text())
    failed = {name: one for name, one in results["steps"].items() if not one["passed"]}
    assert failed == {}
    assert done.returncode == 0
    assert list(results["steps"]) == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "summary.md", "tests.xml"]
    assert (tmp_path / "summary.md").read_text().count("| passed |") == len(STEPS)
