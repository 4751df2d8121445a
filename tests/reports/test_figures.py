"""What figures draw equals what a hand computes from records with known numbers."""

import itertools
import math

import pytest
from matplotlib.text import Text
from recorded_runs import changed

from largebatch.base.errors import UserError
from largebatch.config.pitfalls import PITFALLS
from largebatch.config.schedule import schedule_of
from largebatch.records.check import flat
from largebatch.reports.figures import curves, rates, run_time, scaling, style, throughput
from largebatch.reports.figures.curves import CurveOptions
from largebatch.reports.paper import RunTime, published, run_times
from largebatch.reports.selection import select

BASELINE = {"lr.base_minibatch": 32}  # n = 32: k = 1


@pytest.fixture(autouse=True)
def _styled():
    with style.styled():
        yield


@pytest.fixture
def runs(tmp_path):
    """Return a function that selects every run that the test has recorded."""
    return lambda baseline=None: select([str(tmp_path / "runs")], baseline)


def line(axes, **wanted):
    """Return the one line of a panel that looks so."""
    (found,) = (
        one for one in axes.lines if all(getattr(one, f"get_{key}")() == value for key, value in wanted.items())
    )
    return found


def legend(figure_or_axes):
    return [text.get_text() for text in figure_or_axes.get_legend().get_texts()]


def test_curves_are_means_over_seeds_with_a_band_of_one_std(record, runs):
    for seed, error in enumerate((1.0, 2.0, 4.5)):
        record(
            [80.0, 40.0, 20.0, error, error, error],
            train_errors=[90.0, 45.0, 22.0, error, error, error],
            seed=seed,
            k=1,
            settings=BASELINE,
        )
    for seed, error in enumerate((6.0, 8.0)):
        record([80.0, 60.0, 30.0, error, error, error], seed=seed, k=4, settings=BASELINE)
    (panel,) = curves.draw(runs(), CurveOptions()).axes
    validation = line(panel, color="#000000", linewidth=2.8)
    assert validation.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert validation.get_ydata() == pytest.approx([80, 40, 20, 2.5, 2.5, 2.5])
    assert line(panel, color="#000000", linewidth=1.4).get_ydata() == pytest.approx([90, 45, 22, 2.5, 2.5, 2.5])
    assert line(panel, color=curves.GROUP.colour, linewidth=2.0).get_ydata() == pytest.approx([80, 60, 30, 7, 7, 7])
    # The medians of the last five epochs are the errors themselves. (1 - 2.5)² + (2 - 2.5)² + (4.5 - 2.5)² = 6.5, and
    # √(6.5/2) = 1.803; (6 - 7)² + (8 - 7)² = 2, and √2 = 1.414.
    assert legend(panel) == ["baseline: 2.50 ± 1.80 %", "k = 4: 7.00 ± 1.41 %"]
    band = next(
        one for one in panel.collections if one.get_gid() == "band" and tuple(one.get_facecolor()[0][:3]) == (0, 0, 0)
    )
    last = [y for x, y in band.get_paths()[0].vertices if x == 6]
    assert (min(last), max(last)) == pytest.approx((2.5 - 1.8028, 2.5 + 1.8028), abs=1e-3)
    assert panel.get_title() == "kn = 128, η = 0.4, no warmup"


def test_runs_that_are_not_done_are_drawn_and_counted_apart(record, runs):
    record(5.0, k=1, settings=BASELINE)
    record(7.0, k=4, seed=0, settings=BASELINE)
    record([90.0, 90.0], k=4, seed=1, settings=BASELINE, status="diverged")
    record([90.0, 60.0, 50.0], k=4, seed=2, settings=BASELINE, status="interrupted")
    figure = curves.draw(runs(), CurveOptions(show="validation"))
    (panel,) = figure.axes
    assert legend(panel)[1] == "k = 4: 7.00 % (one seed),\n1 of 3 diverged, 1 of 3 unfinished"
    assert line(panel, marker="x").get_ydata().tolist() == [90, 90]
    assert line(panel, marker=">").get_ydata().tolist() == [90, 60, 50]
    assert line(panel, color=curves.GROUP.colour, linewidth=2.0).get_ydata()[2] == 6.0  # the finished one alone
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_warmup_is_shaded_and_decays_are_marked(record, runs):
    record(5.0, k=1, settings=BASELINE)
    warm = {"warmup.name": "gradual", "warmup.epochs": 1.5, "schedule.milestones": [2, 4]}
    record(7.0, k=4, settings=BASELINE | warm)
    (panel,) = curves.draw(runs(), CurveOptions()).axes
    (shade,) = panel.patches
    assert (shade.get_x(), shade.get_width()) == (0, 1.5)
    dotted = [one.get_xdata()[0] for one in panel.lines if one.get_color() == "#888888"]
    assert dotted == [2, 4]
    # 10 iterations an epoch: 1.5 epochs are 15 iterations, of 4 × 32 images.
    (panel,) = curves.draw(runs(), CurveOptions(x="images")).axes
    assert panel.patches[0].get_width() == 15 * 128


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ("epochs", [1, 2, 3, 4, 5, 6]),
        ("iterations", [10, 20, 30, 40, 50, 60]),
        ("images", [640, 1280, 1920, 2560, 3200, 3840]),
        ("hours", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_x_axes(record, runs, x, expected):
    record(5.0, k=2, settings={"lr.base_minibatch": 64}, seconds=6 * 3600.0)
    (panel,) = curves.draw(runs(), CurveOptions(x=x)).axes
    assert line(panel, linewidth=2.8).get_xdata() == pytest.approx(expected)


def test_smoothing_is_a_trailing_mean(record, runs):
    record([60.0, 30.0, 30.0, 12.0, 6.0, 0.0], k=1, settings=BASELINE)
    (panel,) = curves.draw(runs(), CurveOptions(smooth=3)).axes
    assert line(panel, linewidth=2.8).get_ydata() == pytest.approx([60, 45, 40, 24, 16, 6])


def test_what_was_not_measured_is_refused(record, runs):
    record(5.0, k=1, settings=BASELINE)
    with pytest.raises(UserError, match=r"None of these runs has val_error_recomputed: they were trained without"):
        curves.draw(runs(), CurveOptions(recomputed=True))
    with pytest.raises(UserError, match=r"metric=top5 is measured only in validation"):
        CurveOptions(metric="top5", show="train")


def sweep(record, spread=0.05):
    """Record k = 1, 2, 4, 8 around 5 %, but 8 around 9 %; three seeds each."""
    for k, error in ((1, 5.0), (2, 5.0), (4, 5.1), (8, 9.0)):
        for seed in range(3):
            record(error + spread * (seed - 1), k=k, seed=seed, settings=BASELINE, images_per_second=1000.0 * k)


def test_scaling_draws_two_stds_and_marks_the_largest_equivalent(record, runs):
    sweep(record)
    (panel,) = scaling.draw(runs(), None, 0.5).axes
    # Seeds at -0.05, 0 and +0.05 around a mean have a std of 0.05.
    ends = sorted((round(float(y), 3)) for bar in panel.containers for y in bar.lines[2][0].get_segments()[0][:, 1])
    assert ends == [4.9, 5.0, 5.1, 5.2, 8.9, 9.1]
    assert [round(float(bar.lines[0].get_ydata()[0]), 6) for bar in panel.containers] == [5.0, 5.1, 9.0]
    assert "largest equivalent within ± 0.5: k = 4" in legend(panel)
    assert "baseline, k = 1: 5.00 ± 0.05 %" in legend(panel)
    assert [text.get_text() for text in panel.get_xticklabels()] == ["32", "64", "128", "256"]


def test_the_largest_equivalent_lies_below_the_first_that_is_worse(record, runs):
    sweep(record)
    for seed in range(3):
        record(5.0 + 0.05 * seed, k=16, seed=seed, settings=BASELINE)
    (panel,) = scaling.draw(runs(), None, 0.5).axes
    assert "largest equivalent within ± 0.5: k = 4" in legend(panel)


def test_a_row_is_one_way_to_warm_up_and_begins_where_none_can(record, runs):
    record(5.0, k=1, settings=BASELINE)
    for warmup, k in itertools.product(("none", "gradual"), (2, 4)):
        record(5.0, k=k, settings=BASELINE | {"warmup.name": warmup})
    rows = scaling.rows_of(runs().groups)
    assert [[(group.k, group.warmup) for group in row] for row in rows] == [
        [(1, "none"), (2, "none"), (4, "none")],
        [(1, "none"), (2, "gradual"), (4, "gradual")],
    ]


def test_published_points_are_drawn_without_a_run():
    (panel,) = scaling.draw(None, published("figure1"), 0.5).axes
    points, _, (bars,) = panel.containers[0].lines
    kn = [2**power for power in range(7, 17)]
    errors = [23.49, 23.60, 23.48, 23.53, 23.49, 23.56, 23.74, 24.79, 27.55, 33.96]
    assert list(zip(*points.get_data(), strict=True)) == list(zip(kn, errors, strict=True))
    low, high = bars.get_segments()[-1][:, 1]
    assert (low, high) == pytest.approx((33.96 - 1.6, 33.96 + 1.6))
    assert [text.get_text() for text in panel.get_xticklabels()][-3:] == ["16k", "32k", "64k"]


def test_published_points_stand_beside_runs_on_other_data(record, runs):
    record(5.0, k=1, settings=BASELINE)
    ours, theirs = scaling.draw(runs(), published("figure1"), 0.5).axes
    assert (ours.get_title(), theirs.get_title()) == ("resnet8 on digits", "ResNet-50 on ImageNet, published")


SCHEDULES = [
    {"warmup.name": "none"},
    {"warmup.name": "constant", "warmup.epochs": 2.5},
    {"warmup.name": "gradual", "schedule.milestones": [3, 7.5], "schedule.factor": 0.5},
    {"warmup.name": "gradual", "schedule.name": "cosine"},
    {"warmup.name": "gradual", "lr.scaling": "sqrt"},
    *({"warmup.name": "gradual", "pitfall.name": pitfall} for pitfall in PITFALLS),
]


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_rates_are_those_that_training_uses(compose, settings):
    config = changed(compose(), {"epochs": 10, "k": 8, "lr.base_minibatch": 32, **settings})
    expected = config.rates(1437)
    assert schedule_of(flat(config.experiment("fp32")), config.iterations_per_epoch(1437)) == expected


def test_rates_are_drawn_at_every_corner(record, runs):
    record(5.0, k=4, settings={"warmup.name": "gradual", "warmup.epochs": 2.0, "schedule.milestones": [4], **BASELINE})
    (group,) = runs("none").groups
    x, y = rates.rates(group, "iterations")  # the record says 10 iterations an epoch
    drawn = dict(zip(x.tolist(), y.tolist(), strict=True))
    assert (drawn[0], drawn[1]) == pytest.approx((0.1, 0.115))  # from 0.1 to 0.4 in 20 iterations
    assert (drawn[20], drawn[39], drawn[40], drawn[60]) == pytest.approx((0.4, 0.4, 0.04, 0.04))


def test_throughput_and_its_ideal(record, runs):
    for processes, speed in ((1, 1000.0), (2, 1800.0), (4, 3000.0)):
        for seed in (0, 1):
            parent = f"runs/{processes}"
            record(5.0, k=4, seed=seed, images_per_second=speed + 100 * seed, processes=processes, parent=parent)
    (name, points), *others = throughput.measured(runs("none"), "processes")
    assert (name, others) == ("k = 4, on cpu", [])
    assert [(point.x, point.median) for point in points] == [(1, 1050), (2, 1850), (4, 3050)]
    assert throughput.ideal(points) == [1050, 2100, 4200]
    # 128 images: 128 ms at 1,000 images/s, 116.4 at 1,100; the median of two is their mean.
    assert points[0].median_ms == pytest.approx((128 + 128 / 1.1) / 2)
    by_k = throughput.measured(runs("none"), "k")
    assert [name for name, _ in by_k] == ["1 process on cpu", "2 processes on cpu", "4 processes on cpu"]


def overlaps(figure):
    """Return pairs of texts that cover one another."""
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    inside = [(words, box) for words, box in boxes if box.width and figure.bbox.overlaps(box)]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(inside, 2)
        if a.padded(-1).overlaps(b.padded(-1))
    ]


@pytest.mark.parametrize("groups", [1, 3, 11])
def test_no_label_covers_another(record, runs, groups):
    for number, warmup in itertools.islice(itertools.product(range(6), ("none", "gradual")), groups + 1):
        settings = BASELINE | {"warmup.name": warmup}
        for seed in (0, 1):
            record(5.0 + number + seed, k=2**number, seed=seed, settings=settings)
        record([90.0], k=2**number, seed=2, settings=settings, status="diverged")
    selection = runs()
    figures = [curves.draw(selection, CurveOptions()), rates.draw(selection, "epochs"), throughput.draw(selection, "k")]
    for figure in (*figures, scaling.draw(selection, published("figure1"), 0.5)):
        assert overlaps(figure) == []


def test_many_groups_look_different():
    looks = [style.look(number) for number in range(200)]
    assert len(set(map(str, looks))) == 200
    assert style.BASELINE.colour not in style.COLOURS


def contrast(colour, ground="#ffffff"):
    """Return the ratio of luminances (WCAG 2, 1.4.11)."""

    def luminance(text):
        parts = [int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_stand_out_on_white():
    assert min(map(contrast, style.COLOURS)) > 3
    assert math.isclose(contrast("#000000"), 21)


def test_run_time_beside_the_published(tmp_path):
    told = [
        run_time.Told(kn=256, gpus=8, seconds=0.25, without_stragglers=0.2),
        run_time.Told(kn=512, gpus=16, seconds=0.32, without_stragglers=0.2),
    ]
    figure = run_time.draw((RunTime(512, 0.3, "so it says"),), told, "a GPU")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[250, 320], [200, 200], [300]]
    # 256 / 0.25 = 1024 images/s on 8 GPUs, ideally twice as many on 16; 512 / 0.32 are 1600.
    predicted, without, published_speed, ideal = (line.get_ydata().tolist() for line in right.lines)
    assert (predicted, ideal) == ([1024, 1600], [1024, 2048])
    assert without == pytest.approx([1280, 2560])
    assert (right.lines[2].get_xdata().tolist(), published_speed) == ([16], [pytest.approx(512 / 0.3)])


def test_the_published_run_times_follow_from_the_text():
    small, hour, large = run_times()
    assert large.seconds * (1_281_167 // large.kn) == pytest.approx(30, rel=1e-3)
    assert large.seconds / small.seconds == pytest.approx(1.12, rel=1e-3)
    assert hour.seconds * (1_281_167 // hour.kn) * 90 == pytest.approx(3600, rel=1e-3)


def test_predictions_are_drawn_over_what_was_measured(record, runs):
    for processes, speed in ((1, 1000.0), (2, 1800.0)):
        record(5.0, k=4, images_per_second=speed, processes=processes, parent=f"runs/{processes}")
    images, time = throughput.draw(runs("none"), "processes", lambda speed: 0.128 / speed.processes).axes
    assert line(images, marker="x").get_ydata().tolist() == [1000, 2000]
    assert line(time, marker="x").get_ydata().tolist() == [128, 64]
