"""What becomes of a run that a signal ends before it trains."""

import os
import signal
import subprocess
import sys

import pytest

from largebatch.base.signals import ENDED
from largebatch.launch import run
from largebatch.records.read import read_summary
from largebatch.records.write import write_summary
from largebatch.runtime import processes
from largebatch.runtime.processes import Stopped


def stopped(number):
    def launched(function, arguments, processes, threads):
        raise Stopped(number)

    return launched


@pytest.mark.parametrize("before", [{"status": "stopped"}, {"status": "interrupted", "signal": "SIGINT"}, None])
def test_the_end_of_an_earlier_start_is_not_that_of_this_one(compose, tmp_path, monkeypatch, before):
    if before:
        write_summary(tmp_path, {**before, "iterations": 5})
    monkeypatch.setattr(run, "_left_by_a_run_that_is_over", lambda _: None)
    monkeypatch.setattr(processes, "launch", stopped(signal.SIGTERM))
    outcome = run.train_run(compose(f"run_dir={tmp_path}", "resume=true"))
    assert outcome.status == ENDED
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["signal"]) == ("interrupted", "SIGTERM")
    assert summary.get("iterations") == (5 if before else None)


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_before_training_begins_is_an_interruption(tmp_path, number, status):
    program = (
        "import os, signal, sys, largebatch.cli.commands.train as t\n"
        f"t.train_run = lambda config: os.kill(os.getpid(), signal.{number}) or signal.pause()\n"
        "from largebatch.cli.main import main; sys.argv = ['largebatch', 'train']; main()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("count", "resumes"), [(None, False), ("0", False), ("2", True)])
def test_a_group_that_torchrun_has_restarted_goes_on_from_its_checkpoint(
    compose, tmp_path, monkeypatch, count, resumes
):
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    seen = []

    def launched(function, arguments, processes, threads):
        seen.append(arguments[0].config.resume)
        return {"status": "done"}

    monkeypatch.setattr("largebatch.runtime.processes.launch", launched)
    assert run.train_run(compose(f"run_dir={tmp_path}", "device=cpu")).status == 0
    assert seen == [resumes]
