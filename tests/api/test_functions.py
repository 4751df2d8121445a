"""``largebatch.train`` and its like: what they return is what the commands record and print."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import largebatch
from largebatch.cli import main as cli
from largebatch.training.loop import Loop


def test_a_run_from_python_is_the_run_of_the_command(tiny, trained, tmp_path, capfd):
    assert cli.run(["train", *tiny, f"run_dir={tmp_path / 'run'}"]) == 0
    capfd.readouterr()
    other = largebatch.Run(tmp_path / "run")
    mine, theirs = (load_file(run.directory / "model.safetensors") for run in (trained, other))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert trained.provenance["command"].startswith("largebatch train dataset=synthetic_small")
    assert trained.experiment_hash == other.experiment_hash
    assert trained.final_error == other.final_error


def test_a_run_that_is_done_is_returned_again(tiny, trained, capfd):
    again = largebatch.train(*tiny, run_dir=trained.directory, resume=True)
    assert (again.status, again.final_error) == ("done", trained.final_error)
    assert "done already" in capfd.readouterr().err
    with pytest.raises(largebatch.UserError, match="already holds a run"):
        largebatch.train(*tiny, run_dir=trained.directory)


def test_progress_can_be_switched_off(tiny, tmp_path, capfd):
    largebatch.train(*tiny, run_dir=tmp_path / "loud", iterations=1)
    assert "stopped: 1 iteration;" in capfd.readouterr().err
    assert largebatch.train(*tiny, run_dir=tmp_path / "quiet", iterations=1, progress=False).status == "stopped"
    assert capfd.readouterr() == ("", "")


def interrupting(monkeypatch, number):
    """Send this process a signal in the third iteration of the next run, which looks for it after the fourth."""
    log = Loop._log

    def logs(loop, rate, position):
        log(loop, rate, position)
        if loop.journey.iteration == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(Loop, "_log", logs)


def test_ctrl_c_writes_a_checkpoint_and_raises(tiny, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted after 4 iterations.* resume=True") as caught:
            largebatch.train(*tiny, run_dir=tmp_path / "run", progress=False)
    assert isinstance(caught.value, largebatch.Interrupted)
    assert (caught.value.run.status, caught.value.run.final_error) == ("interrupted", None)
    resumed = largebatch.train(*tiny, run_dir=tmp_path / "run", resume=True, progress=False)
    assert resumed.final_error == trained.final_error
    assert resumed.epochs(frame=False)[-1]["val_loss"] == trained.epochs(frame=False)[-1]["val_loss"]


def test_a_signal_that_ends_the_process_reaches_the_handler_that_was_there(tiny, tmp_path, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        interrupting(monkeypatch, signal.SIGTERM)
        with pytest.raises(largebatch.Interrupted):
            largebatch.train(*tiny, run_dir=tmp_path / "run", progress=False)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_in_this_process_is_not_ended_with_it(tiny, tmp_path):
    by_default = largebatch.train(*tiny, run_dir=tmp_path / "default", iterations=1, progress=False)
    assert by_default.config.launcher.timeout is None
    given = largebatch.train(*tiny, run_dir=tmp_path / "given", iterations=1, progress=False, launcher__timeout=60)
    assert given.config.launcher.timeout == 60


@pytest.mark.slow
def test_several_processes_train_to_the_same_weights(tiny, tmp_path):
    program = "import sys, largebatch\nif __name__ == '__main__': print(largebatch.train(*sys.argv[1:]).status)"
    (tmp_path / "program.py").write_text(program)
    for processes in (1, 2):
        words = [*tiny, "exact=true", f"processes={processes}", f"run_dir={tmp_path / str(processes)}"]
        line = [sys.executable, str(tmp_path / "program.py"), *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ})
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert all(one[name].equal(two[name]) for name in one)


def test_explain_prints_as_the_command_does(tiny, capsys):
    assert cli.run(["explain", *tiny]) == 0
    answer = largebatch.explain(*tiny)
    assert capsys.readouterr().out == f"{answer}\n" == f"{answer!r}\n"
    assert (answer["minibatch"], answer.facts["iterations"]) == (16, 8)
    assert len(largebatch.explain(*tiny, rates="full")["rates"]) == 8


def test_certify_prints_as_the_command_does(tiny, tmp_path):
    answer = largebatch.certify(*tiny, run_dir=tmp_path, certify__iterations=3, certify__processes=[1])
    assert answer.holds is True
    assert answer.facts["holds"] is True
    assert str(answer).startswith("certify: k = 2 workers of n = 8, resnet8 on synthetic, fp64 on cpu, 3 iterations\n")
    assert (answer.directory / "certificate.json").is_file()


@pytest.mark.slow
def test_probe_returns_the_run_and_the_answer(tiny, tmp_path):
    longer = [word for word in tiny if not word.startswith("epochs")]
    keys = {"probe__batches": 2, "probe__products": 3, "epochs": 3, "run_dir": tmp_path / "run", "progress": False}
    answer = largebatch.probe(*longer, schedule__milestones=[2], answer=True, **keys)
    assert answer.run.directory == tmp_path / "run"
    assert [one["epoch"] for one in answer["probes"]] == [0, 1, 2, 3]
    assert "answer  " in str(answer)
    again = largebatch.probe(run=answer.run, answer=True)
    assert again["answer"] == answer["answer"]
    with pytest.raises(largebatch.UserError, match="k= cannot be given"):
        largebatch.probe(run=answer.run, k=4)


def test_predict_prints_as_the_command_does(capsys):
    assert cli.run(["predict", "k=8,256", "gpus=8"]) == 0
    answer = largebatch.predict(k=[8, 256], gpus=8)
    assert capsys.readouterr().out == f"{answer}\n"
    assert [one["k"] for one in answer["predictions"]] == [8, 256]
    with pytest.raises(largebatch.UserError, match="met by no number of GPUs"):
        largebatch.predict(deadline="1s")
