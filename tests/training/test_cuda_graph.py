"""Steps that are recorded: by a stand-in that repeats a function, and on a GPU by CUDA."""

import functools
import os
from dataclasses import dataclass, field, replace

import pytest
import torch

from largebatch.base.errors import UserError
from largebatch.bench.step import make_ours
from largebatch.data.source import Batch
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.world import World
from largebatch.training.cuda_graph import WARM_UP, CudaRecorder, GraphedStep, copied_aside
from largebatch.training.learner import make_learner, open_data, start
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import make_step, train_step
from largebatch.training.validation import Validator

CPU = Hardware(cores=1, gpus=0, mps=False, bf16=False)
GPU = Hardware(cores=1, gpus=1, mps=False, bf16=True)
WORDS = [
    "dataset=synthetic_small",
    "dataset.height=8",
    "dataset.width=8",
    "dataset.pad=1",
    "model=resnet8",
    "k=4",
    "n=4",
    "threads=1",
    "precision=fp32",
]
RATES = [0.125, 0.25, 0.5, 0.375, 0.25, 0.125]  # of few digits: float32 holds them
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@dataclass
class StandIn:
    """Records nothing, and repeats a function on the memory that it was given."""

    calls: list[str] = field(default_factory=list)

    def aside(self, work):
        self.calls.append("aside")
        return work()

    def record(self, work):
        self.calls.append("record")

        def again():
            self.calls.append("repeat")
            return work()

        return again


def learn(config, placement, graphed: bool, recorder, device="cpu"):
    """Make a step for every rate; return rows, weights, gradients' momentum and the count of steps."""
    world = World(0, 1, torch.device(device))
    learner = make_learner(replace(config, cuda_graphs=graphed), placement, world, 10)
    source = open_data(config, placement, world)
    stream = sample_stream(config, source.train_images)
    batches = source.train(stream.passes(0, len(RATES), 0, config.k, placement.workers_per_pass))
    recorded = functools.partial(train_step, learner)
    step = GraphedStep(learner, recorded, recorder) if graphed else make_step(learner)
    rows = []
    for iteration, rate in enumerate(RATES):
        taken = [next(batches) for _ in range(placement.workers // placement.workers_per_pass)]
        # An image replaced in the second pass, and batches whose memory goes to others after their step.
        taken = [replace(one, corrupt=3 * (number == 1)) for number, one in enumerate(taken)]
        set_rate(learner.optimizer, rate)
        rows.append(step(iter(taken), iteration).clone())
        for one in taken:
            one.images.zero_()
    state = {**learner.model.state_dict()}
    for index, values in learner.optimizer.state_dict()["state"].items():
        state[f"momentum.{index}"] = values["momentum_buffer"]
    return torch.stack(rows), state, learner.running.steps


@pytest.mark.parametrize("words", [["workers_per_pass=1"], ["workers_per_pass=2", "bn.running=mean"]])
def test_a_repeated_step_has_the_bits_of_an_ordinary_one(compose, words):
    config = compose(*WORDS, *words, "device=cpu")
    placement, recorder = place(config, CPU), StandIn()
    rows, state, steps = learn(config, placement, False, None)
    again, same, counted = learn(config, placement, True, recorder)
    assert again.equal(rows)
    assert rows[:, :, 3].sum() == 3 * len(RATES)
    assert steps == counted == len(RATES)
    assert all(value.equal(same[name]) for name, value in state.items())
    assert recorder.calls == ["aside"] * WARM_UP + ["record"] + ["repeat"] * (len(RATES) - WARM_UP)


@needs_gpu
@pytest.mark.parametrize("words", [["workers_per_pass=1"], ["workers_per_pass=2", "bn.running=mean"]])
def test_a_cuda_graph_makes_the_ordinary_steps(compose, words):
    config = compose(*WORDS, *words, "device=cuda", "deterministic=true")
    placement = place(config, GPU)
    rows, state, _ = learn(config, placement, False, None, "cuda")
    again, same, steps = learn(config, placement, True, CudaRecorder(), "cuda")
    assert steps == len(RATES)
    torch.testing.assert_close(again, rows, rtol=1e-4, atol=1e-4)
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-4, msg=name)


@needs_gpu
@pytest.mark.parametrize("graphed", [False, True])
def test_nothing_in_a_step_waits_for_the_gpu(compose, graphed):
    config = compose(*WORDS, "device=cuda", f"cuda_graphs={str(graphed).lower()}", "dataset.train_images=4096")
    placement, world = place(config, GPU), World(0, 1, torch.device("cuda"))
    learner, source = make_learner(config, placement, world, 10), open_data(config, placement, world)
    stream = sample_stream(config, source.train_images)
    passes = stream.passes(0, 20, 0, config.k, placement.workers_per_pass)
    batches, step = copied_aside(source.train(passes), world.device), make_step(learner)
    for iteration in range(WARM_UP + 2):
        set_rate(learner.optimizer, 0.1)
        step(batches, iteration)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for iteration in range(WARM_UP + 2, 20):
            set_rate(learner.optimizer, 0.1)
            step(batches, iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_timed_is_the_repeated_step(compose):
    config = compose(*WORDS, "workers_per_pass=2", "device=cpu")
    placement, recorder, ours = place(config, CPU), StandIn(), make_ours(config, place(config, CPU))
    learner = make_learner(replace(config, cuda_graphs=True), placement, World(0, 1, torch.device("cpu")), 10)
    ours.learner, ours.make_step = learner, GraphedStep(learner, functools.partial(train_step, learner), recorder)
    ours.warm_up()
    assert recorder.calls == ["aside"] * WARM_UP + ["record", "repeat"]
    ours.step()
    assert recorder.calls[-2:] == ["repeat", "repeat"]


def test_deterministic_arithmetic_is_set_before_a_gpu_is_used(compose, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    seen = []

    def joined(*_):
        seen.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.utils.deterministic.fill_uninitialized_memory))
        return World(0, 1, torch.device("cpu"))

    monkeypatch.setattr("largebatch.training.learner.join", joined)
    for words in (["deterministic=false"], ["deterministic=true"]):
        config = compose(*WORDS, *words, "device=cpu")
        start(config, place(config, CPU))
    torch.set_deterministic_debug_mode("default")
    assert seen == [(None, True), (":4096:8", False)]


def test_validation_copies_its_batches_aside(compose, monkeypatch):
    config = compose(*WORDS, "device=cpu")
    placement, world = place(config, CPU), World(0, 1, torch.device("cpu"))
    copied = []
    monkeypatch.setattr(
        "largebatch.training.validation.copied_aside", lambda batches, device: copied.append(device) or batches
    )
    source = open_data(config, placement, world)
    Validator(make_learner(config, placement, world, 10), source).validate()
    assert copied == [world.device]


def test_on_a_processor_batches_come_as_they_are():
    one = Batch(torch.zeros(1), torch.zeros(1))
    assert list(copied_aside(iter([one]), torch.device("cpu"))) == [one]


@pytest.mark.parametrize(
    ("words", "hardware", "message"),
    [
        ([], CPU, "device=cpu, processes=1"),
        (["processes=2"], replace(GPU, gpus=2), "device=cuda, processes=2"),
        (["optimizer=lars"], GPU, "optimizer=lars cannot read there"),
        (["pitfall=absorb_rate"], GPU, "pitfall=absorb_rate cannot read there"),
        (["exact=true"], GPU, "leave cuda_graphs=true out"),
        (["precision=fp64"], GPU, "keeps the rate in float32"),
    ],
)
def test_what_cannot_be_recorded_is_refused(compose, words, hardware, message):
    with pytest.raises(UserError, match=message):
        place(compose("cuda_graphs=true", *words), hardware)


def test_dropout_cannot_be_recorded(compose):
    words = ["model=torchvision", "model.name=mobilenet_v3_small", "dataset.height=32", "dataset.width=32"]
    config = compose(*WORDS, *words, "device=cpu")
    with pytest.raises(UserError, match="dropout is drawn anew"):
        make_learner(replace(config, cuda_graphs=True), place(config, CPU), World(0, 1, torch.device("cpu")), 10)
