"""One grammar for all commands: the order of words, lists, paths, booleans, a key given twice."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.base.files import at_home
from largebatch.cli.arguments import for_hydra, paths, pieces
from largebatch.cli.command import Command
from largebatch.cli.commands.compact import COMPACT
from largebatch.cli.commands.plot import PLOT
from largebatch.cli.commands.report import REPORT
from largebatch.cli.commands.table import TABLE
from largebatch.cli.compose import compose, kinds
from largebatch.cli.main import COMMANDS, run
from largebatch.config.build import build
from largebatch.config.run import Config

COMPOSED = sorted(name for name, command in COMMANDS.items() if isinstance(command, Command))
PLAIN = {
    "table": ["table"],
    "report": ["report"],
    "compact": ["compact"],
    "plot": ["plot", "curves"],
    "predict": ["predict"],
    "data": ["data", "verify"],
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Make a home directory, and an empty one to work in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["largebatch"])
    return tmp_path / "home"


@pytest.fixture
def composed():
    """Return a function from a command line to the values that the command is given, one mapping for each arm."""

    def values(name: str, *arguments: str) -> list[dict]:
        found = compose(name, list(arguments))
        return [arm.values for arm in found.arms] if found.values is None else [found.values]

    return values


@pytest.mark.parametrize("name", COMPOSED)
def test_flags_stand_anywhere(composed, name):
    mine = Path("mine") / "warmup"
    mine.mkdir(parents=True)
    (mine / "short.yaml").write_text("name: gradual\nepochs: 1\n")
    (one,) = composed(name, "k=2", "--config-dir", "mine", "warmup=short")
    assert (one["k"], one["warmup"]) == (2, {"name": "gradual", "epochs": 1})
    arms = composed(name, "k=2", "-m", "n=16,32", "hydra.sweep.dir=swept")
    assert [(arm["k"], arm["n"]) for arm in arms] == [(2, 16), (2, 32)]


@pytest.fixture
def printed(capsys):
    """Return a function from a command line to what it prints; Hydra itself ends some of them."""

    def run_to_the_end(*arguments: str) -> str:
        with contextlib.suppress(SystemExit):
            assert run([*arguments]) == 0
        return capsys.readouterr().out

    return run_to_the_end


@pytest.mark.parametrize(
    "words", [*([name, "k=3", "--cfg", "job", "seed=5"] for name in COMPOSED), ["train", "k=3", "seed=5", "--cfg=job"]]
)
def test_a_configuration_is_shown_wherever_its_flag_stands(printed, words):
    assert {"k: 3", "seed: 5"} <= {*printed(*words).splitlines()}


@pytest.mark.parametrize("words", [*([name] for name in COMPOSED), *PLAIN.values()])
def test_help_stands_anywhere(printed, words):
    known = "k=2" if words[0] in COMPOSED else {"predict": "k=2", "data": "root=x"}.get(words[0], "runs=x")
    assert f"largebatch {words[0]}" in printed(*words, "--help", known)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_flag_that_is_none(name):
    with pytest.raises(UserError) as error:
        run([name, "--epochs=3"])
    assert str(error.value) == (
        f"'--epochs=3' is not a flag of {name}: it takes -m, --config-dir DIR, --cfg job, --help. "
        "Keys are written without hyphens: epochs=3."
    )


@pytest.mark.parametrize("words", [*([name] for name in COMPOSED), *PLAIN.values()])
def test_a_key_given_twice_is_refused(words):
    key = {"table": "margin", "report": "margin", "compact": "out", "plot": "margin", "data": "processes"}
    name = key.get(words[0], "n")
    extra = ["scaling"] if words[0] == "plot" else words[1:]
    with pytest.raises(UserError, match=rf"^{name} was given twice, as {name}=1 and as {name}=2: give it once\.$"):
        run([words[0], *extra, f"{name}=1", f"{name}=2"])


@pytest.mark.parametrize("name", COMPOSED)
def test_an_experiment_given_twice_is_refused(name):
    with pytest.raises(UserError, match=r"^experiment was given twice, as experiment=study and as experiment=quick"):
        run([name, "experiment=study", "experiment=quickstart"])


def test_an_alias_is_the_same_key():
    with pytest.raises(UserError, match=r"^dataset\.root was given twice, as dataset\.root=a and as dataset\.root=b"):
        run(["data", "verify", "dataset.root=a", "root=b"])
    for key in ("root", "dataset.root"):
        with pytest.raises(UserError, match="no images in nowhere"):
            run(["data", f"{key}=nowhere", "verify"])


@pytest.mark.parametrize("text", ["8,64", "[8,64]", "[8, 64]"])
def test_a_list_has_two_forms(composed, capsys, text):
    (one,) = composed("bench", f"bench.k={text}")
    assert one["bench"]["k"] == [8, 64]
    assert composed("certify", f"certify.processes={text}")[0]["certify"]["processes"] == [8, 64]
    assert composed("train", f"schedule.milestones={text}")[0]["schedule"]["milestones"] == [8, 64]
    assert run(["predict", f"k={text}", "gpus=8"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:6]] == ["8", "64"]


def test_a_list_of_one_needs_no_brackets_and_a_sweep_of_lists_stays_one(composed):
    assert composed("bench", "bench.k=8")[0]["bench"]["k"] == [8]
    assert composed("bench", "bench.k=8", "bench.k=64")[0]["bench"]["k"] == [8, 64]
    arms = composed("train", "-m", "schedule.milestones=[3,6],[4,8]", "hydra.sweep.dir=swept")
    assert [arm["schedule"]["milestones"] for arm in arms] == [[3, 6], [4, 8]]
    options = "launcher.options=[\"--constraint='a,b'\",--exclusive]"
    assert composed("train", "launcher=slurm", options)[0]["launcher"]["options"] == [
        "--constraint='a,b'",
        "--exclusive",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        *(
            ([name, "k=8,64"], "k=8,64 is several values, and k takes one. Add -m to run them one after another.")
            for name in COMPOSED
        ),
        (["train", "run_dir=a,b"], "run_dir=a,b is several values, and run_dir takes one. Add -m to run them …"),
        (["predict", "n=8,32"], "n=8,32 is several values, and n takes one."),
        (["plot", "curves", "x=epochs,images"], "x=epochs,images is several values, and x takes one."),
        (["table", "runs=a", "margin=1,2"], "margin=1,2 is several values, and margin takes one."),
    ],
)
def test_several_values_where_one_is_taken(words, sentence):
    with pytest.raises(UserError) as error:
        run(words)
    assert str(error.value).startswith(sentence.partition("…")[0])


RUNS = [["runs=a,b/*"], ["runs=[a,b/*]"], ["runs=a", "runs=b/*"]]


@pytest.mark.parametrize("words", RUNS)
@pytest.mark.parametrize("name", ["eval", "probe"])
def test_runs_of_composed_commands(composed, name, words):
    assert composed(name, *words)[0]["runs"] == ["a", "b/*"]


@pytest.mark.parametrize("words", RUNS)
@pytest.mark.parametrize("command", [TABLE, PLOT, REPORT, COMPACT])
def test_runs_of_commands_that_read_records(monkeypatch, command, words):
    seen = []

    def select(patterns, *_):
        seen.append(patterns)
        raise UserError("enough")

    monkeypatch.setattr("largebatch.cli.selecting.select", select)
    monkeypatch.setattr("largebatch.reports.selection.select", select)
    with pytest.raises(UserError, match=r"^enough$"):
        command.run(
            [*(["curves"] if command is PLOT else []), *words, "out=kept"][: None if command is COMPACT else -1]
        )
    assert seen == [["a", "b/*"]]


def test_a_path_that_exists_is_one_whatever_it_holds(composed):
    Path("a,b").mkdir()
    assert paths("a,b") == ["a,b"]
    assert composed("eval", "runs=a,b")[0]["runs"] == ["a,b"]
    assert composed("train", "run_dir=a,b")[0]["run_dir"] == "a,b"


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_booleans_in_any_case(composed, capsys, text):
    assert composed("train", f"resume={text}")[0]["resume"] is True
    assert run(["plot", "throughput", f"paper={text}", "out=figure.svg"]) == 0
    assert Path("figure.svg").is_file()


@pytest.mark.parametrize("text", ["~/x", "'~/x'"])
def test_a_tilde_is_the_home_directory(composed, home, text):
    there = str(home / "x")
    assert composed("train", f"run_dir={text}")[0]["run_dir"] == there
    assert composed("train", f"dataset.root={text}")[0]["dataset"]["root"] == there
    assert composed("bench", f"bench.files.root={text}")[0]["bench"]["files"]["root"] == there
    for key in ("run", "state_file", "weights"):
        assert composed("eval", f"{key}={text}")[0][key] == there
    assert composed("eval", f"runs={text},b")[0]["runs"] == [there, "b"]
    assert composed("quantize", f"out={text}")[0]["out"] == there
    arms = composed("train", "-m", f"run_dir={text},~/y", f"hydra.sweep.dir={text}")
    assert [arm["run_dir"] for arm in arms] == [there, str(home / "y")]
    assert run(["plot", "throughput", "paper=true", f"out={text}.svg".replace("x'.svg", "x.svg'")]) == 0
    assert (home / "x.svg").is_file()
    assert not list(Path().iterdir())  # above all no directory of the name ~


def test_a_tilde_in_a_file_of_ones_own_is_the_home_directory(composed, home):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/own.yaml").write_text("# @package _global_\nrun_dir: ~/kept\ndataset:\n  root: ~/data\n")
    (values,) = composed("train", "--config-dir", "mine", "experiment=own")
    config = build(Config, values)
    assert (config.run_dir, config.dataset.root) == (str(home / "kept"), str(home / "data"))


def test_a_home_of_nobody():
    with pytest.raises(UserError, match=r"^~nobody-of-that-name/x names the home of a user who does not exist"):
        at_home("~nobody-of-that-name/x")


def test_a_path_needs_no_quotes(composed):
    assert composed("train", "run_dir=runs/k=8 (new)[1]")[0]["run_dir"] == "runs/k=8 (new)[1]"
    assert composed("train", "run_dir='runs/p${k}'", "k=4")[0]["run_dir"] == "runs/p4"
    assert composed("eval", "state_file=it's")[0]["state_file"] == "it's"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("[a, b]", ["a", "b"]),
        ("a", ["a"]),
        ("", [""]),
        ("a,", ["a", ""]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("runs/k*[0-9],b", ["runs/k*[0-9]", "b"]),
    ],
)
def test_pieces(text, parts):
    assert pieces(text) == parts


def test_words_of_hydra_that_are_left_alone():
    words = ["k=range(1,4)", "~probe", "+x=1", "model=resnet8", "run=null", "lr={base:1}"]
    assert for_hydra("eval", ["-m", *words], kinds()) == ["-m", *words]


def test_the_package_is_light_and_has_its_names():
    program = (
        "import sys, largebatch\n"
        "assert not {'torch', 'numpy', 'hydra', 'largebatch.config'} & {*sys.modules}\n"
        "assert largebatch.__version__ and largebatch.Config.__name__ == 'Config'\n"
        "assert 'torch' not in sys.modules\n"
        "assert callable(largebatch.offloading.offload) and callable(largebatch.offload)\n"
        "assert {'offload', '__version__'} <= {*dir(largebatch)} and not hasattr(largebatch, 'nonsense')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
