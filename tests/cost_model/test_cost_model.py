"""An iteration as a sum, and what follows from it, against arithmetic by hand."""

import pytest

from largebatch.base.errors import UserError
from largebatch.cost_model.model import Question, fewest, nodes_for, predict
from largebatch.cost_model.profile import Pass, load
from largebatch.cost_model.stragglers import normal_maximum

PLAIN = Question(epochs=2, algorithm="halving_doubling", stragglers="none")


def test_one_gpu_computes_and_nothing_else(profile):
    one = predict(profile(), PLAIN, k=8, gpus=1)
    assert one.computing == pytest.approx(8 * 0.1 + 0.005)
    assert (one.exchange, one.stragglers, one.loading, one.efficiency) == (0, 0, 0, 1)
    # 32,000 images are 125 iterations of 256, and two epochs are run.
    assert (one.iterations, one.run) == (125, pytest.approx(2 * 125 * 0.805))
    assert one.gpu_hours == pytest.approx(2 * 125 * 0.805 / 3600)
    assert one.images_per_second == pytest.approx(256 / 0.805)


def test_what_four_gpus_wait_for(profile):
    four = predict(profile(), PLAIN, k=8, gpus=4)
    assert four.nodes == 2
    # Two passes a GPU, the last of which hides what it can: see test_exchange.
    assert (four.computing, four.exchange) == pytest.approx((0.205, 0.055))
    assert four.iteration == pytest.approx(0.260)
    assert four.efficiency == pytest.approx(0.205 / 0.260)
    assert four.exchange_hidden == pytest.approx(0.1 - 0.055)


def test_workers_are_computed_together_where_that_was_measured(profile):
    passes = tuple(Pass(workers, 100.0 + workers, 0.0, 60.0, ()) for workers in (1, 2, 8))
    measured = profile(passes=passes)
    for k, seconds in ((1, 0.101), (3, 3 * 0.101), (6, 3 * 0.102), (16, 2 * 0.108)):
        assert predict(measured, PLAIN, k=k, gpus=1).computing == pytest.approx(seconds + 0.005)


def test_the_slowest_gpu_is_waited_for_and_many_passes_even_out(profile):
    late = profile(passes=(Pass(1, 100.0, 7.0, 60.0, (95.0, 105.0)),))
    normal = predict(late, Question(), k=8, gpus=2)
    assert normal.stragglers == pytest.approx(2 * 0.007 * normal_maximum(2))  # four passes: √4 times
    assert predict(late, Question(stragglers="none"), k=8, gpus=2).stragglers == 0
    # The larger of two draws from 95 and 105 is 102.5 on average, 2.5 above their mean.
    assert predict(late, Question(stragglers="measured"), k=2, gpus=2).stragglers == pytest.approx(0.0025)
    with pytest.raises(UserError, match="stragglers=measured needs the steps that were measured"):
        predict(profile(), Question(stragglers="measured"), k=2, gpus=2)


def test_a_slow_loader_is_waited_for(profile):
    # 32 images at 200 a second take 160 ms, a step 105; validation takes 5 ms an image, not 40/32.
    slow = predict(profile(loading_images_per_second=200.0, val_images=100), PLAIN, k=1, gpus=1)
    assert (slow.loading, slow.iteration) == pytest.approx((0.055, 0.160))
    assert slow.validation == pytest.approx(0.5)
    fast = predict(profile(loading_images_per_second=2000.0, val_images=100), PLAIN, k=1, gpus=1)
    assert fast.loading == 0
    assert fast.validation == pytest.approx(100 * 0.040 / 32)


def test_gpus_are_spread_over_as_few_nodes_as_hold_them():
    assert [nodes_for(gpus, 8) for gpus in (1, 8, 12, 16, 352)] == [1, 1, 2, 2, 44]
    assert nodes_for(7, 4) == 7  # as many on each


@pytest.mark.parametrize(
    ("k", "gpus", "nodes", "sentence"),
    [
        (1, 2, None, "gpus=2 does not divide k=1: a GPU has whole workers. These do: 1."),
        (8, 3, None, "gpus=3 does not divide k=8: .* These do: 1, 2, 4, 8."),
        (8, 4, 3, "nodes=3 does not divide gpus=4. These do: 1, 2, 4."),
        (
            1001,
            1,
            None,
            "k=1001 workers of n=32 take 32032 samples .* the 32000 training images: use a k of 1000 or less",
        ),
    ],
)
def test_numbers_that_do_not_go_together(profile, k, gpus, nodes, sentence):
    with pytest.raises(UserError, match=sentence):
        predict(profile(), PLAIN, k, gpus, nodes)


def test_the_fewest_gpus_for_a_deadline(profile):
    runs = {p: predict(profile(), PLAIN, 8, p).run for p in (1, 2, 4, 8)}
    found = fewest(profile(), PLAIN, 8, runs[2], [8, 4, 2, 1], None)
    assert (found.gpus, found.run) == (2, runs[2])
    missed = fewest(profile(), PLAIN, 8, min(runs.values()) / 2, runs, None)
    assert missed.run == min(runs.values())


def test_links_that_no_deadline_needs_may_be_unknown(profile):
    known = profile(links=profile().links[:1])  # within a node of 2 GPUs
    two = predict(known, PLAIN, 8, 2)
    assert fewest(known, PLAIN, 8, two.run, [1, 2, 4, 8], None) == two
    with pytest.raises(UserError, match="4 GPUs on 2 nodes exchange gradients between nodes, but"):
        fewest(known, PLAIN, 8, 0.9 * two.run, [1, 2, 4, 8], None)


def test_the_papers_run_time():
    """Two of the four are what its profile was fitted to: 30 s an epoch at 11k, and 12 % more time than at 256."""
    paper = load("paper")
    few, hour, many = (predict(paper, Question(), k, k) for k in (8, 256, 352))
    assert (many.nodes, many.iterations) == (44, 113)
    assert many.epoch == pytest.approx(30, rel=0.01)
    assert many.iteration / few.iteration == pytest.approx(1.12, abs=0.002)
    # Not fitted: over 16 minutes an epoch on 8 GPUs, and an hour for 90 of them on 256.
    assert 16 * 60 < few.epoch < 32 * 60
    assert hour.run == pytest.approx(3600, rel=0.05)


def test_the_most_workers():
    most = predict(load("paper"), Question(epochs=1), 32_768, 32_768)
    assert most.nodes == 4096
    assert 0.5 < most.efficiency < 0.8
