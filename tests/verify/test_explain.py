import json
from dataclasses import replace

import pytest

from largebatch.base.errors import UserError
from largebatch.runtime.placement import Hardware, place
from largebatch.verify.explain import as_text, explain

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)


def facts_of(config, full=False):
    return explain(config, place(config, CPU), full)


@pytest.fixture(scope="module")
def paper(compose):
    return facts_of(compose("experiment=imagenet_1h"))


def test_the_papers_experiment(paper):
    assert (paper["minibatch"], paper["reference_rate"], paper["base_rate"]) == (8192, 3.2, 0.1)
    assert (paper["iterations_per_epoch"], paper["iterations"], paper["warmup_iterations"]) == (156, 14040, 780)
    assert paper["dropped_per_epoch"] == 1281167 - 156 * 8192
    assert paper["parameters"] == 25_557_032
    assert paper["memory_bytes"] == dict.fromkeys(("weights", "gradients", "optimizer"), 4 * 25_557_032)
    assert paper["batchnorm"] == {"layers": 53, "samples": 32, "running": "worker0"}
    assert paper["notes"] == []


def test_the_papers_decay_groups(paper):
    groups = paper["parameter_groups"]
    assert groups["decayed"] == {"weight_decay": 1e-4, "tensors": 55, "parameters": 25_503_912}
    assert groups["normalisations"] == {"weight_decay": 0.0, "tensors": 106, "parameters": 53_120}


def test_the_papers_turning_points(paper):
    assert [row["iteration"] for row in paper["rates"]] == [0, 780, 4680, 9360, 12480, 14039]
    rates = [row["rate"] for row in paper["rates"]]
    assert rates == pytest.approx([0.1, 3.2, 0.32, 0.032, 0.0032, 0.0032])


def test_the_page_says_it_all(paper):
    page = as_text(paper)
    for words in (
        "kn = 256 × 32 = 8192",
        "3.2  (linear scaling of 0.1)",
        "gradual, 5 epochs = 780 iterations",
        "25,557,032 parameters",
        "0.0001 on 55 tensors, 25,503,912 parameters",
        "0 on 106 tensors, 53,120 parameters",
        "53 layers, statistics of n = 32 samples",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("words", "a_pass", "notes"), [(["n=32"], "8 a pass (256 samples)", 0), (["n=256"], "2 a pass (512 samples)", 1)]
)
def test_the_bound_of_a_pass_on_a_gpu_is_said(compose, words, a_pass, notes):
    config = compose("k=8", "dataset=synthetic", "device=cuda", *words)
    facts = explain(config, place(config, replace(CPU, gpus=1, bf16=True)))
    assert a_pass in as_text(facts)
    assert [note.startswith("workers_per_pass=2: by default a pass holds at most 512") for note in facts["notes"]] == [
        True
    ] * notes


def test_full_rates_are_those_of_every_iteration(compose):
    config = compose("epochs=9", "k=16")  # kn = 512: 2 iterations an epoch
    facts = facts_of(config, full=True)
    assert facts["rates"] == [config.rates(1437).rate_at(at) for at in range(18)]
    assert json.loads(json.dumps(facts)) == facts


def test_no_warmup_takes_place_where_the_rate_is_not_above_the_base(compose):
    facts = facts_of(compose("k=4"))
    assert facts["warmup_iterations"] == 0
    assert "none takes place: the reference rate is not above 0.1" in as_text(facts)


def test_a_warmup_that_rounds_to_no_iteration_is_explained_by_its_length(compose):
    facts = facts_of(compose("k=32", "n=32", "epochs=5"))
    assert (facts["warmup_iterations"], facts["iterations_per_epoch"], facts["reference_rate"]) == (0, 1, 0.4)
    why = "the gradual warmup does not take place: it is shorter than half an iteration, and an epoch has 1"
    assert facts["notes"] == [why]
    assert why in as_text(facts)
    assert "none takes place: it rounds to no iteration" in as_text(facts)


def test_what_could_not_be_applied_is_said(compose):
    facts = facts_of(compose("model=timm", "model.name=vit_tiny_patch16_224", "dataset=synthetic"))
    assert facts["notes"] == ["initialisation is timm's own (not a residual network whose blocks are known)"]


def test_lamb_keeps_two_tensors_a_parameter(compose):
    memory = facts_of(compose("optimizer=lamb", "precision=fp64"))["memory_bytes"]
    assert memory["optimizer"] == 2 * memory["weights"] == 2 * 8 * facts_of(compose())["parameters"]


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=timm", "model.name=vit_tiny_patch16_224"], "does not take images of 1×8×8: Input height"),
        (["n=1", "model=timm", "model.name=resnet18"], "n=1 leaves a BatchNorm of model.name=resnet18 a single value"),
    ],
)
def test_what_train_refuses_of_a_network_explain_refuses_too(compose, words, sentence):
    with pytest.raises(UserError, match=sentence):
        facts_of(compose(*words))
