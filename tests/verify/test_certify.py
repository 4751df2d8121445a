"""The certificate: it holds for the trainer, and fails for every mistake made on purpose."""

import json
import math
from dataclasses import replace

import pytest
import torch

from largebatch.base.errors import UserError
from largebatch.cli.main import run
from largebatch.config.groups import CertifyConfig
from largebatch.runtime.placement import Hardware, place
from largebatch.verify import scope
from largebatch.verify.paper_step import rate_at
from largebatch.verify.scope import fit_to_time, make_plan

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)
ASKED = CertifyConfig(iterations=6, processes=None, tolerance=None, minutes=20)
SMALL = ["k=4", "n=8", "device=cpu", "threads=1", "certify.processes=[1]"]
# A set with few images to validate, and a network that is quick at 32×32.
SYNTHETIC = [
    "dataset=synthetic",
    "dataset.height=32",
    "dataset.width=32",
    "dataset.classes=10",
    "dataset.val_images=20",
    "dataset.crop=pad",
    "dataset.pad=2",
    "dataset.flip=true",
]


def with_k(k: int) -> list[str]:
    return [f"k={k}", *SMALL[1:], "certify.iterations=3"]


@pytest.fixture
def certificate_of(tmp_path, monkeypatch, capsys):
    """Return a function from words to (exit status, certificate as JSON)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)

    def certificate(*words: str) -> tuple[int, dict]:
        status = run(["certify", *words, "format=json", f"run_dir={tmp_path}/certified"])
        printed = json.loads(capsys.readouterr().out)  # nothing but JSON
        assert json.loads((tmp_path / "certified" / "certificate.json").read_text()) == printed
        assert not (tmp_path / "certified" / "definition").exists()
        return status, printed

    return certificate


def test_float64_holds_on_one_two_and_four_processes(certificate_of):
    status, facts = certificate_of("k=4", "n=8", "device=cpu", "precision=fp64")
    assert (status, facts["holds"], facts["first_difference"]) == (0, True, None)
    placements = [(f["processes"], f["workers_per_pass"]) for f in facts["findings"]]
    assert placements == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    for finding in facts["findings"]:
        assert [finding[kind] for kind in ("samples", "crops", "rates", "validation")] == [True] * 4
        assert finding["gradients"] < 1e-12
        assert finding["weights"] < 1e-12
        assert finding["buffers"] < 1e-12
    assert any("lr.base_minibatch=8" in change for change in facts["changes"])


def test_float64_holds_with_the_mean_of_the_workers_statistics(certificate_of):
    status, facts = certificate_of(*SMALL, "bn.running=mean")
    assert (status, facts["holds"]) == (0, True)
    assert 0 < max(finding["buffers"] for finding in facts["findings"]) < 1e-12


def test_exact_float32_differs_by_nothing(certificate_of):
    words = ["k=4", "n=8", "device=cpu", "exact=true", "precision=fp32"]
    status, facts = certificate_of(*words)
    assert (status, facts["holds"], facts["exact"], facts["tolerance"]) == (0, True, True, 0)
    assert [finding["processes"] for finding in facts["findings"]] == [1, 2, 4]
    assert {f[kind] for f in facts["findings"] for kind in ("gradients", "weights", "buffers")} == {0.0}
    assert len({finding["digest"] for finding in facts["findings"]}) == 1


@pytest.mark.parametrize(
    ("pitfall", "named"),
    [
        ("scale_loss", "rate at iteration 1: 0.025 instead of 0.1"),
        ("absorb_rate", "weights of "),
        ("normalize_by_n", "gradients of "),
        ("independent_shuffle", "samples of worker 0 at iteration 1"),
        ("sync_bn", "gradients of "),
        ("decay_bn", "weights of bn1.weight at iteration 1"),
        ("gamma_one", "weights of layer1.0.bn2.weight before the first iteration"),
        ("per_epoch_warmup", "rate at iteration 2: 0.1 instead of 0.2"),
        ("warmup_from_zero", "rate at iteration 1: 0 instead of 0.1"),
        ("padded_eval", "of 364 counted, instead of"),
    ],
)
def test_every_pitfall_fails_and_is_named(certificate_of, pitfall, named):
    k = with_k(7) if pitfall == "padded_eval" else SMALL  # 4 divides 360
    status, facts = certificate_of(*k, f"pitfall={pitfall}")
    assert status == 1
    assert not facts["holds"]
    assert named in facts["first_difference"]
    assert facts["pitfall"] == pitfall


def test_corrected_momentum_holds(certificate_of):
    status, facts = certificate_of(*SMALL, "pitfall=absorb_rate_corrected")
    assert (status, facts["holds"]) == (0, True)


def test_float32_starts_every_iteration_from_the_definition(certificate_of):
    status, facts = certificate_of(*SMALL, "precision=fp32")
    assert (status, facts["runs_free"], facts["tolerance"]) == (0, False, 2e-3)
    assert 1e-9 < max(finding["gradients"] for finding in facts["findings"]) < 1e-4


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["model=timm", "model.name=resnet10t"], None),
        (["model=timm", "model.name=convnext_atto"], "no BatchNorm"),
        (["model=torchvision", "model.name=mobilenet_v3_small", "model.init=paper"], "dropout"),
    ],
)
def test_networks_of_others(certificate_of, words, note):
    status, facts = certificate_of(*with_k(2), *SYNTHETIC, *words)
    assert (status, facts["holds"]) == (0, True)
    assert note is None or any(note in said for said in facts["notes"])


def test_one_worker_is_held_against_the_definition(certificate_of):
    status, facts = certificate_of(*with_k(1))
    assert (status, len(facts["findings"])) == (0, 1)


def test_the_table_names_the_first_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["certify", *SMALL, "pitfall=gamma_one", "certify.iterations=3"]) == 1
    printed = capsys.readouterr().out
    assert "PITFALL gamma_one" in printed
    assert "First difference (P = 1, 1 a pass): weights of layer1.0.bn2.weight before the first iteration" in printed
    assert "tolerance: 1e-10 (running free)" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certify.processes=[3]"], "3 does not divide k=4. These do: 1, 2, 4"),
        (["certify.iterations=2"], "certify.iterations=2 is too few"),
        (["optimizer=lars"], "certify takes optimizer=sgd"),
        (["certify.procesess=1"], "certify.procesess"),
        (["exact=true", "workers_per_pass=2"], "exact=true"),
    ],
)
def test_mistakes_in_the_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run(["certify", "k=4", "n=8", "device=cpu", *words])
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_batchnorm_without_a_per_worker_form_is_named(compose):
    from largebatch.models.batchnorm import refuse_unknown

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.SyncBatchNorm(4))
    with pytest.raises(UserError, match=r"module '1' \(SyncBatchNorm\)"):
        refuse_unknown(model)


def test_what_does_not_fit_is_reduced_and_said(compose, monkeypatch):
    config = compose("experiment=imagenet_1h", "precision=fp32", "device=cpu")
    plan = make_plan(config, place(config, CPU), ASKED)
    assert "dataset=imagenet was not found: synthetic images of 3×224×224 instead" in plan.changes
    monkeypatch.setattr(scope, "_time_of_a_pass", lambda *_: 6.0)
    smaller, change = fit_to_time(plan.config, place(plan.config, CPU), ASKED, topologies=9)
    assert smaller.k == 4  # a pass of 6 s, 60 for each worker: 20 minutes allow k = 3
    assert "k=256 would take about 25.6 hours here: k=4 instead" in change
    monkeypatch.setattr(scope, "_time_of_a_pass", lambda *_: 0.01)
    assert fit_to_time(plan.config, place(plan.config, CPU), ASKED, topologies=9) == (plan.config, "")


def test_the_definitions_rates_by_hand(compose):
    config = compose("experiment=imagenet_1h")
    # 156 iterations an epoch, 780 of warmup from 0.1 to 3.2, × 0.1 at epochs 30, 60, 80.
    expected = {0: 0.1, 390: 1.65, 780: 3.2, 4679: 3.2, 4680: 0.32, 9360: 0.032, 12480: 0.0032}
    for iteration, rate in expected.items():
        assert math.isclose(rate_at(config, iteration, 156), rate, rel_tol=1e-12)


def test_the_plan_has_a_warmup_and_a_decay(compose):
    config = compose("k=8", "n=16", "precision=fp64", "device=cpu")
    plan = make_plan(config, place(config, CPU), ASKED)
    rates = [plan.config.rates(1437).rate_at(iteration) for iteration in range(6)]
    assert rates == pytest.approx([0.1, 0.1 + 0.7 / 3, 0.1 + 1.4 / 3, 0.8, 0.08, 0.08])
    assert replace(plan.config, epochs=90).experiment_hash("fp64") != config.experiment_hash("fp64")
