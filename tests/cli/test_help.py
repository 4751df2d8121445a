"""``--help`` of the commands that Hydra composes: every key once, with what its dataclass says of it."""

import re

import pytest

from largebatch.base.errors import UserError
from largebatch.cli.command import Command
from largebatch.cli.main import COMMANDS, run
from largebatch.cli.reference import OTHERS, OWN, described, keys, walk
from largebatch.config.launchers import LAUNCHERS
from largebatch.config.run import Config

COMPOSED = sorted(name for name, command in COMMANDS.items() if isinstance(command, Command))


@pytest.mark.parametrize("name", COMPOSED)
def test_every_key_is_described_and_shown_once(name, capsys):
    assert run([name, "--help"]) == 0
    shown = re.findall(r"^  ([a-z][\w.]*)=", capsys.readouterr().out, re.MULTILINE)
    groups = {key.rpartition(".")[0] for key in keys(name)}
    others = {key for key in OTHERS if key not in shown and key in ("experiment", "format", "rates")}
    assert {*shown} == {*keys(name)} - groups - others
    assert len(shown) == len({*shown})
    for key in shown:
        assert keys(name)[key][1].endswith("."), key


@pytest.mark.parametrize("cls", [Config, *LAUNCHERS.values(), *(cls for _, cls in OWN.values())])
def test_a_docstring_describes_no_key_that_is_not_there(cls):
    assert {*described(cls)} <= {*walk(cls)}


def test_a_description_takes_several_lines_and_is_inherited():
    assert described(LAUNCHERS["slurm"])["timeout"].startswith("Seconds without a batch in any process, after which")
    assert described(Config)["run_dir"] == (
        "Directory of the run's record. Null: runs/<dataset>-<model>/<k, n, warmup, seed, hash>."
    )


def test_families_of_experiments_and_each_of_them(capsys):
    assert run(["train", "--help"]) == 0
    (line,) = re.findall(r"^experiment: .*$", capsys.readouterr().out, re.MULTILINE)
    assert "imagenet_… (31 of them), quickstart, " in line
    assert run(["explain", "--help", "experiment"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^experiment=imagenet_1h +The paper's result: kn = 8192", out, re.MULTILINE)
    assert out.count("experiment=") == len(out.splitlines())
    with pytest.raises(UserError, match=r"^'experimnt' is not a group: .* Did you mean 'experiment'\?$"):
        run(["train", "experimnt", "--help"])
    assert run(["bench", "step", "--help"]) == 0
