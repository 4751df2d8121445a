"""The trainer against code that others wrote: PyTorch's schedulers, optimizer and data-parallel training."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from largebatch.data.source import Target, open_source
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.world import World
from largebatch.training.learner import make_learner
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.step import train_step


def rates_of_torch(reference: float, start: float, warmup: int, then, total: int) -> list[float]:
    """Return the rates of PyTorch's linear warmup followed by another of its schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=reference)
    linear = LinearLR(optimizer, start_factor=start / reference, end_factor=1.0, total_iters=warmup)
    schedule = SequentialLR(optimizer, [linear, then(optimizer)], milestones=[warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# PyTorch's SequentialLR steps its second schedule through a deprecated argument of its own.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_rates_equal_torchs_schedulers(compose):
    images = 8 * 4 * 10  # 10 iterations an epoch
    step = compose("k=4", "n=8", "lr.base_minibatch=8", "epochs=9", "warmup.epochs=2").rates(images)
    expected = rates_of_torch(0.4, 0.1, 20, lambda o: MultiStepLR(o, [10, 40, 60], gamma=0.1), 90)
    assert [step.rate_at(iteration) for iteration in range(90)] == pytest.approx(expected, rel=1e-9)
    cosine = compose("k=4", "n=8", "lr.base_minibatch=8", "epochs=9", "warmup.epochs=2", "schedule=cosine")
    expected = rates_of_torch(0.4, 0.1, 20, lambda o: CosineAnnealingLR(o, 70), 90)
    rates = cosine.rates(images)
    assert [rates.rate_at(iteration) for iteration in range(90)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_ten_steps_equal_a_plain_script_with_ddp(compose, tmp_path):
    config = compose(
        "k=2", "n=4", "model=resnet18", "dataset=synthetic", "dataset.height=32", "dataset.width=32",
        "dataset.classes=10", "dataset.train_images=200", "dataset.crop=pad", "dataset.pad=2", "precision=fp64",
        "lr.base_minibatch=8", "warmup=none", "device=cpu",
    )  # fmt: skip
    steps, rate = 10, config.reference_rate
    world = World(0, 1, torch.device("cpu"))
    placement = place(config, Hardware(cores=1, gpus=0, mps=False, bf16=False))
    source = open_source(config.dataset, config.loader, config.seed, Target(world.device, torch.float64), 1)
    learner = make_learner(config, placement, world, source.classes)
    stream = sample_stream(config, source.train_images)
    passes = list(stream.passes(0, steps, 0, 2, 1))
    batches = list(source.train(passes))
    tensors = {f"model.{name}": value.clone() for name, value in learner.model.state_dict().items()}
    for step in range(steps):
        pair = batches[2 * step : 2 * step + 2]
        tensors[f"images.{step}"] = torch.stack([batch.images for batch in pair])
        tensors[f"labels.{step}"] = torch.stack([batch.labels for batch in pair])
    save_file(tensors, tmp_path / "start.safetensors")

    script = Path(__file__).with_name("plain_ddp.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [tmp_path / "start.safetensors", tmp_path / "end.safetensors", port, steps, rate]
    subprocess.run([sys.executable, script, *map(str, words)], check=True, timeout=300)
    taken = iter(batches)
    set_rate(learner.optimizer, rate)
    for step in range(steps):
        train_step(learner, taken, step)
    learner.running.synchronise(world)
    for name, expected in load_file(tmp_path / "end.safetensors").items():
        torch.testing.assert_close(learner.model.state_dict()[name], expected, rtol=1e-9, atol=1e-12, msg=name)
