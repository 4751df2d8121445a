"""The command as a user types it: help, mistakes, configurations of one's own, and completion in a real bash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import BIN

from largebatch.cli.main import COMMANDS

# What bash does at the TAB key, without a terminal: a line of what it offers for each argument.
PRESS_TAB = """
eval "$(largebatch -sc install=bash)"
for line; do
  COMP_LINE=$line COMP_POINT=${#line} COMP_WORDS=($line)
  [[ $line == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  COMPREPLY=()
  hydra_bash_completion
  echo "${COMPREPLY[@]}"
done
"""


def press_tab(lines: list[str], directory: Path) -> list[list[str]]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", *lines],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_bare_command_lists_the_commands_with_a_line_each(largebatch, arguments):
    done = largebatch(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for name, command in COMMANDS.items():
        assert [line for line in done.stdout.splitlines() if line.split() == [name, *command.summary.split()]]


@pytest.mark.parametrize("arguments", [("--version",), ("train", "--version")])
def test_version(largebatch, arguments):
    done = largebatch(*arguments)
    assert (done.returncode, done.stdout) == (0, "largebatch 0.2.0\n")


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "largebatch", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "largebatch 0.2.0\n")


@pytest.mark.parametrize("command", ["train", "explain"])
def test_help_of_a_command_shows_examples_keys_and_groups(largebatch, command):
    done = largebatch(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"largebatch {command}" in done.stdout
    assert "warmup: constant, gradual, none" in done.stdout
    assert "  lr.base_minibatch=256              Samples in a step of the baseline.\n" in done.stdout
    assert "Exit status: 0 complete, 2 a mistake" in done.stdout


def test_help_that_is_read_in_part_alone_is_no_mistake(tmp_path):
    """As head -1 does it: the pipe is closed before there is anything in it."""
    process = subprocess.Popen(
        [BIN / "largebatch", "train", "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


def test_cfg_job_shows_the_composed_values_and_trains_nothing(largebatch, tmp_path):
    done = largebatch("train", "--cfg", "job", "k=16", "warmup=none")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("k: 16\n")
    assert "warmup:\n  name: none\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "'trian' is not a command. These are: train, "),
        (["trian"], "Did you mean 'train'?"),
        (["--verison"], "Did you mean '--version'?"),
        (["train", "epocs=3"], "'epocs' is not a key. Did you mean 'epochs'?"),
        (["train", "+epocs=3"], "'epocs' is not a key of this configuration. Did you mean 'epochs'?"),
        (["train", "modle=resnet50"], "'modle' is not a key. Did you mean 'model'?"),
        (["train", "lr.bse=1"], "'lr.bse' is not a key. Did you mean 'lr.base'?"),
        (["explain", "warmup=gradul"], "warmup=gradul is not known: it takes constant, gradual, none. Did you mean"),
        (
            ["explain", "experiment=imagenet_1"],
            "takes imagenet_… (31 of them), quickstart, study, study",
        ),
        (["explain", "experiment=imagenet_1"], "`--help experiment` lists all. Did you mean 'imagenet_1h'?"),
        (["train", "k"], "'k' cannot be read as key=value."),
        (["train", "lr.base=k=8"], "'lr.base=k=8' cannot be read as key=value. Put a value with = , [ or"),
        (["train", "k=eight"], "k=eight is of the wrong kind: it takes a whole number."),
        (["train", "run_dir=${where}"], "Interpolation key 'where' not found"),
        (["explain", "format=jsn"], "format=jsn is not known: it takes text, json. Did you mean 'json'?"),
        (["explain", "rates=full"], "add format=json."),
        (["train", "launcher.gpus=2"], "launcher.gpus is a key of launcher=slurm alone."),
        (["train", "launcher=slurm", "launcher.gpu=2"], "'launcher.gpu' is not a key. Did you mean 'launcher.gpus'?"),
        (["train", "launcher=slurm", "launcher.gpus=3"], "launcher.gpus=3 does not divide k=8"),
        (["-sc"], "-sc takes install=bash"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(largebatch, tmp_path, arguments, sentence):
    done = largebatch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.startswith("largebatch: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_ones_own(largebatch, tmp_path):
    own = tmp_path / "mine" / "warmup"
    own.mkdir(parents=True)
    (own / "short.yaml").write_text("name: gradual\nepochs: 2\n")
    done = largebatch("explain", "--config-dir", "mine", "warmup=short", "k=16", "format=json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["warmup"], facts["warmup_epochs"], facts["minibatch"]) == ("gradual", 2, 512)


def test_explain_submits_nothing(largebatch, tmp_path):
    done = largebatch("explain", "launcher=slurm", "format=json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["minibatch"] == 256
    assert list(tmp_path.iterdir()) == []


def test_json_is_all_there_is_on_stdout(largebatch, tmp_path):
    done = largebatch("explain", "k=16", "format=json", "rates=full")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["reference_rate"] == 0.2
    assert len(facts["rates"]) == facts["iterations"] == 90 * facts["iterations_per_epoch"]
    assert list(tmp_path.iterdir()) == []


def test_the_record_holds_the_command_as_it_was_typed(largebatch, tmp_path):
    done = largebatch("train", "iterations=1", "run_dir=run", "lr.base=0.05", "threads=1")
    assert done.returncode == 0, done.stderr
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["command"] == "largebatch train iterations=1 run_dir=run lr.base=0.05 threads=1"


def test_help_and_submitting_need_no_torch(largebatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    submitted = ("train", "launcher=slurm", "launcher.dry_run=true", "dataset=imagenet")
    for arguments in (
        (),
        ("--version",),
        ("train", "--help"),
        ("explain", "--cfg", "job"),
        ("train", "epocs=3"),
        submitted,
    ):
        done = largebatch(*arguments, PYTHONPATH=str(tmp_path))
        assert "torch was imported" not in done.stderr
    assert "torch was imported" in largebatch("explain", PYTHONPATH=str(tmp_path)).stderr


def test_completion_in_bash(tmp_path):
    expected = {
        "largebatch tr": ["train"],
        "largebatch train epo": ["epochs="],
        "largebatch  explain  form": ["format="],
        "largebatch train lr.": ["lr.base=", "lr.base_minibatch=", "lr.scaling="],
        "largebatch train warmup=": ["warmup=constant", "warmup=gradual", "warmup=none"],
        "largebatch train -m k=1,8 model=resnet5": ["model=resnet50", "model=resnet56"],
        "largebatch train k=a=b mod": [],
        "largebatch nonsense k": [],
    }
    *offers, commands, keys = press_tab([*expected, "largebatch ", "largebatch train "], tmp_path)
    assert dict(zip(expected, offers, strict=True)) == expected
    assert set(commands) == set(COMMANDS)
    assert {"k=", "n=", "seed=", "run_dir=", "model=", "experiment=", "lr."} <= set(keys)
