"""Runs that are killed, stopped, or lose their disk: what is resumed is what was never interrupted.

Real processes, real signals. ``scripts/torture.py`` does the same at length, over random configurations.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENDLESS, alive, descendants, linux, ranks, wait_for

from largebatch.training import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import torture

pytestmark = pytest.mark.slow

TWO = ("k=2", "n=8", "processes=2", "device=cpu", "threads=1", "deterministic=true", "log_every=1")
WORDS = (
    *torture.DATA,
    "k=2",
    "n=4",
    "epochs=20",
    "bn.running=mean",
    "device=cpu",
    "threads=1",
    "deterministic=true",
    "log_every=1",
    "checkpoint.every=1",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the result of an undisturbed run of WORDS."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert torture.end(torture.start(directory, WORDS)) == 0
    return torture.result(directory)


def train(directory: Path, *more: str) -> int:
    return torture.end(torture.start(directory, [*WORDS, *more]))


@linux
def test_twenty_kills_change_nothing(whole, tmp_path):
    """Each comes after a random number of further iterations; every other one while a checkpoint is being written."""
    chance, run = random.Random(0), tmp_path / "run"
    for number in range(20):
        process = torture.start(run, [*WORDS, "resume=true"])
        wanted = iteration(run) + chance.choice([0, 1, 1, 2, 3])
        until(process, lambda wanted=wanted: iteration(run) >= wanted)
        if number % 2:
            until(process, lambda: any(run.glob("checkpoints/.*.tmp")))
        process.kill()
        assert torture.end(process) == -signal.SIGKILL
    assert train(run, "resume=true") == 0
    assert torture.result(run) == whole


def until(process, condition) -> None:
    wait_for(lambda: condition() or process.exitcode is not None)


def iteration(run: Path) -> int:
    """Return the iteration of the newest checkpoint."""
    return max(map(checkpoint.iteration_of, checkpoint.candidates(run / "checkpoints")), default=0)


@linux
def test_a_rank_killed_three_times_in_a_row_ends_the_same(start, tmp_path):
    words = ("iterations=100", "checkpoint.every=1", "launcher.max_restarts=3")
    calm = tmp_path / "calm"
    assert torture.end(torture.start(calm, [*TWO, *words])) == 0

    run = start(*TWO, *words)
    chance, everyone = random.Random(0), set()
    for _ in range(3):
        known = iteration(run.directory)
        wait_for(lambda known=known: iteration(run.directory) > known + 2 or run.process.poll() is not None)
        wait_for(lambda: len(ranks(run.process.pid)) == 2)
        everyone |= set(descendants(run.process.pid))
        os.kill(victim := chance.choice(ranks(run.process.pid)), signal.SIGKILL)
        wait_for(lambda victim=victim: not alive(victim))
    status, printed = run.end()
    assert status == 0, printed
    named = re.findall(
        r"^largebatch: rank [01] of 2 was killed by SIGKILL\. Restart (\d+) of 3 \(launcher", printed, re.M
    )
    assert [int(number) for number in named] == [1, 2, 3]
    log = (run.directory / "log.txt").read_text()
    assert log.count("was killed by SIGKILL. Restart") == log.count("resumed from") == 3
    assert len((run.directory / "starts.jsonl").read_text().splitlines()) == 4
    assert torture.result(run.directory) == torture.result(calm)
    wait_for(lambda: not any(map(alive, everyone)))


@linux
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_hangs_is_named_with_its_iteration(start, number):
    run = start(*ENDLESS, "processes=2", "launcher.timeout=10", "launcher.max_restarts=0")
    run.until_it_trains()
    pair = sorted(ranks(run.process.pid))  # started in the order of their ranks
    os.kill(pair[number], signal.SIGSTOP)
    status, printed = run.end()
    assert status == 1
    words = rf"no progress for 10 s \(launcher\.timeout\): rank {number} of 2 has stopped responding in iteration \d+"
    assert re.search(rf"^largebatch: {words}, and the others wait\.$", printed, re.M), printed
    assert "Traceback" not in printed
    assert run.summary["status"] == "failed"
    wait_for(lambda: not any(map(alive, pair)))


@linux
def test_a_process_that_was_paused_goes_on(whole, tmp_path):
    """Longer than launcher.timeout, as Ctrl-Z or a closed lid does: nobody else waited for it."""
    run = tmp_path / "run"
    process = torture.start(run, [*WORDS, "launcher.timeout=3"])
    wait_for(lambda: iteration(run) > 1)
    os.kill(process.pid, signal.SIGSTOP)
    subprocess.run(["sleep", "4"], check=True)
    os.kill(process.pid, signal.SIGCONT)
    assert torture.end(process) == 0
    assert torture.result(run) == whole


def test_a_notice_of_preemption_ends_a_run_with_a_checkpoint(start):
    run = start(*ENDLESS)
    run.until_it_trains()
    for _ in range(2):  # a second notice changes nothing
        run.process.send_signal(signal.SIGUSR1)
    assert run.end()[0] == 75
    assert (run.summary["status"], run.summary["signal"]) == ("interrupted", "SIGUSR1")
    assert iteration(run.directory) == run.summary["iterations"]


def test_a_second_run_on_the_same_directory_is_refused(start):
    run = start(*ENDLESS)
    run.until_it_trains()
    second = start(*ENDLESS, "resume=true")
    status, printed = second.end()
    assert status == 2
    assert re.search(
        rf"^largebatch: run_dir=run is in use by process {run.process.pid} on .*another run_dir", printed, re.M
    )
    assert (run.process.poll(), run.summary["status"]) == (None, "running")
    before = run.lines
    run.until_it_trains(beyond=before)


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 16 MB, of which a run with three checkpoints takes two."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], check=False).returncode
    ):
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_costs_checkpoints_and_no_result(small_disk, whole, tmp_path):
    """A ballast takes all but what the first checkpoints need; the run ends well or says what happened."""
    (small_disk / "run").mkdir()
    run = tmp_path / "run"
    run.symlink_to(small_disk / "run")  # what it prints goes beside this, where there is room
    process = torture.start(run, WORDS)
    wait_for(lambda: iteration(run) >= 5)
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while free := os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize:
            try:
                ballast.write(bytes(min(free, 4096)))
            except OSError:
                break
        status = torture.end(process)
    printed = (tmp_path / "run.txt").read_text()
    assert status == 1, printed
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    last = checkpoint.newest(run / "checkpoints")
    assert last is not None
    (small_disk / "ballast").unlink()
    assert train(run, "resume=true") == 0
    assert torture.result(run) == whole


@linux
def test_a_loader_process_that_is_killed_changes_nothing(tmp_path, start):
    from images import make_tree
    from test_launching import photographs

    words = (*photographs(make_tree(tmp_path / "tree")), "k=2", "device=cpu", "threads=1", "deterministic=true")
    words = (*words, "iterations=24", "checkpoint.every=1", "epochs=100")
    run = start(*words)
    wait_for(lambda: iteration(run.directory) > 3)
    os.kill(descendants(run.process.pid)[-1], signal.SIGKILL)
    assert run.end()[0] == 1
    assert torture.end(torture.start(run.directory, [*words, "resume=true"])) == 0
    assert torture.end(torture.start(tmp_path / "calm", words)) == 0
    assert torture.result(run.directory) == torture.result(tmp_path / "calm")
    shutil.rmtree(tmp_path / "tree")
