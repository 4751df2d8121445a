"""Sweeps of several processes at once: results, faults, interruptions, and going on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from largebatch.launch.manifest import read
from largebatch.launch.status import progress
from largebatch.runtime.lock import holder

pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds before a wait is given up as a hang
ARMS = ("-m", "k=2", "n=8", "device=cpu", "threads=1", "warmup=none", "launcher.jobs=2", "hydra.sweep.dir=sweep")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts the command, and ends it with the test."""
    started = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [Path(sys.executable).with_name("largebatch"), *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def states(largebatch, field: str = "state") -> list[str]:
    done = largebatch("sweep", "status", "sweep", "format=json")
    assert done.returncode == 0, done.stderr
    return [task[field] for task in json.loads(done.stdout)["tasks"]]


def test_four_arms_two_at_once_of_which_one_is_killed_and_two_diverge(largebatch, start, tmp_path):
    sweep = start("train", *ARMS, "seed=0,1", "lr.base=0.1,1e30", "iterations=5")
    first = tmp_path / "sweep" / "tasks" / "0"
    wait_for(lambda: holder(first))
    os.kill(holder(first).pid, signal.SIGKILL)
    _, said = sweep.communicate()
    assert sweep.returncode == 1
    assert said.count(" started: ") == 4
    assert (
        "── 1 of 4 failed: seed=0 lr.base=0.1\nlargebatch: It was killed by SIGKILL. Its log is sweep/tasks/0/" in said
    )
    assert "1 of 4 are not done. To continue: largebatch sweep resume sweep\n" in said
    table = said.rpartition("\n\n")[2].splitlines()
    assert [re.split(r"\s{2,}", row)[1] for row in table] == ["status", "failed", "diverged", "stopped", "diverged"]
    assert states(largebatch) == ["failed", "diverged", "stopped", "diverged"]
    assert states(largebatch, "reason") == ["It was killed by SIGKILL.", "", "", ""]
    assert largebatch("sweep", "logs", "sweep", "2").stdout.startswith("sweep/tasks/2/log.txt\n")

    resumed = largebatch("sweep", "resume", "sweep")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count(" started: ") == 1
    assert states(largebatch) == ["stopped", "diverged", "stopped", "diverged"]


def test_a_sweep_is_interrupted_goes_on_and_is_cancelled(largebatch, start, tmp_path):
    endless = ("seed=0,1,2", "epochs=1000000", "log_every=1")
    sweep = start("train", *ARMS, *endless)

    def running(beyond: float) -> bool:
        """Whether the first two tasks have come further than so many epochs."""
        path = tmp_path / "sweep"
        if not (path / "manifest.jsonl").exists():
            return False
        return all(progress(task.directory)[0] > beyond for task in read(path)[:2])

    wait_for(lambda: running(0))
    assert states(largebatch) == ["running", "running", "waiting"]
    refused = largebatch("sweep", "resume", "sweep")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"largebatch: sweep is in the hands of process {sweep.pid} on ")
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate()
    assert sweep.returncode == 130, said
    assert said.count(" started: ") == said.count(" interrupted") - 2 == 2  # in a line when it ends, and in the table
    assert states(largebatch) == ["interrupted", "interrupted", "waiting"]

    before = max(progress(task.directory)[0] for task in read(tmp_path / "sweep"))
    sweep = start("sweep", "resume", "sweep")
    wait_for(lambda: running(before))
    cancelled = largebatch("sweep", "cancel", "sweep")
    assert (cancelled.returncode, cancelled.stderr[:27]) == (0, "The tasks will write checkp")
    _, said = sweep.communicate()
    assert sweep.returncode == 75, said
    assert states(largebatch) == ["interrupted", "interrupted", "waiting"]
    assert states(largebatch, "restarts") == [1, 1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="ties processes together by prctl")
def test_a_sweep_that_is_killed_leaves_no_process_behind(largebatch, start, tmp_path):
    sweep = start("train", *ARMS, "seed=0,1", "epochs=1000000")
    places = [tmp_path / "sweep" / "tasks" / str(number) for number in (0, 1)]
    wait_for(lambda: all((place / "outcome.json").exists() for place in places))
    sweep.kill()
    wait_for(lambda: not any(map(holder, places)))
    assert states(largebatch) == ["interrupted", "interrupted"]


def test_what_is_done_is_not_run_again_unless_forced(largebatch, tmp_path):
    words = ("train", *ARMS[:-2], "seed=0,1", "iterations=2", "hydra.sweep.dir=sweep")
    assert largebatch(*words).returncode == 0
    records = sorted((tmp_path / "sweep").glob("k2-*/starts.jsonl"))
    before = [path.stat().st_mtime_ns for path in records]
    again = largebatch(*words)
    assert (again.returncode, again.stderr.count("stopped already: sweep/k2-")) == (0, 2)
    assert [path.stat().st_mtime_ns for path in records] == before
    forced = largebatch(*words, "sweep.force=true")
    assert forced.returncode == 0, forced.stderr
    assert len(list((tmp_path / "sweep" / "replaced").glob("*/0/summary.json"))) == 2
    assert all(path.stat().st_mtime_ns > time for path, time in zip(records, before, strict=True))
