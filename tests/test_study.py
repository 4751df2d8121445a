"""The study: its records are those of its experiments, and what its pages say is what the records say."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from largebatch.reports.paper import TABLES, published
from largebatch.reports.rows import make_rows
from largebatch.reports.selection import Selection, select
from largebatch.reports.statistics import BETTER, EQUIVALENT, WORSE, compare
from largebatch.reports.tables import NONE, difference, spread, verdict

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "results" / "study"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "experiment").glob("study_*.yaml")}
MARGIN = 1.0
FIVE_SEEDS = ("study_64", "study_128", "study_256", "study_512")


@pytest.fixture(scope="module")
def groups(compose):
    """Return the runs of every experiment, by its name."""
    selection = select([str(STUDY / "records")], "none")
    assert not selection.corrupt
    names = {compose(f"experiment={name}").experiment_hash("fp32"): name for name in FILES}
    return {names[group.runs[0].experiment_hash]: group for group in selection.groups}


@pytest.fixture(scope="module")
def row_of(groups):
    """Return a function from two experiments to the first one's row in a table that compares it with the other."""

    def row(name, other):
        pair = dict.fromkeys((groups[other], groups[name]))
        return make_rows(Selection(tuple(pair), groups[other], (), ()), MARGIN)[-1]

    return row


def test_every_experiment_has_its_runs_and_none_is_left_out(groups):
    assert set(groups) == set(FILES)
    for name, group in groups.items():
        assert [run.seed for run in group.runs] == list(range(5 if name in FIVE_SEEDS else 3)), name
        assert not (*group.unfinished, *group.duplicates), name


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_head_of_an_experiment_says_what_was_found(row_of, name):
    assert f"Found: {spread(row_of(name, name).error)} %." in FILES[name]
    assert f"largebatch train experiment={name}\n" in FILES[name]


def test_every_number_of_the_page_is_one_of_the_records(row_of):
    rows = [row_of(*pair) for pair in itertools.product(FILES, FILES)]
    theirs = {f"{row.error:.2f} ± {row.std:.2f}" for table in TABLES for row in published(table).rows if row.error}
    said = {*re.findall(r"\d+\.\d\d ± \d+\.\d\d", PAGE)}
    assert said <= {spread(row.error) for row in rows} | theirs
    assert len(said) > 30
    differences = {*re.findall(r"[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", PAGE)}
    assert differences <= {difference(row) for row in rows}
    judged = {*re.findall(r"\| ([+-][\d.]+ \[[^]]+\]) \| ([^|]+) \|", PAGE)}
    assert judged <= {(difference(row), verdict(row)) for row in rows}
    assert len(judged) > 25


def test_the_table_of_figure_1(row_of, groups):
    for kn in (2**power for power in range(6, 14)):
        name = f"study_{kn // 1024}k" if kn >= 1024 else f"study_{kn}"
        group = groups[name]
        (line,) = re.findall(rf"^\| {kn} \| .*$", PAGE, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        iterations = group.runs[0].summary["scheduled_iterations"]
        assert cells[:5] == [
            *(str(kn), str(group.k), f"{group.reference_rate:g}", f"{iterations:,}"),
            spread(row_of(name, name).error),
        ]
        for place, other in ((5, "study_64"), (7, "study_256")):
            row = row_of(name, other)
            assert cells[place : place + 2] == ([NONE, NONE] if name == other else [difference(row), verdict(row)])


def test_what_the_page_says_in_words_is_borne_out(row_of, groups):
    def judged(name, other="study_64"):
        return row_of(name, other).comparison.verdict

    def mean(name):
        return fmean(groups[name].errors)

    def at(name, column, epoch):
        return fmean(run.epochs[column][epoch] for run in groups[name].finished)

    assert {judged("study_128"), judged("study_256"), judged("study_512", "study_256")} == {EQUIVALENT}
    assert {judged("study_512"), judged("study_1k"), judged("study_1k_none", "study_1k")} == {WORSE}
    assert 20 < mean("study_2k") < 60 < mean("study_4k")
    assert mean("study_1k") < min(mean("study_1k_constant"), mean("study_1k_none"))
    assert judged("study_512_none", "study_512") == EQUIVALENT
    assert mean("study_256") < min(mean("study_256_half"), mean("study_256_double"))
    assert {judged(f"study_1k_{rate}", "study_1k") for rate in ("sqrt", "unscaled")} == {BETTER}
    assert (judged("study_4k_lars", "study_4k"), judged("study_4k_lars")) == (BETTER, WORSE)
    assert at("study_1k", "val_error", 2) > 2 * at("study_1k", "val_error_recomputed", 2)
    ends = [at(name, "train_error", -1) for name in ("study_64", "study_256", "study_512", "study_1k")]
    assert ends == sorted(ends)
    for name, column, epoch in (
        *(("study_1k", column, place) for column in ("val_error", "val_error_recomputed") for place in (2, -1)),
        *((name, "train_error", -1) for name in ("study_64", "study_256", "study_512")),
    ):
        assert f"{at(name, column, epoch):.1f}" in PAGE


def test_the_readme_says_what_the_records_say(row_of):
    said = re.findall(r"\d+\.\d\d ± \d+\.\d\d", (ROOT / "README.md").read_text(encoding="utf-8"))
    names = ("study_64", "study_256", "study_1k", "study_1k_none")
    assert said == [spread(row_of(name, name).error) for name in names]


@pytest.mark.acceptance
def test_the_quick_study_finds_what_the_whole_one_found(tmp_path):
    for name in ("Makefile", "conf", "pyproject.toml", "uv.lock"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    words = ["make", "--silent", "--dry-run", "study", "quick=true", f"BIN={Path(sys.executable).parent}"]
    recipe = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    script = recipe[recipe.index(str(Path(sys.executable).parent)) :]
    subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=True)
    found = {
        (group.k, group.warmup): group.errors for group in select([str(tmp_path / "runs/study-quick")], "none").groups
    }
    assert compare(found[8, "none"], found[2, "none"], 3.0, False).verdict == EQUIVALENT
    assert compare(found[32, "none"], found[32, "gradual"], 3.0, False).verdict == WORSE
