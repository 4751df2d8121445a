"""Mistakes of a first day, each one sentence: what was given, what is allowed, what to do."""

import io
import subprocess
import sys
import threading

import pytest

from largebatch.base import errors, progress
from largebatch.base.errors import UserError, installation
from largebatch.cli.main import run
from largebatch.config.build import build
from largebatch.config.groups import CheckpointConfig
from largebatch.config.launchers import SlurmConfig
from largebatch.training.loop import _closing_words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resume"], "'--resume' is not a flag of train: .* Keys are written without hyphens: resume=true\\."),
        (["-k", "8"], "'-k' is not a flag .* Keys are written without hyphens: k=8\\."),
        (["--epochs=3"], "Keys are written without hyphens: epochs=3\\."),
        (["--epochs", "k=8"], "Keys are written without hyphens: epochs=…\\."),
        (["experiment=study32", "experiment=study32"], "experiment was given twice"),
        (["launcher=slurm", "launcher.time=banana"], "launcher.time=banana is no time .* such as 04:00:00"),
        (["launcher=slurm", "launcher.mem=64"], "launcher.mem=64 is no memory: .* would be megabytes: 64G\\?"),
        (["launcher=slurm", "launcher.mem=much"], "launcher.mem=much is no memory: it takes .* such as 64G\\."),
        (
            ["launcher=slurm", "launcher.setup={a: 1}"],
            "launcher.setup takes a list, such as launcher.setup=\\[a,b\\]\\.",
        ),
    ],
)
def test_a_mistake_in_the_words_names_the_right_ones(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(["train", *words, *(["launcher.dry_run=true"] if "launcher=slurm" in words else [])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("time", ["30", "04:00:00", "90:00", "2-00", "2-12:30", "1-00:00:00", "UNLIMITED"])
@pytest.mark.parametrize("mem", ["64G", "500m", "0", "1TB"])
def test_what_slurm_takes_is_taken(compose, time, mem):
    launcher = compose("launcher=slurm", f"launcher.time='{time}'", f"launcher.mem='{mem}'").launcher
    assert (launcher.time, launcher.mem) == (time, mem)


def test_yaml_of_the_user_s_that_is_broken_is_named_with_its_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nk: [1\nn: 2\n")
    with pytest.raises(UserError, match=f"{file} is no YAML, at line 3, column 2: expected ',' or '\\]'"):
        run(["explain", "--config-dir", str(tmp_path), "experiment=mine"])


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(UserError, match=r"'checkpoint\.every', 'checkpoint\.keep' are missing from the configuration"):
        build(CheckpointConfig, {"minutes": 1}, "checkpoint.")
    with pytest.raises(UserError, match="'keep' is missing from the configuration"):
        build(CheckpointConfig, {"minutes": 1, "every": None})


def test_a_key_of_words_takes_a_list_of_words(compose):
    values = {**compose("launcher=slurm").to_mapping()["launcher"], "setup": 3}
    with pytest.raises(UserError, match=r"launcher\.setup=3 is of the wrong kind: it takes a list of words"):
        build(SlurmConfig, values, "launcher.")


def test_pytorch_that_cannot_be_imported_is_a_sentence(tmp_path):
    reason = "libcudart.so.13: cannot open shared object file"
    (tmp_path / "torch.py").write_text(f"raise ImportError({reason!r}, name='torch')")
    program = "from largebatch.cli.main import main; import sys; sys.argv = ['largebatch', 'explain']; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"PyTorch cannot be imported here: {reason}. Install it again: " in done.stderr


def test_packages_are_installed_where_this_program_runs(monkeypatch):
    monkeypatch.setattr(errors.sys, "executable", "/my envs/bin/python")
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    assert installation("onnx", "pyarrow") == "uv pip install --python '/my envs/bin/python' onnx pyarrow"
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: name)
    assert installation("onnx") == "'/my envs/bin/python' -m pip install onnx"


def test_what_takes_long_is_said_on_a_terminal_alone(monkeypatch):
    said = threading.Event()

    class Stream(io.StringIO):
        def __init__(self, terminal):
            super().__init__()
            self.terminal = terminal

        def isatty(self):
            return self.terminal

        def flush(self):
            said.set()

    for terminal, printed in ((True, "loading …\n"), (False, "")):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.said_after(0, "loading …"):
            assert not terminal or said.wait(60)
        assert stream.getvalue() == printed
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.said_after(3600, "loading …"):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("status", "count", "words"),
    [
        ("done", 10, "done: 10 iterations, error 2.50 % (the last epoch); record in runs/x; largebatch plot curves "),
        ("stopped", 1, "stopped: 1 iteration, error 2.50 % (the last epoch); record in runs/x; resume=true goes on"),
        ("diverged", 3, "diverged: 3 iterations, error 2.50 % (the last epoch); record in runs/x"),
    ],
)
def test_the_last_line_says_what_to_do_next(tmp_path, status, count, words):
    summary = {"status": status, "iterations": count, "epochs": 1, "final_error": 2.5}
    line = _closing_words(summary, "runs/x")
    assert line == (f"{words}runs=runs/x shows it" if status == "done" else words)


def test_a_run_that_is_done_is_not_to_be_resumed(digits_runs):
    words = ["k=2", "n=16", "lr.base_minibatch=32", "warmup=none", "threads=1", "device=cpu", "seed=0", "epochs=1"]
    with pytest.raises(UserError, match=r"already holds a run \(status done\): use another run_dir\."):
        run(["train", *words, f"run_dir={digits_runs / 'seed0'}"])
    with pytest.raises(UserError, match=r"\(status stopped\): use resume=true to continue it, or another run_dir\."):
        run(["train", *words[:-1], "epochs=2", f"run_dir={digits_runs / 'stopped'}"])
