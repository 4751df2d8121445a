"""A terminal that is closed, a pipe whose reader has ended: the run goes on."""

import json
import os
import signal
import subprocess

import pytest
from processes import BIN, ENDLESS, PATIENCE, linux, wait_for

pytestmark = pytest.mark.slow


def lines(directory) -> int:
    metrics = directory / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_without_its_terminal_and_heeds_signals(tmp_path, processes):
    terminal, ours = os.openpty()
    process = subprocess.Popen(
        [BIN / "largebatch", "train", "run_dir=run", *ENDLESS, f"processes={processes}"],
        cwd=tmp_path,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
    )
    try:
        os.close(ours)
        wait_for(lambda: lines(tmp_path) or process.poll() is not None)
        os.close(terminal)
        seen = lines(tmp_path)
        wait_for(lambda: lines(tmp_path) > seen + 100 or process.poll() is not None)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
    finally:
        process.kill()
        process.wait()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["signal"]) == ("interrupted", "SIGINT")
    assert list((tmp_path / "run" / "checkpoints").glob(f"*{summary['iterations']}*.safetensors"))


@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hangup_is_ignored_under_nohup_and_ends_with_a_checkpoint_elsewhere(start, processes):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does; a child inherits it
    try:
        run = start(*ENDLESS, f"processes={processes}")
    finally:
        signal.signal(signal.SIGHUP, before)
    run.until_it_trains()
    run.process.send_signal(signal.SIGHUP)
    run.until_it_trains(beyond=run.lines + 20)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 75

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        run = start(*ENDLESS, f"processes={processes}", "resume=true")
    finally:
        signal.signal(signal.SIGHUP, before)
    run.until_it_trains(beyond=run.lines)
    run.process.send_signal(signal.SIGHUP)
    status, printed = run.end()
    assert (status, run.summary["status"], run.summary["signal"]) == (75, "interrupted", "SIGTERM")
    assert "Traceback" not in printed
    assert list((run.directory / "checkpoints").glob(f"*{run.summary['iterations']}*.safetensors"))
