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
