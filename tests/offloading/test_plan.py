from dataclasses import replace

import pytest
import torch
from torch import nn

from largebatch.offloading import offload
from largebatch.offloading.plan import Bus, Plan, choose, make_plans, measure_bus, plan_models, plan_resident
from largebatch.offloading.plan import plan_submodules as submodules
from largebatch.offloading.transport import CpuTransport

BUS = Bus(bytes_per_second=100.0, seconds_per_copy=0.5)


def test_a_copy_takes_its_start_and_its_bytes():
    assert BUS.seconds([100, 50]) == 0.5 + 1.0 + 0.5 + 0.5


def test_resident_models_come_once():
    assert plan_resident([100, 200], BUS, 7.0, budget=299) == Plan("none", 300, 300, 3.5, 10.5, fits=False)


def test_submodules_compute_beside_every_copy_but_the_first():
    # 10 loads of 0.5 + 1 s and 0.5 + 0.5 s are 25 s, and 200 bytes that stay take 2.5 s: the first 1.5 s alone, then
    # the longer of 23.5 s of copies and of computing.
    slow = submodules([100, 50], kept=200, slots=2, loads=10, bus=BUS, compute=4.0, budget=400)
    assert slow == Plan("submodule", 400, 200 + 1500, 27.5, 2.5 + 25.0, fits=True)
    assert submodules([100, 50], 200, 2, 10, BUS, 100.0, 400).seconds == 2.5 + 1.5 + 100.0
    assert submodules([100, 50], 0, 1, 10, BUS, 100.0, None) == Plan("submodule", 100, 1500, 25.0, 125.0, fits=True)


def test_models_compute_while_the_next_one_comes():
    # Copies of 1.5, 2.5 and 1.5 s; computing 1, 2 and 1 s: 1.5 + max(1, 2.5) + max(2, 1.5) + 1.
    assert plan_models([100, 200, 100], BUS, 4.0, None) == Plan("model", 300, 400, 5.5, 7.0, fits=True)
    # A budget for more keeps more; without prefetch there is one, and nothing happens beside its copy.
    assert plan_models([100, 200, 100], BUS, 4.0, 400) == Plan("model", 400, 400, 5.5, 7.0, fits=True)
    assert plan_models([100, 200, 100], BUS, 4.0, None, prefetch=False) == Plan("model", 200, 400, 5.5, 9.5, fits=True)
    # No room for two: one after the other. Not even for one: the least is said, and does not fit.
    assert plan_models([100, 200, 100], BUS, 4.0, 250) == Plan("model", 200, 400, 5.5, 9.5, fits=True)
    assert plan_models([100, 200, 100], BUS, 4.0, 150) == Plan("model", 200, 400, 5.5, 9.5, fits=False)


def test_the_fastest_that_fits_is_chosen_and_of_about_equal_ones_the_plainest():
    none = Plan("none", 300, 300, 0.0, 10.4, fits=True)
    model = Plan("model", 200, 300, 0.0, 10.2, fits=True)
    submodule = Plan("submodule", 100, 900, 0.0, 10.0, fits=True)
    fast = Plan("submodule", 100, 900, 0.0, 9.0, fits=True)
    assert choose([none, submodule, model]) is none
    assert choose([replace(none, fits=False), submodule, model]) is model
    assert choose([none, fast, model]) is fast
    assert choose([replace(none, fits=False)]) is None


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("budget", [None, 150_000, 1_000_000])
def test_plans_are_what_offloading_then_does(budget, prefetch):
    models = {str(width): nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)).eval() for width in (64, 128, 64)}
    batches = [torch.randn(2, 64) for _ in range(3)]
    for plan in make_plans(models, len(batches), BUS, budget=budget, prefetch=prefetch):
        with offload(models, "cpu", mode=plan.mode, budget=budget, prefetch=prefetch) as statistics:
            for model in models.values():
                for batch in batches:
                    model(batch)
        assert statistics.peak_bytes == plan.peak_bytes
        assert plan.fits
        first_of_more = max(part.numel() * 4 for model in models.values() for part in model.parameters()) + 512
        assert 0 <= statistics.bytes_to_device - plan.moved_bytes <= len(models) * first_of_more


def test_a_budget_below_the_least_is_planned_as_the_least():
    plans = make_plans({"a": nn.Linear(64, 64)}, 1, BUS, budget=100)
    assert [(plan.mode, plan.peak_bytes, plan.fits) for plan in plans] == [
        (mode, 4 * 64 * 64 + 256, False) for mode in ("none", "submodule", "model")
    ]
    assert choose(plans) is None


class Waiting(CpuTransport):
    """Takes a known time: a tick a copy, and one for every 16 MiB."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def copy(self, slot, source):
        self.clock[0] += 1.0 + len(source) / 2**24


def test_the_bus_is_measured_with_large_copies_and_small_ones(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("largebatch.offloading.plan.time.perf_counter", lambda: clock[0])
    bus = measure_bus("cpu", 40.0, Waiting(clock))
    assert bus.seconds_per_copy == pytest.approx(1.0, rel=1e-3)
    assert bus.bytes_per_second == pytest.approx(2**24, rel=1e-3)
