from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largebatch.config.schedule import RateSchedule, reference_rate

# kn = 8192 on ImageNet: 156 iterations an epoch, 5 epochs of warmup, 90 in all.
PAPER = RateSchedule(
    base=0.1,
    reference=3.2,
    warmup="gradual",
    iterations_per_epoch=156,
    warmup_iterations=780,
    decay="step",
    milestone_iterations=(4680, 9360, 12480),
    factor=0.1,
    total_iterations=14040,
)


@pytest.mark.parametrize(
    ("minibatch", "scaling", "rate"),
    [(64, "linear", 0.025), (256, "linear", 0.1), (8192, "linear", 3.2), (8192, "sqrt", 0.565685), (8192, "none", 0.1)],
)
def test_reference_rate(minibatch, scaling, rate):
    assert reference_rate(0.1, minibatch, 256, scaling) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [
        (0, 0.1),
        (1, 0.1 + 3.1 / 780),
        (390, 1.65),
        (779, 3.2 - 3.1 / 780),
        (780, 3.2),
        (4679, 3.2),
        (4680, 0.32),
        (9359, 0.32),
        (9360, 0.032),
        (12480, 0.0032),
        (14039, 0.0032),
    ],
)
def test_the_papers_rates(iteration, rate):
    assert PAPER.rate_at(iteration) == pytest.approx(rate, rel=1e-12)


def test_constant_warmup_jumps_at_its_end():
    rates = replace(PAPER, warmup="constant")
    assert [rates.rate_at(i) for i in (0, 779, 780)] == [0.1, 0.1, 3.2]


def test_no_warmup_starts_at_the_reference_rate():
    assert replace(PAPER, warmup="none").rate_at(0) == 3.2


@pytest.mark.parametrize("reference", [0.05, 0.1])
def test_warmup_takes_place_only_where_the_reference_rate_is_above_the_base(reference):
    rates = replace(PAPER, reference=reference)
    assert rates.warming == 0
    assert rates.rate_at(0) == reference


def test_a_decay_during_warmup_waits_for_its_end():
    rates = replace(PAPER, warmup_iterations=10, milestone_iterations=(4,))
    assert rates.rate_at(5) == pytest.approx(0.1 + 3.1 / 2)
    assert rates.rate_at(10) == pytest.approx(0.32)


def test_cosine_starts_at_the_end_of_warmup_and_reaches_zero():
    rates = replace(PAPER, decay="cosine", warmup_iterations=40, total_iterations=140)
    assert rates.rate_at(40) == pytest.approx(3.2)
    assert rates.rate_at(90) == pytest.approx(1.6)
    assert rates.rate_at(65) == pytest.approx(3.2 * 0.8535533905932737)  # (1 + cos 45°) / 2
    assert rates.rate_at(140) == pytest.approx(0, abs=1e-15)


@given(
    warmup=st.integers(1, 500),
    reference=st.floats(0.2, 50),
    milestones=st.lists(st.integers(501, 5000), max_size=4, unique=True),  # later: else the last rise is decayed
)
def test_a_rate_rises_by_a_constant_step_then_only_falls(warmup, reference, milestones):
    rates = replace(
        PAPER, warmup_iterations=warmup, reference=reference, milestone_iterations=tuple(sorted(milestones))
    )
    rising = [rates.rate_at(i) for i in range(warmup + 1)]
    steps = [after - before for before, after in pairwise(rising)]
    assert steps == pytest.approx([(reference - 0.1) / warmup] * warmup, rel=1e-6)
    falling = [rates.rate_at(i) for i in range(warmup, 5001)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(reference * 0.1 ** len(milestones))


def test_turning_points_say_where_the_rate_changes():
    assert PAPER.turning_points() == [
        (0, "start"),
        (780, "after warmup"),
        (4680, "× 0.1"),
        (9360, "× 0.1"),
        (12480, "× 0.1"),
        (14039, "last"),
    ]


def schedule(**changed):
    """Return 6 epochs of 10 iterations, from 0.1 to 0.8."""
    usual = {"base": 0.1, "reference": 0.8, "warmup": "none", "iterations_per_epoch": 10, "warmup_iterations": 3}
    usual |= {"decay": "step", "milestone_iterations": (20, 40), "factor": 0.1, "total_iterations": 60}
    return RateSchedule(**(usual | changed))


def test_equal_rates_have_equal_changes_however_they_are_described():
    plain = schedule(warmup="none")
    assert schedule(warmup="gradual", warmup_iterations=0).changes() == plain.changes()
    assert schedule(warmup="constant", reference=0.1).changes() == schedule(warmup="none", reference=0.1).changes()
    assert schedule(warmup="gradual", warmup_iterations=3).changes() != plain.changes()
    gradual = schedule(warmup="gradual", warmup_iterations=3)
    steps = dict(gradual.changes())
    latest = 0.0
    for iteration in range(gradual.total_iterations):
        latest = steps.get(iteration, latest)
        assert latest == gradual.rate_at(iteration)


def test_notes_name_what_does_not_take_place():
    assert schedule(warmup="gradual", warmup_iterations=0).notes() == [
        "the gradual warmup does not take place: it is shorter than half an iteration, and an epoch has 10"
    ]
    assert schedule(warmup="constant", reference=0.1).notes() == []  # the usual case of a small minibatch
    assert schedule(warmup="none", milestone_iterations=(0, 40, 40)).notes() == [
        "a milestone falls on iteration 0: the rate is decayed from the start",
        "several milestones fall on iteration 40: the rate is decayed by all of them at once",
    ]
    assert schedule(warmup="gradual", warmup_iterations=3).notes() == []
