"""The rule that makes an answer of probes, on records whose numbers a hand can follow."""

import itertools
import math

import pytest
from recorded_runs import end_point
from recorded_runs import probe_line as line

from largebatch.base.errors import UserError
from largebatch.records.write import write_probes
from largebatch.reports.answer import answer, fits, largest_by_drift, noise_scale, open_probed, trained
from largebatch.reports.figures import probe as figure
from largebatch.reports.figures import style
from largebatch.reports.probes import as_text, facts
from largebatch.reports.selection import select

BASELINE = {"lr.base_minibatch": 32, "epochs": 90, "lr.base": 0.1}


@pytest.fixture
def probed(record):
    """Return a function that records a baseline of k = 1, n = 32 with these probes, and opens it."""

    seeds = itertools.count()

    def make(*lines):
        directory = record([10.0] * 90, k=1, seed=next(seeds), settings=BASELINE)
        write_probes(directory, lines)
        return open_probed(directory)

    return make


def test_only_probes_at_the_full_rate_after_the_warmup_s_share_count(probed):
    run = probed(line(0, 1), line(4, 2), line(5, 6), line(20, 4), line(30, 8, rate=0.01), line(40, 8, rate=0.01))
    assert [one["epoch"] for one in run.main_phase()] == [5, 20]
    said = answer(run)
    assert (said.probes, said.drift, said.drift_range) == (2, 4, (4, 6))


def test_drift_is_the_largest_k_before_the_first_end_point_that_is_wrong_by_more_than_the_way():
    assert largest_by_drift({"end_point": [0.0, 0.5, 1.0, 1.01, 0.2]}) == 3
    assert largest_by_drift({"end_point": [0.0, 0.5, None, 0.2]}) == 2  # the steps diverged
    assert largest_by_drift({"end_point": [0.0, 0.5]}) == 2


def test_the_noise_scale_is_a_ratio_of_means_and_hidden_where_the_gradient_is():
    lines = [line(5, squared=2.0, trace=100.0), line(6, squared=-0.5, trace=200.0)]
    assert noise_scale(lines) == pytest.approx(200.0)
    assert noise_scale(lines[1:]) == math.inf


def test_up_to_the_smaller_k_is_safe_and_beyond_the_larger_it_is_not(probed):
    by_noise = answer(probed(line(10, 7, trace=96.0), line(20, 7, trace=192.0)))
    assert (by_noise.noise, by_noise.safe, by_noise.unsafe) == (4.5, 4, 7)
    assert by_noise.noise_error == pytest.approx(1.5)  # 3 and 6, leaving one out
    by_drift = answer(probed(line(10, 3, trace=320.0)))
    assert (by_drift.safe, by_drift.unsafe) == (3, 10.0)
    assert math.isnan(by_drift.noise_error)


def test_between_two_k_that_are_one_lies_no_doubt(probed):
    run = probed(line(10, 4, trace=4.3 * 32))
    said = answer(run)
    assert (said.safe, said.unsafe) == (4, 4.3)
    assert "up to k = 4 (kn = 128) should match the baseline; beyond it should not." in as_text(run, said, [])


def test_what_was_followed_no_further_is_no_bound(probed):
    run = probed(line(10, 8, squared=-1.0))
    said = answer(run)
    assert (said.drift, said.steps, said.safe, said.unsafe) == (8, 8, 8, math.inf)
    text = as_text(run, said, [])
    assert "k = at least 8 (a single probe)" in text
    assert "any k: the noise hides the gradient" in text
    assert "nothing measured speaks against a larger one" in text


def test_probes_of_different_lengths_bound_nothing_beyond_the_shortest(probed):
    short = line(10, 8)
    short["end_point"] = short["end_point"][:4]
    run = probed(line(5, 8), short)
    said = answer(run)
    assert (said.steps, said.drift, said.unsafe) == (4, 4, math.inf)
    text = as_text(run, said, [])
    assert "2 probes of 4 small steps" in text
    assert "k = at least 4 (4 to 8 over 2 probes)" in text


@pytest.mark.parametrize(
    ("lines", "needed", "epochs"),
    [
        ([line(0, 8)], False, None),
        ([line(0, 2), line(1, 4), line(2, 5)], True, 2),
        ([line(0, 8, sharpness=10.0), line(3, 8, sharpness=2.0)], True, 3),  # 5 · 0.1 · 10 is above the bound
        ([line(0, 2, rate=0.02)], None, None),  # the run itself warmed up
    ],
)
def test_a_warmup_lasts_until_nothing_speaks_against_the_answer(probed, lines, needed, epochs):
    said = answer(probed(*lines, line(10, 5)))
    assert said.safe == 5
    assert (said.warmup, said.warmup_epochs) == (needed, epochs)


def test_a_warmup_without_an_end_is_said(probed):
    run = probed(line(0, 8, sharpness=10.0), line(10, 5, sharpness=10.0))
    text = as_text(run, answer(run), [])
    assert "needed for k = 5: at the start e allows k = 8, and kη λ_max = 5.00 of 1.36. No probe says for how" in text


def test_probes_outside_the_main_phase_are_no_answer(probed):
    with pytest.raises(
        UserError, match=r"no probe at its full rate after 5\.6% of its epochs and before the first decay"
    ):
        answer(probed(line(0), line(60, rate=0.01)))


def test_a_run_without_probes_is_told_how_to_get_them(record):
    with pytest.raises(UserError, match=r"was not probed: train with probe\.every=1, or keep checkpoints"):
        open_probed(record(10.0, k=1))


def test_the_answer_stands_beside_what_training_showed(probed, record, tmp_path):
    run = probed(line(0), line(10, 4))
    for k, errors in ((1, (10.0, 10.1)), (4, (10.05, 10.1)), (16, (15.0, 15.1)), (32, (10.0, 30.0))):
        for seed, error in enumerate(errors, start=1):
            record([error] * 90, k=k, seed=seed, settings=BASELINE)
    selection = select([str(tmp_path / "runs")])
    fits(run, selection)
    (one,) = trained(selection, margin=1.0)
    assert [(k, verdict) for k, verdict, _ in one.verdicts] == [(4, "equivalent"), (16, "worse"), (32, "undecided")]
    assert (one.largest_equivalent, one.first_worse, one.largest) == (4, 16, 4)
    text = as_text(run, answer(run), [one])
    assert "the largest equivalent k is 4, the first worse is 16; said was 4." in text
    values = facts(run, answer(run), [one])
    assert values["answer"]["safe"] == 4
    assert values["trained"][0]["first_worse"] == 16


def test_a_sweep_of_another_task_is_refused(probed, record, tmp_path):
    run = probed(line(10))
    record(10.0, parent="other", k=1, settings={**BASELINE, "epochs": 6})
    with pytest.raises(UserError, match=r"of another task than .*: they differ in epochs"):
        fits(run, select([str(tmp_path / "other")]))


def test_the_figure_draws_drift_noise_and_sharpness_and_shades_the_warmup(record, tmp_path):
    warmed = {**BASELINE, "warmup.name": "gradual", "warmup.epochs": 5}
    directory = record([10.0] * 90, k=2, settings=warmed)
    lines = [line(epoch, 3, squared=1.0, trace=100.0 + epoch, sharpness=5.0) for epoch in range(0, 90, 9)]
    write_probes(directory, [*lines, line(90, squared=-1.0)])
    with style.styled():
        drift, noise, sharp = figure.draw(select([str(tmp_path / "runs")], "none"), "end_point").axes
    drawn = [0, 18, 36, 54, 90]  # most of them early
    assert [text.get_text() for text in drift.get_legend().get_texts()] == [f"epoch {epoch}" for epoch in drawn]
    assert list(drift.lines[0].get_ydata()) == end_point(3)
    assert list(noise.lines[0].get_ydata()) == [100.0 + epoch for epoch in range(0, 90, 9)]
    assert list(sharp.lines[0].get_ydata()) == [0.5] * 10 + [0.1]
    for panel in (noise, sharp):
        assert "warmup" in [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_figure_of_runs_that_were_not_probed_is_refused(record, tmp_path):
    record(10.0, k=1, settings=BASELINE | {"epochs": 6})
    with pytest.raises(UserError, match="None of these runs was probed"):
        figure.draw(select([str(tmp_path / "runs")], "none"), "end_point")
