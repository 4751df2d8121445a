import csv
import io
import json
import math

import pytest

from largebatch.reports.rows import further_settings, make_rows, remarks
from largebatch.reports.selection import select
from largebatch.reports.tables import duration, table


@pytest.fixture
def selection(record, tmp_path):
    """A baseline and a group of three seeds each, a single one, and one of which a run diverged."""
    for seed, error in enumerate((10.0, 10.2, 10.4)):
        record(error, seed=seed, train_errors=[80.0, 50.0, 20.0 + seed, 12.0 + seed, 8.0 + seed, 6.0 + seed])
        curve = [85.0, 60.0, 30.0, 13.5, 9.5, 7.5]
        record(error + 0.1, k=16, seed=seed, seconds=90.0 + seed, images_per_second=2000.0 + seed, train_errors=curve)
    record(14.0, k=32)
    record(20.0, k=40, seed=0), record([80.0, 90.0], k=40, seed=1, status="diverged")
    record([50.0], k=40, seed=2, status="interrupted")
    return select([str(tmp_path / "runs")])


def test_rows_by_hand(selection):
    baseline, row, single, lost = make_rows(selection, 0.5)
    # 10.0, 10.2, 10.4: mean 10.2, std 0.2. Both: error √(2 · 0.04/3) = 0.1633, freedom 4, t(0.975, 4) = 2.776.
    assert (baseline.is_baseline, baseline.comparison, baseline.in_band_from) == (True, None, None)
    assert (baseline.error.mean, baseline.error.std) == (pytest.approx(10.2), pytest.approx(0.2))
    assert row.error.mean == pytest.approx(10.3)
    assert row.comparison.difference == pytest.approx(0.1)
    assert row.comparison.interval == (pytest.approx(0.1 - 0.4534, abs=1e-3), pytest.approx(0.1 + 0.4534, abs=1e-3))
    # t = (0.5 − 0.1)/0.1633 = 2.449, and t(0.95, 4) = 2.132.
    assert row.comparison.verdict == "equivalent"
    # The baseline's training errors from epoch 3 on have std 1: 30 lies outside 21 ± 2, 13.5 within 13 ± 2.
    assert row.in_band_from == 4
    assert (row.seconds, row.images_per_second) == (91.0, 2001.0)
    assert (single.comparison.difference, single.comparison.verdict) == (pytest.approx(3.8), None)
    assert lost.comparison.verdict == "diverged"
    assert lost.error.mean == 20.0


def test_text(selection):
    lines = table(selection, 0.5, "text", None).splitlines()
    assert lines[0] == "Top-1 validation error against the baseline (kn = 256, η = 0.1, no warmup), margin ± 0.5 points"
    cells = [line.split("  ") for line in lines[2:7]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    assert cells == [
        ["k", "n", "kn", "rate", "warmup", "seeds", "error %", "difference", "verdict", "in band", "time", "images/s"],
        ["8", "32", "256", "0.1", "none", "3", "10.20 ± 0.20", "–", "baseline", "–", "60 s", "1,000"],
        [
            *("16", "32", "512", "0.2", "none", "3", "10.30 ± 0.20", "+0.10 [-0.35, +0.55]", "equivalent", "from 4"),
            *("91 s", "2,001"),
        ],
        ["32", "32", "1024", "0.4", "none", "1", "14.00 ± –", "+3.80", "–", "from 6", "60 s", "1,000"],
        [
            *("40", "32", "1280", "0.5", "none", "1 of 3: 1 diverged, 1 unfinished", "20.00 ± –", "+9.80", "diverged"),
            *("never", "60 s", "1,000"),
        ],
    ]
    notes = " ".join(" ".join(lines[7:]).split())
    assert "kn = 1024, η = 0.4, no warmup: a single seed, so it has no std and no verdict." in notes
    assert "diverged after 2 epochs: it has no final error." in notes
    assert "is unfinished (interrupted, 1 of 6 epochs): it counts in no figure." in notes


def test_columns_of_text_are_aligned(selection):
    lines = table(selection, 0.5, "text", None).splitlines()[2:7]
    head = lines[0]
    for name in ("warmup", "verdict", "in band"):  # words to the left
        assert {line[head.index(name) - 1] for line in lines} == {" "}
        assert " " not in {line[head.index(name)] for line in lines}
    for name in ("images/s", "error %"):  # numbers to the right
        assert " " not in {line[head.index(name) + len(name) - 1] for line in lines}


def test_an_undecided_row_says_how_many_seeds_would_do(record, tmp_path):
    for seed, error in enumerate((10.0, 11.0)):
        record(error, seed=seed), record(error, k=16, seed=seed)
    selection = select([str(tmp_path / "runs")])
    more = make_rows(selection, 0.5)[1].comparison.further_seeds
    assert more > 1
    assert f"undecided, +{more} seeds" in table(selection, 0.5, "text", None)


def test_markdown_and_latex_have_the_cells_of_text(selection):
    markdown = table(selection, 0.5, "markdown", None)
    assert (
        "| 16 | 32 | 512 | 0.2 | none | 3 | 10.30 ± 0.20 | +0.10 [-0.35, +0.55] | equivalent | from 4 | 91 s | 2,001 |"
        in markdown.splitlines()
    )
    assert markdown.splitlines()[3] == "|--:|--:|--:|--:|---|--:|--:|--:|---|---|--:|--:|"
    latex = table(selection, 0.5, "latex", None)
    assert (
        r"16 & 32 & 512 & 0.2 & none & 3 & 10.30 $\pm$ 0.20 & +0.10 [$-$0.35, +0.55] & equivalent & from 4 & 91 s & "
        r"2,001 \\"
    ) in latex.splitlines()
    assert r"\caption{Top-1 validation error against the baseline (kn = 256, $\eta$ = 0.1, no warmup), margin" in latex
    assert latex.isascii() or all(line.startswith("%") for line in latex.splitlines() if not line.isascii())


def test_csv_and_json_hold_every_digit(selection):
    rows = list(csv.DictReader(io.StringIO(table(selection, 0.5, "csv", None))))
    values = json.loads(table(selection, 0.5, "json", None))
    (row,) = (row for row in make_rows(selection, 0.5) if row.group.k == 16)
    for found in (rows[1], values["rows"][1]):
        assert float(found["difference"]) == row.comparison.difference
        assert float(found["difference_high"]) == row.comparison.interval[1]
        assert float(found["error_std"]) == row.error.std
        assert (found["verdict"], int(found["seeds"]), int(found["in_band_from"])) == ("equivalent", 3, 4)
    assert rows[2]["error_std"] == rows[2]["verdict"] == ""
    assert values["rows"][2]["error_std"] is values["rows"][2]["verdict"] is None
    assert (rows[0]["verdict"], rows[3]["diverged"], rows[3]["unfinished"]) == ("baseline", "1", "1")
    assert values["baseline"] == selection.baseline.hash
    assert values["margin"] == 0.5
    assert values["rows"][0]["errors"] == [10.0, 10.2, 10.4]
    assert len(values["notes"]) == 4


def test_without_a_baseline_nothing_is_compared(selection, tmp_path):
    alone = select([str(tmp_path / "runs")], "none")
    text = table(alone, 0.5, "text", None)
    assert text.splitlines()[0] == "Top-1 validation error"
    assert "difference" not in text.splitlines()[2]
    assert next(csv.DictReader(io.StringIO(table(alone, 0.5, "csv", None))))["verdict"] == ""


def test_settings_that_differ_have_a_column(record, tmp_path):
    record(10.0), record(11.0, settings={"pitfall.name": "sync_bn"}), record(12.0, settings={"optimizer.name": "lars"})
    record(13.0, k=16, settings={"model.zero_gamma": False})
    selection = select([str(tmp_path / "runs")], "k=8,pitfall=none,optimizer=sgd")
    assert further_settings(selection) == ("model.zero_gamma", "optimizer.name", "pitfall")
    lines = table(selection, 0.5, "markdown", None).splitlines()
    assert lines[2].startswith("| k | n | kn | rate | warmup | model.zero_gamma | optimizer | pitfall | seeds |")
    assert lines[4].startswith("| 8 | 32 | 256 | 0.1 | none | true | sgd | none | 1 |")
    assert next(csv.DictReader(io.StringIO(table(selection, 0.5, "csv", None))))["optimizer"] == "sgd"


def test_rows_that_would_look_alike_are_told_apart(record, tmp_path):
    warmup = {"warmup.name": "gradual"}  # to 0.2 at kn = 512, from 0.1 or from 0.05
    (
        record(10.0, k=16, settings=warmup),
        record(11.0, k=16, settings={**warmup, "lr.base": 0.05, "lr.base_minibatch": 128}),
    )
    assert further_settings(select([str(tmp_path / "runs")], "none")) == ("lr.base",)


def test_what_rows_cannot_show_is_said(record, tmp_path):
    record([50.0], seed=0, status="running")
    record(10.0, k=16, seed=0, device="cpu"), record(11.0, k=16, seed=1, device="NVIDIA H200")
    selection = select([str(tmp_path / "runs")])
    said = remarks(selection)
    assert (
        "The baseline (kn = 256, η = 0.1, no warmup) has no finished run, so there is nothing to compare with." in said
    )
    assert "kn = 512, η = 0.2, no warmup: its times are of runs on several kinds of device (NVIDIA H200, cpu)." in said
    row = make_rows(selection, 0.5)[1]
    assert (row.comparison.difference, row.in_band_from) == (None, None)


def test_curves_of_other_lengths_are_not_laid_over_each_other(record, tmp_path):
    for seed in (0, 1):
        record(seed=seed)
        record([10.0] * 9, k=16, seed=seed, settings={"epochs": 9})
    row = make_rows(select([str(tmp_path / "runs")], allow_mixed=True), 0.5)[1]
    assert row.in_band_from is None
    assert row.comparison.difference == 0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (8.484, "8.48 s"), (119.0, "119 s"), (120.0, "2 min"), (5400.0, "90 min"), (7380.0, "2.05 h")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_published_rows_stand_alone():
    text = table(None, 0.5, "text", "table1").splitlines()
    assert text[0] == "Table 1: warmup, as published"
    assert text[6].split() == [
        *("gradual", "warmup", "8192", "3.2", "gradual", "23.74", "±", "0.09", "–", "–", "–", "–"),
    ]
    assert "no number" in table(None, 0.5, "text", "figure1")
    assert "Above kn = 65536 training diverged." in table(None, 0.5, "text", "figure1")
    rows = list(csv.DictReader(io.StringIO(table(None, 0.5, "csv", "figure1"))))
    assert [(row["kn"], row["published_mean"]) for row in rows[:2]] == [("64", ""), ("128", "23.49")]


def test_published_rows_beside_ours(record, tmp_path):
    imagenet = {
        "epochs": 90,
        "dataset.name": "imagenet",
        "dataset.train_images": 1281167,
        "dataset.crop": "resized",
        "model.name": "resnet50",
        "model.source": "torchvision",
    }
    for seed, error in enumerate((23.9, 24.1)):
        record([error] * 90, k=8, seed=seed, settings=imagenet)
        record([error - 0.3] * 90, k=256, seed=seed, settings={**imagenet, "warmup.name": "gradual"})
    record([25.0] * 90, k=128, settings=imagenet)
    selection = select([str(tmp_path / "runs")])
    text = table(selection, 0.5, "markdown", "table1")
    # 24.0 is not within 23.60 ± 0.24; 23.7 is within 23.74 ± 0.18.
    assert "| baseline | 256 | 0.1 | none | 23.60 ± 0.12 | 24.00 ± 0.14 | 2 | +0.40 | no |" in text
    assert "| gradual warmup | 8192 | 3.2 | gradual | 23.74 ± 0.09 | 23.70 ± 0.14 | 2 | -0.04 | yes |" in text
    assert "- Not an experiment of this table: kn = 4096, η = 1.6, no warmup." in text
    assert text.startswith("**Top-1 validation error against the baseline")
    values = json.loads(table(selection, 0.5, "json", "table1"))["published"]
    assert values["table"] == "table1"
    last = values["rows"][3]
    assert (last["published_mean"], last["within_band"]) == (23.74, True)
    assert math.isclose(last["error_mean"], 23.7)
    rows = list(csv.DictReader(io.StringIO(table(selection, 0.5, "csv", "table1"))))
    assert [row["within_band"] for row in rows] == ["False", "", "", "True"]
