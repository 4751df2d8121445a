import pytest
import torch

from largebatch.runtime.world import World
from largebatch.training.meter import Meter, Sums, Wishes


@pytest.fixture
def meter() -> Meter:
    return Meter(k=4, first=0, world=World(rank=0, size=1, device=torch.device("cpu")))


@pytest.mark.parametrize("wish", ["interrupt", "end", "save"])
def test_a_wish_is_heard_once(meter, wish):
    wished = Wishes(**{wish: True})
    assert meter.read(wished) == wished
    assert meter.read(Wishes()) == Wishes()


def test_figures_gather_until_they_are_read(meter):
    epoch, line = Sums(), Sums()
    rows = torch.tensor([[8.0, 3, 0, 0], [4.0, 4, 0, 1], [2.0, 1, 0, 0], [2.0, 0, 1, 0]])  # loss, right, non-finite …
    meter.add(rows, 32)
    meter.add(rows, 32)
    meter.read(Wishes(), epoch, line)
    assert (line.mean_loss, line.error) == (32 / 64, 100 * (64 - 16) / 64)
    assert (line.nonfinite, line.replaced, line.seen) == (2, 2, 64)

    meter.add(rows, 32)
    meter.read(Wishes(), epoch)
    assert (epoch.seen, epoch.right, line.seen) == (96, 24, 64)


def test_sums_do_not_depend_on_how_often_they_are_read(meter):
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, 4, generator=generator, dtype=torch.float64) for _ in range(7)]
    seldom, often = Sums(), Sums()
    for step in steps:
        meter.add(step, 32)
    meter.read(Wishes(), seldom)
    for step in steps:
        meter.add(step, 32)
        meter.read(Wishes(), often)
    assert seldom == often
    assert seldom.loss == pytest.approx(sum(float(step[:, 0].sum()) for step in steps), rel=1e-12)


@pytest.mark.parametrize(("seconds", "steps", "every"), [(30.0, 1, 1), (2.0, 10, 10), (0.001, 10, 1000), (8.0, 8, 2)])
def test_looks_for_signals_are_about_two_seconds_apart(meter, monkeypatch, seconds, steps, every):
    clock = [0.0]
    monkeypatch.setattr("largebatch.training.meter.time.monotonic", lambda: clock[0])
    meter.read(Wishes())
    for _ in range(steps):
        meter.add(torch.zeros(4, 4), 32)
    clock[0] = seconds
    meter.read(Wishes())
    assert meter.look_every == every
