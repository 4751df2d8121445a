import pytest

from largebatch.inference import plan
from largebatch.offloading.plan import Bus, measure_bus


@pytest.fixture(autouse=True)
def bus(monkeypatch):
    """A gigabyte a second, and a millisecond a copy."""
    monkeypatch.setattr(plan, "measure_bus", lambda device: Bus(1e9, 1e-3))


@pytest.mark.parametrize(
    "words",
    [
        ("run=runs/seed0", "prefetch=false"),
        ("run=runs/seed0", "groups=leaf", "prefetch=false", "batch=100"),
        ("run=runs/seed0", "batch=100", "fold_bn=true", "prefetch=false"),
        ("run=runs/seed0", "batches_per_load=2", "prefetch=false"),
        ("runs=runs/seed*", "budget=650kB", "prefetch=false"),
    ],
    ids=" ".join,
)
def test_what_is_planned_is_what_it_takes(runs, facts, words):
    planned = facts(*words, "plan=true")
    assert [one["mode"] for one in planned["plans"]] == ["none", "submodule", "model"]
    for one in planned["plans"][1:]:
        found = facts(*words, f"offload={one['mode']}")
        assert found["bytes_from_device"] == 0
        assert found["bytes_to_device"] == one["moved_bytes"]
        assert found["peak_weight_bytes"] == one["peak_bytes"]


def test_prefetching_brings_one_group_too_many(runs, facts):
    """The first group of a pass that never comes: nobody says which batch is the last."""
    (_, one, _) = facts("run=runs/seed0", "plan=true")["plans"]
    found = facts("run=runs/seed0", "offload=submodule")
    assert one["moved_bytes"] < found["bytes_to_device"] <= one["moved_bytes"] + one["peak_bytes"] / 2
    assert found["peak_weight_bytes"] == one["peak_bytes"]


def test_the_bus_is_measured(monkeypatch, facts, runs):
    monkeypatch.setattr(plan, "measure_bus", lambda device: measure_bus(device, seconds=0.05))
    found = facts("run=runs/seed0", "plan=true")
    assert found["bytes_per_second"] > 1e6
    assert 0 < found["seconds_per_copy"] < 1


def test_the_fastest_that_fits_is_chosen(monkeypatch, runs, facts, call):
    monkeypatch.setattr(plan, "_computing", lambda session: 1.0)  # beside which a network's copy disappears
    whole, parts, turns = (one["peak_bytes"] for one in facts("runs=runs/seed*", "plan=true")["plans"])
    assert parts < turns < whole
    assert facts("run=runs/seed0", "plan=true")["choice"] == "none"
    for budget, choice in ((None, "none"), (turns, "model"), (parts, "submodule"), (parts - 1, None)):
        asked = [] if budget is None else [f"budget={budget}"]
        assert facts("runs=runs/seed*", "plan=true", *asked)["choice"] == choice
    assert (
        f"Nothing fits budget={parts - 1}: the least is {parts}, offload=submodule."
        in call("runs=runs/seed*", "plan=true", f"budget={parts - 1}")[1]
    )
    assert not list(runs.glob("*/evaluations.jsonl"))


def test_computing_is_known_from_an_earlier_evaluation(runs, facts, call):
    words = ("run=runs/seed0", "plan=true", "budget=300kB")
    assert facts(*words)["compute_seconds"] is None
    assert "whose time is known after an evaluation with offload=none" in call(*words)[1]
    facts("run=runs/seed0", "offload=model")
    facts("run=runs/seed0", "batch=100")  # another way to compute
    assert facts(*words)["compute_seconds"] is None
    before = facts("run=runs/seed0")["seconds"]
    with (runs / "seed0" / "evaluations.jsonl").open("a") as file:
        file.write('5\n{"device": "cp')  # what cannot be read does not hide the rest
    known = facts(*words)
    assert known["compute_seconds"] == before
    assert all(one["seconds"] > before for one in known["plans"])
    assert "with computing" in call(*words)[1]
