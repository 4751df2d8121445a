"""The study over 32 times its baseline: its experiments, its order and its choices are those of its plan."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "study32.py"
RECORDS = ROOT / "results" / "study32" / "records"
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
    from largebatch.records.runs import flat

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
