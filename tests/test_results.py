"""Figures and tables of results/ follow from the committed records to the byte."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def recipe() -> list[str]:
    """Return the commands of ``make results``, each on a line."""
    words = ["make", "--silent", "--dry-run", "results", f"BIN={Path(sys.executable).parent}"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    return [line for line in said.splitlines() if "results/" in line]


COMMANDS = recipe()
FAST = "runs=results/digits-curves "


def test_no_page_for_a_browser_is_committed():
    assert not list(RESULTS.rglob("*.html"))


def test_records_of_a_study_are_one_file():
    assert not list(RESULTS.rglob("provenance.json"))
    assert len(list(RESULTS.rglob("runs.jsonl"))) >= 8


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=() if FAST in line else pytest.mark.slow) for line in COMMANDS]
)
def test_what_is_made_again_is_the_same(command, tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for word in command.replace("'", "").split():
        _, found, path = word.rpartition("out=")
        if found:
            (tmp_path / path).unlink()
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    files = [str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*") if path.is_file()]
    same, *others = filecmp.cmpfiles(RESULTS, tmp_path / "results", files, shallow=False)
    assert others == [[], []]
    assert {*same} == {*files}
