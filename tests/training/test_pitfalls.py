"""Each pitfall departs from the definition exactly as stated, and the default does not: float64, small numbers."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from largebatch.config.pitfalls import PITFALLS
from largebatch.config.run import Config
from largebatch.data.source import Target, open_source
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.world import World
from largebatch.training.learner import make_learner
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import train_step
from largebatch.training.validation import batches_of, validation_cuts
from largebatch.verify.paper_step import Definition

K, N, STEPS = 4, 8, 4
ALONE = World(0, 1, torch.device("cpu"))
CPU = Hardware(cores=1, gpus=0, mps=False, bf16=False)
WORDS = (
    f"k={K}",
    f"n={N}",
    f"lr.base_minibatch={N}",
    "precision=fp64",
    "epochs=2",
    "warmup.epochs=0.0682",  # 3 of the 44 iterations of an epoch
    "schedule.milestones=[1]",
)


def source_of(config: Config):
    return open_source(config.dataset, config.loader, config.seed, Target(ALONE.device, torch.float64), cores=1)


def follow(config: Config, steps: int = STEPS) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Let the trainer make some steps; return gradients, weights and buffers after each, weights first."""
    placement = place(config, CPU)
    source = source_of(config)
    learner = make_learner(config, placement, ALONE, source.classes)
    stream = sample_stream(config, source.train_images)
    batches = source.train(stream.passes(0, steps, 0, K, placement.workers_per_pass))
    rates = config.rates(source.train_images)
    states = [{"weights": _copies(learner.model.named_parameters())}]
    for iteration in range(steps):
        set_rate(learner.optimizer, rates.rate_at(iteration))
        train_step(learner, batches, iteration)
        states.append(
            {
                "weights": _copies(learner.model.named_parameters()),
                "gradients": {name: p.grad.clone() for name, p in learner.model.named_parameters()},
                "buffers": _copies(learner.model.named_buffers()),
            }
        )
    return states


def _copies(named) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in named}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-12) -> bool:
    norm = sum(float(value.norm()) ** 2 for value in a.values()) ** 0.5
    return all(float((a[name] - b[name]).norm()) <= tolerance * norm for name in a)


@pytest.fixture(scope="module")
def config(compose) -> Config:
    return compose(*WORDS)


@pytest.fixture(scope="module")
def right(config):
    """The trainer's steps without a pitfall."""
    return follow(config)


@pytest.fixture(scope="module")
def truth(config):
    """The definition's steps."""
    definition = Definition(config, source_of(config), ALONE.device, torch.float64, lambda model, x: model(x))
    steps, state = [], definition.start()
    for iteration in range(STEPS):
        steps.append(definition.step(iteration, state))
        state = steps[-1].after
    return steps


def with_pitfall(config: Config, name: str) -> Config:
    return replace(config, pitfall=replace(config.pitfall, name=name))


def test_the_default_makes_the_definitions_steps(right, truth):
    for step, state in zip(truth, right[1:], strict=True):
        assert close(step.gradients, state["gradients"])
        assert close(step.after.weights, state["weights"])
        floats = {name: value for name, value in step.after.buffers.items() if value.is_floating_point()}
        assert close(floats, state["buffers"])


def test_scale_loss_divides_weight_decay_by_k(config, right, truth):
    wrong = follow(with_pitfall(config, "scale_loss"))
    rate, decay = config.lr.base, config.optimizer.weight_decay
    # Step 1 uses η, here η/k times a gradient of k g. With Nesterov momentum from zero the direction is
    # (1 + m)(g + λ w), so w_wrong − w_right = η (1 + m) λ (1 − 1/k) w for what decays, and 0 for γ and β.
    for name, start in right[0]["weights"].items():
        decays = not ("bn" in name or "downsample.1" in name)
        term = rate * (1 + config.optimizer.momentum) * decay * (1 - 1 / K) * start if decays else 0.0 * start
        difference = wrong[1]["weights"][name] - right[1]["weights"][name]
        torch.testing.assert_close(difference, term, rtol=1e-6, atol=1e-15)
    assert close({n: K * g for n, g in right[1]["gradients"].items()}, wrong[1]["gradients"])


def test_scale_loss_without_weight_decay_changes_nothing(config):
    bare = replace(config, optimizer=replace(config.optimizer, weight_decay=0.0))
    assert close(follow(bare)[-1]["weights"], follow(with_pitfall(bare, "scale_loss"))[-1]["weights"])


def test_absorb_rate_keeps_the_old_rate_in_its_momentum(config, right):
    wrong = follow(with_pitfall(config, "absorb_rate"))
    first, second = config.rates(1437).rate_at(0), config.rates(1437).rate_at(1)
    m, decay = config.optimizer.momentum, config.optimizer.weight_decay
    assert close(right[1]["weights"], wrong[1]["weights"])  # until the rate changes
    # v₂ holds η₁ where the definition has η₂: the step is short by m² (η₂ − η₁) u₁, with u₁ = g₁ + λ w₀.
    for name, start in right[0]["weights"].items():
        decays = not ("bn" in name or "downsample.1" in name)
        momentum = right[1]["gradients"][name] + (decay * start if decays else 0.0)
        difference = wrong[2]["weights"][name] - right[2]["weights"][name]
        torch.testing.assert_close(difference, m * m * (second - first) * momentum, rtol=1e-6, atol=1e-14)


def test_absorb_rate_corrected_is_the_default(config, right):
    corrected = follow(with_pitfall(config, "absorb_rate_corrected"))
    assert all(close(a["weights"], b["weights"]) for a, b in zip(right, corrected, strict=True))


def test_normalize_by_n_makes_gradients_k_times_too_large(config, right):
    wrong = follow(with_pitfall(config, "normalize_by_n"), steps=1)
    assert close({name: K * gradient for name, gradient in right[1]["gradients"].items()}, wrong[1]["gradients"])


def test_independent_shuffle_repeats_samples_and_misses_others(config):
    streams = [sample_stream(with_pitfall(config, name), 1437) for name in ("none", "independent_shuffle")]
    seen = [
        torch.cat([stream.samples(iteration, 0, K) for iteration in range(stream.iterations_per_epoch)])
        for stream in streams
    ]
    assert [len(samples) for samples in seen] == [44 * K * N] * 2
    # One permutation: every sample once. k of them: each takes 352 of 1437, together 1437 (1 − (1 − 352/1437)⁴).
    assert len(seen[0].unique()) == 44 * K * N
    assert len(seen[1].unique()) == pytest.approx(1437 * (1 - (1 - 352 / 1437) ** 4), abs=40)


def test_sync_bn_takes_statistics_over_all_samples(config, right):
    wrong = follow(with_pitfall(config, "sync_bn"), steps=1)
    source = source_of(config)
    definition = Definition(config, source, ALONE.device, torch.float64, lambda model, x: model(x))
    whole = replace(config, k=1, n=K * N, lr=replace(config.lr, base_minibatch=K * N))
    one = Definition(whole, source, ALONE.device, torch.float64, lambda model, x: model(x))
    assert close(one.step(0, one.start()).gradients, wrong[1]["gradients"])
    assert not close(definition.step(0, definition.start()).gradients, wrong[1]["gradients"], tolerance=1e-3)


def test_decay_bn_decays_gamma_and_beta(config, right):
    wrong = follow(with_pitfall(config, "decay_bn"), steps=1)
    rate, m, decay = config.lr.base, config.optimizer.momentum, config.optimizer.weight_decay
    for name, start in right[0]["weights"].items():
        spared = "bn" in name or "downsample.1" in name
        difference = wrong[1]["weights"][name] - right[1]["weights"][name]
        expected = -rate * (1 + m) * decay * start if spared else torch.zeros_like(start)
        torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-15)


def test_gamma_one_starts_the_last_bn_of_blocks_at_one(config, right):
    wrong = follow(with_pitfall(config, "gamma_one"), steps=1)
    changed = {name for name, value in right[0]["weights"].items() if not value.equal(wrong[0]["weights"][name])}
    assert changed == {f"layer{stage}.0.bn2.weight" for stage in (1, 2, 3)}
    assert all(wrong[0]["weights"][name].eq(1).all() and right[0]["weights"][name].eq(0).all() for name in changed)


@pytest.mark.parametrize(
    ("pitfall", "rates"),
    [
        # η = 0.1, k = 4, so η̂ = 0.4; 2 iterations an epoch, 2 epochs of warmup.
        ("none", [0.1, 0.175, 0.25, 0.325, 0.4]),
        ("per_epoch_warmup", [0.1, 0.1, 0.25, 0.25, 0.4]),
        ("warmup_from_zero", [0.0, 0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_warmups(compose, pitfall, rates):
    config = compose("k=4", "n=8", "lr.base_minibatch=8", "epochs=9", "warmup.epochs=2", f"pitfall={pitfall}")
    schedule = config.rates(train_images=2 * 4 * 8)
    assert [schedule.rate_at(iteration) for iteration in range(5)] == pytest.approx(rates, rel=1e-12)


def test_padded_eval_counts_the_first_samples_twice(config):
    padded = replace(with_pitfall(config, "padded_eval"), k=7)
    assert sum(map(len, validation_cuts(config, 360))) == 360
    assert validation_cuts(padded, 360) == [*batches_of(360), range(4)]  # 364 = 7 · 52
    # As PyTorch's DistributedSampler pads for 7 replicas.
    samplers = [torch.utils.data.DistributedSampler(range(360), 7, rank, shuffle=False) for rank in range(7)]
    counted = sorted(index for sampler in samplers for index in sampler)
    assert counted == sorted(index for cut in validation_cuts(padded, 360) for index in cut)


def test_every_pitfall_has_its_words_and_its_own_hash(compose):
    hashes = {name: compose(f"pitfall={name}").experiment_hash("fp32") for name in PITFALLS}
    assert len(set(hashes.values())) == len(PITFALLS)


def test_a_pitfall_is_named_where_its_parts_are_and_nowhere_else():
    package = Path(__file__).parents[2] / "largebatch"
    homes = {package / "config" / "pitfalls.py", package / "training" / "pitfalls.py"}
    for path in {*package.rglob("*.py")} - homes:
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & ({*PITFALLS} - {"none"}), path
