"""Recorded runs as objects, tables and figures."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

import largebatch
from largebatch.cli import main as cli


def test_a_run_has_its_configuration_and_epochs(trained):
    assert (trained.status, trained.seed, trained.config.minibatch) == ("done", 0, 16)
    first, second = trained.epochs(frame=False)
    assert (first["epoch"], first["iteration"], second["epoch"]) == (1, 4, 2)
    assert isinstance(first["epoch"], int)
    assert trained.final_error == pytest.approx((first["val_error"] + second["val_error"]) / 2)
    assert trained.summary["iterations"] == 8
    assert trained.images_per_second > 0
    assert repr(trained).endswith(f"k=2, n=8, seed=0, done, error {trained.final_error:.2f} %>")


def test_epochs_are_a_frame_where_pandas_is_installed(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns)))
    rows, columns = trained.epochs(frame=True)
    assert rows == trained.epochs(frame=False)
    assert columns[0] == "epoch"
    assert list(rows[0]) == columns


def test_runs_are_found_by_directory_glob_and_run(digits_runs, monkeypatch):
    seeds = largebatch.runs(digits_runs / "seed*")
    assert [run.seed for run in seeds] == [0, 1, 2, 3, 4, 5]
    assert len(largebatch.runs(digits_runs)) == 7
    assert [run.directory for run in largebatch.runs([seeds[0], str(digits_runs / "seed1")])] == [
        digits_runs / "seed0",
        digits_runs / "seed1",
    ]
    monkeypatch.chdir(digits_runs.parent)
    with pytest.raises(largebatch.UserError, match="runs=runs matches no run"):
        largebatch.runs()
    with pytest.raises(largebatch.UserError, match="holds 7 runs: give one"):
        largebatch.Run(digits_runs)


def test_a_damaged_record_is_left_out_with_a_warning(trained, tmp_path):
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
        for file in ("provenance.json", "summary.json", "metrics.jsonl", "config.yaml"):
            (tmp_path / name / file).write_bytes((trained.directory / file).read_bytes())
    (tmp_path / "damaged" / "provenance.json").write_text("{")
    with pytest.warns(UserWarning, match=r"provenance.json is not JSON. It was left out"):
        (kept,) = largebatch.runs(tmp_path)
    assert kept.directory == tmp_path / "whole"
    with pytest.warns(UserWarning, match="was left out, its record is corrupt"):
        largebatch.table(tmp_path, baseline="none")


def test_a_table_prints_as_the_command_does(digits_runs, capsys):
    assert cli.run(["table", f"runs={digits_runs}/seed*", "baseline=k=2"]) == 0
    table = largebatch.table(largebatch.runs(digits_runs / "seed*"), baseline="k=2")
    assert capsys.readouterr().out == f"{table}\n" == f"{table!r}\n"
    (row,) = table.rows
    assert (row["k"], row["seeds"]) == (2, 6)
    assert table.to("markdown").startswith("**Top-1 validation error")
    assert table.selection.baseline.k == 2
    html = table._repr_html_()
    assert html.startswith("<table><caption>Top-1 validation error against the baseline (kn = 32")
    assert html.count("<tr>") == 2
    assert '<td style="text-align: right">32</td>' in html


def test_a_table_of_the_paper_needs_no_run(capsys):
    assert cli.run(["table", "paper=table1"]) == 0
    table = largebatch.table(paper="table1")
    assert capsys.readouterr().out == f"{table}\n"
    assert any(math.isclose(row["published_mean"], 23.6) for row in table.rows)
    assert json.loads(table.to("json"))["published"]["table"] == "table1"


def test_html_shows_a_name_as_text(digits_runs, monkeypatch):
    table = largebatch.table(digits_runs / "seed0", baseline="none")
    monkeypatch.setattr("largebatch.reports.selection.Group.warmup", "<b>none</b>")
    assert "&lt;b&gt;none&lt;/b&gt;" in table.to("html")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"runs": "nowhere"}, "runs=nowhere matches no run"),
        ({"runs": []}, "no runs were given"),
        ({"paper": "table9"}, "paper=table9 is not known"),
        ({"notes": "some"}, "notes=some is not known"),
    ],
)
def test_a_mistake_of_a_table_is_one_sentence(keys, sentence):
    with pytest.raises(largebatch.UserError, match=sentence):
        largebatch.table(**keys)


def test_figures_are_matplotlibs_and_a_notebook_shows_them(digits_runs):
    runs = largebatch.runs(digits_runs / "seed*")
    for draw in (largebatch.plot.curves, largebatch.plot.scaling, largebatch.plot.rates, largebatch.plot.throughput):
        figure = draw(runs, baseline="k=2")
        assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(largebatch.UserError, match="metric=accuracy is not known"):
        largebatch.plot.curves(runs, metric="accuracy")
    with pytest.raises(largebatch.UserError, match="smooth=0 is too small"):
        largebatch.plot.curves(runs, smooth=0)
