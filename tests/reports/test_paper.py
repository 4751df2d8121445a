from pathlib import Path

import pytest

from largebatch.reports.paper import RECIPE, Beside, Published, beside, published
from largebatch.reports.selection import select

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"


def test_tables_hold_what_was_published():
    def errors(name):
        return [(row.kn, row.rate, row.error, row.std) for row in published(name).rows]

    assert errors("table1") == [
        (256, 0.1, 23.60, 0.12),
        (8192, 3.2, 24.84, 0.37),
        (8192, 3.2, 25.88, 0.56),
        (8192, 3.2, 23.74, 0.09),
    ]
    assert [row.error for row in published("table2a").rows] == [23.92, 23.60, 23.68, 24.27, 23.74, 24.05, 41.67, 26.22]
    assert [row.error for row in published("table2b").rows] == [23.84, 23.60, 24.11, 23.74]
    assert [row.error for row in published("table2c").rows] == [22.08, 22.36]
    figure = published("figure1").rows
    assert [row.kn for row in figure] == [2**power for power in range(6, 17)]
    assert [row.rate for row in figure] == [pytest.approx(0.1 * row.kn / 256) for row in figure]
    assert [row.error for row in figure] == [
        *(None, 23.49, 23.60, 23.48, 23.53, 23.49, 23.56, 23.74, 24.79, 27.55, 33.96),
    ]
    assert figure[0].band is None  # plotted without a number


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("imagenet_table*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_a_published_row(record, compose, tmp_path, path):
    """The experiments' heads state the published error: it is that of the row that their runs are put beside."""
    config = compose(f"experiment={path.stem}")
    keys = ("k", "n", "epochs", "lr.base", "lr.scaling", "warmup.name", "warmup.epochs", "schedule.milestones")
    values = config.to_mapping()
    settings = {key: values[key.split(".")[0]][key.split(".")[1]] if "." in key else values[key] for key in keys}
    whole = {"model": values["model"], "dataset": values["dataset"], **settings}
    record([30.0] * 90, settings=whole)
    groups = select([str(tmp_path / "runs")], "none").groups
    table = published(path.stem.split("_")[1])
    (row,) = (one.row for one in beside(table, groups) if one.group)
    assert f"{row.error:.2f} ± {row.std:.2f}" in path.read_text(encoding="utf-8")


IMAGENET = {
    **{key: value for key, value in RECIPE.items() if key not in ("dataset.name", "n")},
    "dataset.name": "imagenet",
    "dataset.train_images": 1281167,
    "dataset.crop": "resized",
    "model.name": "resnet50",
    "model.source": "torchvision",
}


@pytest.fixture
def group(record, tmp_path):
    """Return a function that writes seeds of kn = 8192 in the paper's recipe, and returns their group."""

    def make(*errors, **settings):
        for seed, error in enumerate(errors):
            record([error] * 90, k=256, seed=seed, settings={**IMAGENET, "warmup.name": "gradual", **settings})
        (made,) = select([str(tmp_path / "runs")], "none").groups
        return made

    return make


@pytest.mark.parametrize(
    ("errors", "within"),
    [
        ((23.7, 23.8), True),
        ((23.93, 23.93), False),  # the band is 23.74 ± 2 · 0.09, up to 23.92
        ((23.91,), True),
        ((23.55,), False),
    ],
)
def test_ours_within_the_published_band(group, errors, within):
    rows = beside(published("table1"), [group(*errors)])
    assert [one.group is not None for one in rows] == [False, False, False, True]
    assert rows[3].within is within
    assert rows[3].ours.seeds == len(errors)
    assert [one.within for one in rows[:3]] == [None] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"lr.base": 0.2},
        {"model.zero_gamma": False},
        {"model.name": "resnet101"},
        {"pitfall.name": "decay_bn"},
        {"optimizer.name": "lars"},
        {"n": 64},
        {"warmup.name": "constant"},
    ],
)
def test_another_experiment_is_not_the_row(group, change):
    row = published("figure1").rows[7]
    assert not row.is_of(group(23.74, **change))


def test_a_row_without_a_number_has_nothing_to_fall_within(group):
    assert Beside(Published("64", 64, 0.025, "none"), group(23.7)).within is None
