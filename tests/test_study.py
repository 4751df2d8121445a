"""The study: its experiments are what its plan says, and what its page says is what its records say."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "results" / "study"
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "experiment").glob("study_*.yaml")}
SCRIPTS = ROOT / "scripts" / "study"


@pytest.fixture(scope="module")
def study():
    """Return the modules of the study's scripts, which import one another by their own names."""
    import importlib

    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("plan", "evidence", "write", "part", "run")
        return dict(zip(names, map(importlib.import_module, names), strict=True))
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def evidence(study):
    return study["evidence"].Evidence.of(STUDY / "records")


def settings_of(config) -> dict[str, object]:
    return {
        "k": config.k,
        "n": config.n,
        "warmup.name": config.warmup.name,
        "lr.base": config.lr.base,
        "lr.scaling": config.lr.scaling,
        "model.init": config.model.init,
        "model.zero_gamma": config.model.zero_gamma,
        "optimizer.name": config.optimizer.name,
    }


def test_every_experiment_of_the_plan_has_its_file(study):
    assert set(FILES) == set(study["plan"].ARMS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_experiment_is_what_the_plan_says(study, compose, name):
    plan = study["plan"]
    config = compose(f"experiment={name}")
    assert settings_of(config) == {**plan.RECIPE, **plan.ARMS[name].settings}
    assert (config.epochs, config.dataset.train_images) == (plan.FULL.epochs, plan.FULL.train_images)
    assert config.dataset.val_images == plan.FULL.val_images
    assert config.milestones == pytest.approx((10, 20, 30 * 8 / 9))
    assert config.warmup_epochs == pytest.approx(30 * 5 / 90) or config.warmup.name == "none"
    head = FILES[name].partition("defaults:")[0]
    assert plan.ARMS[name].what in head
    assert f"largebatch train experiment={name} dataset.root=" in head


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_error_in_an_experiments_head_is_that_of_its_records(evidence, name):
    assert f"Found: {evidence.error(name)} %." in FILES[name]


def test_no_run_of_the_study_is_left_out(study, evidence):
    plan = study["plan"]
    assert set(evidence.groups) == set(plan.ARMS)
    for name, group in evidence.groups.items():
        assert [run.seed for run in group.runs] == plan.FULL.seeds_of(name)
        assert not group.unfinished, name
        assert not group.duplicates, name


def test_the_page_says_what_the_records_say(study, evidence):
    assert (STUDY / "README.md").read_text(encoding="utf-8") == study["write"].render(evidence)


def test_what_the_page_says_in_words_is_borne_out(study, evidence):
    assert [said for said, borne_out in study["evidence"].conclusions(evidence).items() if not borne_out] == []


def test_the_table_says_what_the_records_say(study, monkeypatch):
    from largebatch.reports.tables import table

    monkeypatch.chdir(ROOT)  # its notes name records from here
    evidence = study["evidence"].Evidence.of(STUDY.relative_to(ROOT) / "records")
    everything = evidence.selection(evidence.groups)
    said = table(everything, study["plan"].MARGIN, "markdown", None) + "\n"
    assert (STUDY / "table.md").read_text(encoding="utf-8") == said


def test_the_readme_says_what_the_records_say(evidence):
    opening = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    said = re.findall(r"\d+\.\d\d ± \d+\.\d\d", opening)
    assert said == [evidence.error(name) for name in ("study_64", "study_256", "study_1k", "study_1k_none")]


def test_published_errors_are_those_of_the_row_that_is_named(study):
    theirs = study["evidence"].theirs
    assert theirs("table1", 8192, "no warmup") == "24.84 ± 0.37"
    assert theirs("table2a", 8192, "η = 0.1 · 32") == "23.74 ± 0.09"
    assert theirs("table2a", 8192, "η = 0.1") == "41.67 ± 0.10"
    assert theirs("table2b", 256, "γ = 1") == "23.84 ± 0.18"
    assert (theirs("figure1", 64), theirs("figure1", 8192)) == ("–", "23.74 ± 0.09")
    with pytest.raises(ValueError, match="not enough values"):
        theirs("table2a", 8192, "0.1")


def test_a_record_of_another_experiment_is_refused(study):
    with pytest.raises(ValueError, match="no experiment of the study"):
        study["evidence"].Evidence.of(ROOT / "results" / "digits-curves")


def test_the_part_of_the_set_is_its_first_images(study, tmp_path, monkeypatch):
    import torch

    from largebatch.data.sets import ImageSet, read_idx

    part = study["part"]
    whole = [ImageSet(torch.randint(0, 256, (n, 1, 28, 28)).byte(), torch.arange(n) % 10) for n in (60, 20)]
    monkeypatch.setattr(part, "load", lambda config: whole)
    part.take_first(tmp_path, 12, 5)
    for name, split, count in (("train", whole[0], 12), ("t10k", whole[1], 5)):
        images, labels = (tmp_path / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        assert torch.equal(read_idx(images)[:, None], split.images[:count])
        assert torch.equal(read_idx(labels).long(), split.labels[:count])
    assert gzip.decompress((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())[:8] == bytes([0, 0, 8, 1, 0, 0, 0, 5])
    before = (tmp_path / "train-images-idx3-ubyte.gz").stat().st_mtime_ns
    part.take_first(tmp_path, 12, 5)
    assert (tmp_path / "train-images-idx3-ubyte.gz").stat().st_mtime_ns == before


def test_what_is_asked_for_comes_before_the_defaults(study):
    words = study["run"].words_for(study["plan"].QUICK, Path("data"), ["launcher.jobs=7", "device=cuda"])
    assert (words["launcher.jobs"], words["device"], words["threads"], words["epochs"]) == ("7", "cuda", "1", "16")


def test_a_word_that_is_no_override_is_a_sentence():
    done = subprocess.run([sys.executable, SCRIPTS / "run.py", "cuda"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "study: 'cuda' is not key=value: further words are overrides for every run.\n"


@pytest.mark.acceptance
def test_the_quick_study_finds_what_the_whole_one_found(study, evidence, tmp_path):
    words = [sys.executable, SCRIPTS / "run.py", "--quick", "--directory", tmp_path / "quick"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    claims, plan = study["evidence"].claims, study["plan"]
    found = claims(study["evidence"].Evidence.of(tmp_path / "quick"), plan.QUICK.margin)
    assert found == claims(evidence, plan.FULL.margin)
    assert all(found.values())
    assert [line for line in done.stdout.splitlines() if line.startswith("holds: ")] == [f"holds: {c}" for c in found]
