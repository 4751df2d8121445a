"""Every command on a page is one that the program takes: it is run, or a comment above its block says why not.

Reading commands are run as they stand, on the committed records. Training is explained instead, or a sweep's batch
scripts are printed. What measures or computes for long is composed here, and run in the slow tests where a small run
is enough for it.
"""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from largebatch.cli.main import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^ *(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+ *)?```(?P<kind>[^\n]*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
SHELL = ("", "bash", "sh", "shell", "console")
LONG = ("bench", "certify", "eval", "probe", "quantize")  # Hydra composes them, and they compute


def blocks(kinds):
    """Return (page, line number, text) of every block of these kinds that is not marked."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block["kind"].strip() in kinds and not block["reason"]:
                found.append((page.name, text[: block.start("text")].count("\n") + 1, block["text"]))
    return found


def commands():
    """Return (page and words, words) of every command, each once."""
    found = {}
    for page, _, text in blocks(SHELL):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.setdefault(tuple(words), page)
    return [pytest.param(list(words), id=f"{page}: {' '.join(words)}"[:120]) for words, page in found.items()]


COMMANDS = commands()
DRAWN = ("plot", "report")  # figures take seconds


def computes(words):
    """Whether a small run on the digits, or the committed records, are enough to run a command as it stands."""
    if words[0] != "largebatch" or words[1] not in (*LONG, *DRAWN) or words[1] == "bench":
        return False
    if words[1] == "probe":  # a recorded run has its answer in a moment, a new one takes minutes
        return any(word.startswith("run=") for word in words)
    return words[1] in DRAWN or not any(word.startswith(("dataset=", "experiment=")) for word in words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with the committed records, a finished sweep, a recorded run DIR, and two of an ensemble."""
    here = tmp_path_factory.mktemp("pages")
    (here / "results").symlink_to(ROOT / "results")
    with contextlib.chdir(here):
        few = ["k=2", "n=16", "lr.base_minibatch=32", "epochs=1", "device=cpu", "threads=1"]
        assert run(["train", "-m", "seed=0,1", *few, "hydra.sweep.dir=runs/study"]) == 0
    (here / "ENSEMBLE").mkdir()
    for number, path in enumerate(sorted(here.glob("runs/study/*/summary.json"))):
        (here / "ENSEMBLE" / f"run{number}").symlink_to(path.parent)
    (here / "DIR").symlink_to(path.parent)
    return here


def cheap(words):
    """Return the words of a command, with training replaced by what says what it would do."""
    name, *rest = words
    if name != "train":
        return [name, *rest, "--cfg", "job"] if name in LONG else [name, *rest]
    if "launcher=slurm" in rest:
        kept = [word for word in map(shortened, rest) if not word.startswith("hydra.sweep.dir=")]  # stay in `place`
        return [name, *kept, *({"launcher.dry_run=true"} - {*rest})]
    return ["explain", *map(shortened, rest)]


def shortened(word):
    """Return a word with the first and the last of several values."""
    key, equals, text = word.partition("=")
    values = text.split(",")
    return f"{key}={values[0]},{values[-1]}" if equals and len(values) > 2 and "[" not in text else word


@pytest.mark.parametrize("words", [case for case in COMMANDS if case.values[0][1:2] not in (["plot"], ["report"])])
def test_a_command_is_taken(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if words[0] == "make":
        subprocess.run(["make", "-C", ROOT, "-n", *words[1:]], check=True, capture_output=True)
        return
    assert words[0] == "largebatch", f"{words[0]}: mark the block with <!-- not run: the reason -->"
    assert run(cheap(words[1:])) == 0
    printed = capsys.readouterr()
    assert printed.out or printed.err


@pytest.mark.slow
@pytest.mark.parametrize("words", [case for case in COMMANDS if computes(*case.values)])
def test_a_command_computes(words, place, monkeypatch):
    """A mistake on purpose is exit status 1."""
    monkeypatch.chdir(place)
    here = [] if words[1] in (*DRAWN, "probe") else ["device=cpu", "threads=1"]
    assert run([*words[1:], *here]) == ("pitfall=scale_loss" in words)


# The blocks of the other pages build on one another, and have tests of their own.
@pytest.mark.parametrize(("page", "line", "text"), [one for one in blocks(("python",)) if one[0] == "offloading.md"])
def test_an_example_in_python_runs(page, line, text, place, monkeypatch):
    monkeypatch.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, f"{page}:{line}", "exec"), {})


def test_blocks_are_found_with_their_reasons():
    text = "a\n<!-- not run: needs a GPU -->\n```bash\nx\n```\n\n- b\n\n  ```bash\n  y \\\n    z\n  ```\n"
    found = [(block["reason"], block["kind"], block["text"].split()) for block in BLOCK.finditer(text)]
    assert found == [("needs a GPU", "bash", ["x"]), (None, "bash", ["y", "\\", "z"])]


def test_there_are_commands_on_the_pages_of_users():
    names = {name for name, _, _ in blocks(SHELL)}
    assert {"README.md", "quickstart.md", "sweeps.md", "resume.md", "reports.md", "offloading.md"} <= names
