"""The study over 32 times its baseline: its experiments, its order and its choices are those of its plan."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from largebatch.records.packed import unpack

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "study32.py"
RECORDS = ROOT / "results" / "study32"
RATE, HELD = 0.0125, 32


@pytest.fixture(scope="module")
def study():
    specification = importlib.util.spec_from_file_location("study32", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["study32"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["study32"]


def error_of(name: str) -> float:
    """Make up a final error: 0.0125 is the best rate, and k = 32 the largest that holds."""
    if name.startswith("rate"):
        return {"0.0125": 8.0}.get(name.removeprefix("rate").partition("-")[0], 9.0) + 0.1 * (name[-1] == "1")
    return 9.0 if int(name.split("-k")[1].partition("-")[0]) <= HELD else 12.0


@pytest.fixture(scope="module")
def everything(study):
    """All stages, as they come to be known."""
    found, seen = {}, study.known({})
    while seen[-1][-1].name not in found:
        found |= {planned.name: SimpleNamespace(final_error=error_of(planned.name)) for planned in seen[-1]}
        seen = study.known(found)
    return seen


def runs_of(stages, part: str) -> list:
    return [planned for stage in stages for planned in stage if planned.name.startswith(part)]


def test_the_headline_comes_first_and_nothing_twice(everything):
    names = [planned.name for stage in everything for planned in stage]
    assert len(names) == len({*names}) == 92
    assert [len(stage) for stage in everything[:5]] == [10, 10, 10, 10, 4]
    assert {planned.name for planned in everything[4]} == {f"figure1-k{k}-s{s}" for k in (1, HELD) for s in (13, 14)}
    assert names[10:20] == [f"figure1-k{2**power}-s10" for power in range(10)]


def test_later_stages_wait_for_what_decides_them(study, everything):
    first = {planned.name: SimpleNamespace(final_error=error_of(planned.name)) for planned in everything[0]}
    assert len(study.known({})) == 1
    assert len(study.known(first)) == 2
    assert "lr.base=0.0125" in study.known(first)[1][0].words


def config_of(compose, planned):
    return compose(*planned.words, "device=cpu", "precision=fp32")


def test_the_choice_looks_at_no_test_image(compose, everything):
    base = compose("experiment=study32")
    for planned in runs_of(everything, "rate"):
        config = config_of(compose, planned)
        assert (config.k, config.n, config.epochs, config.minibatch) == (1, 32, base.epochs, 32)
        assert (config.dataset.holdout, config.dataset.trained_images) == (10_000, base.dataset.trained_images)
    per_256 = [8 * rate for rate in (0.003125, 0.00625, 0.0125, 0.025, 0.05)]
    assert per_256 == pytest.approx([0.025, 0.05, 0.1, 0.2, 0.4])


def test_figure_1_differs_in_k_alone(compose, everything):
    found = runs_of(everything, "figure1")
    for planned in found:
        config = config_of(compose, planned)
        assert config.reference_rate == pytest.approx(config.k * RATE)
        assert config.rates(32_768).rate_at(0) == RATE
        assert 32_768 % config.minibatch == 0
        assert config.warmup_epochs == pytest.approx(30 * 5 / 90)
        assert (config.model.init, config.model.stem_stride, config.dataset.pad) == ("own", 2, 2)
        assert config.dataset.holdout is None
    assert {config_of(compose, planned).k for planned in found} == {2**power for power in range(10)}


def test_every_other_arm_differs_from_figure_1_in_what_it_is_about(compose, everything):
    differs = {
        "none": {"warmup.name": "none", "warmup.epochs": 0.0},
        "constant": {"warmup.name": "constant"},
        "unscaled": {"lr.scaling": "none"},
        "sqrt": {"lr.scaling": "sqrt"},
        "half": {"lr.base": RATE / 2},
        "double": {"lr.base": RATE * 2},
        "gamma1": {"model.init": "paper", "model.zero_gamma": False},
        "gamma0": {"model.init": "paper"},
        "n8": {"n": 8},
        "n128": {"n": 128},
    }
    from largebatch.records.check import flat

    for name, expected in differs.items():
        found = runs_of(everything, f"{name}-")
        assert found, name
        for planned in found:
            config = config_of(compose, planned)
            k = config.minibatch // 32
            usual = flat(compose("experiment=study32", f"k={k}", f"lr.base={RATE}").experiment("fp32"))
            settings = flat(config.experiment("fp32"))
            changed = {key: settings[key] for key in settings if settings[key] != usual[key] and key != "k"}
            assert changed == expected, planned.name
            assert k in (1, HELD, 2 * HELD)


def test_a_tie_goes_to_the_smaller_rate(study):
    # Pooled variance 0.02, two seeds: a standard error of 0.1.
    errors = {0.1: (9.0, 9.2), 0.2: (8.08, 8.28), 0.4: (8.0, 8.2)}
    assert study.choose_rate(errors) == 0.2
    assert study.choose_rate({**errors, 0.2: (8.12, 8.32)}) == 0.4
    assert study.choose_rate({**errors, 0.1: (8.05, 8.25)}) == 0.1


def test_the_largest_that_holds_comes_before_the_first_that_does_not(study):
    errors = {1: [9.0], 2: [8.6], 4: [9.4], 8: [9.6], 16: [9.0]}
    assert study.largest_that_holds(errors) == 4
    assert study.largest_that_holds({1: [9.0], 2: [9.6]}) == 1
    assert study.largest_that_holds({k: [9.0] for k in (1, 2, 4)}) == 4  # 8 has diverged


def test_every_record_is_a_run_of_the_plan_and_was_made_by_clean_code(study, compose):
    found = study.finished(Path("nowhere"), RECORDS)
    planned = {one.name: one for stage in study.known(found) for one in stage}
    for name, run in found.items():
        config = config_of(compose, planned[name])
        assert run.provenance["run_hash"] == config.run_hash("fp32"), name
        assert run.provenance["git"]["dirty"] is False, name
        assert not str(run.provenance["command"]).count("=/"), name


def test_a_verb_that_it_does_not_know_is_a_sentence():
    done = subprocess.run([sys.executable, SCRIPT, "rnu"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("study32: it takes list, run, run jobs=2 or collect, not 'rnu'.")


@pytest.fixture
def two_short_runs(study, monkeypatch, tmp_path):
    """Make a study of two short runs, one after another, in an empty directory."""
    short = ("k=2", "n=16", "lr.base_minibatch=32", "warmup=none", "epochs=1")
    first, second = (study.Planned(name, (*short, f"seed={seed}")) for seed, name in enumerate(("first", "second")))
    monkeypatch.setattr(study, "stages", lambda found: iter([[first], [second]]))
    monkeypatch.setattr(study, "RECORDS", tmp_path / "records")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_collects_what_is_over(study, two_short_runs, capfd):
    study.run_all(jobs=2)
    assert {*study.finished(study.RUNS, study.RECORDS)} == {"first", "second"}
    with pytest.raises(SystemExit) as ended:
        study.collect()
    assert ended.value.code == 0
    (record,) = (two_short_runs / "records").iterdir()
    assert {*unpack(record)} == {"first", "second"}
    assert str(two_short_runs) not in record.read_text(encoding="utf-8")
    capfd.readouterr()
    (two_short_runs / "runs").rename(two_short_runs / "gone")
    study.run_all(jobs=1)  # the records hold both
    assert capfd.readouterr().out == ""


def test_a_run_that_fails_ends_the_study(study, two_short_runs, monkeypatch):
    broken = study.Planned("broken", ("k=2", "n=99999"))
    monkeypatch.setattr(study, "stages", lambda found: iter([[broken], [broken]]))
    with pytest.raises(SystemExit, match="broken ended with status 2"):
        study.run_all(jobs=1)


def test_a_signal_ends_the_runs_that_are_going(study, two_short_runs, monkeypatch):
    long = study.Planned("long", ("k=2", "n=16", "epochs=100000"))
    monkeypatch.setattr(study, "stages", lambda found: iter([[long]]))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", lambda words: started.append(popen(words)) or started[-1])
    monkeypatch.setattr(study.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="long was stopped"):
        study.run_all(jobs=1)
    (process,) = started
    assert process.returncode is not None


@pytest.fixture(scope="module")
def hypotheses(study):
    """Return the module that judges the plan's hypotheses; it imports the script of the runs by its own name."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("study32_hypotheses")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def made_up(error: float | None, train: float = 4.0) -> SimpleNamespace:
    status = "diverged" if error is None else "done"
    return SimpleNamespace(final_error=error, status=status, epochs={"train_error": np.full(30, train)})


def as_in_the_paper() -> dict:
    """Make up runs that find what the paper found: flat up to k = 32, 12 % at 64, diverged at 512."""
    names = {"none": 10.4, "constant": 10.0, "sqrt": 11.0, "unscaled": 15.0, "half": 9.1, "double": 9.0}
    found = {}
    for seed, off in zip((10, 11, 12), (-0.1, 0.0, 0.1), strict=True):
        for power in range(10):
            k, late = 2**power, 2**power > 32
            error = None if k == 512 else 9.0 + off + 3 * late * k / 64
            found[f"figure1-k{k}-s{seed}"] = made_up(error, 4.0 + k / 1000 + 3 * late)
        for name, error in names.items():
            found[f"{name}-k32-s{seed}"] = made_up(error + off)
        for name, k, error in (("gamma1", 32, 9.4), ("gamma0", 32, 9.0), ("n8", 128, 9.0), ("n128", 8, 9.0)):
            found[f"{name}-k{k}-s{seed}"] = made_up(error + off)
        for name in ("none", "constant"):
            found[f"{name}-k64-s{seed}"] = made_up(14.0 + off)
    return found


def test_the_papers_findings_are_as_expected(hypotheses):
    judged = list(hypotheses.judge(as_in_the_paper()))
    assert [one for one in judged if not one.as_expected] == []
    assert [one.hypothesis for one in judged] == [1] * 9 + [2] * 4 + [3] * 4 + [4] + [5] * 6 + [7] * 2
    assert judged[-9].figures == "-0.40 [-0.63, -0.17] better"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"figure1-k16-s{seed}": made_up(9.4 + seed / 100) for seed in (10, 11, 12)}, "k = 16 and k = 1"),
        ({f"figure1-k64-s{seed}": made_up(9.6 + (seed - 11)) for seed in (10, 11, 12)}, "k = 64 and k = 1"),
        ({f"none-k32-s{seed}": made_up(9.0 + (seed - 11) / 10) for seed in (10, 11, 12)}, "k = 32: none and gradual"),
        (
            {f"double-k32-s{seed}": made_up(8.0 + (seed - 11) / 10) for seed in (10, 11, 12)},
            "k = 32: double and linear",
        ),
        ({f"figure1-k2-s{seed}": made_up(9.0 + (seed - 11) / 10, 5.0) for seed in (10, 11, 12)}, "k = 2: training"),
        ({f"figure1-k64-s{seed}": made_up(12.0 + (seed - 11) / 10) for seed in (10, 11, 12)}, "training error tells"),
    ],
)
def test_what_contradicts_a_hypothesis_is_found(hypotheses, changed, said):
    judged = hypotheses.judge(as_in_the_paper() | changed)
    assert any(one.what.startswith(said) for one in judged if not one.as_expected)


def test_nothing_is_judged_by_one_seed(hypotheses):
    found = as_in_the_paper()
    assert list(hypotheses.judge({name: run for name, run in found.items() if name.endswith("s10")})) == []
    assert hypotheses.held({name: run for name, run in found.items() if name != "figure1-k256-s12"}) is None
