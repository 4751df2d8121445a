"""Files are signed, equal for equal figures, and never written over somebody else's."""

from pathlib import Path

import pytest
from recorded_runs import probe_line

from largebatch.base.errors import UserError
from largebatch.cli.commands import plot
from largebatch.records.write import write_probes
from largebatch.reports.figures import style
from largebatch.reports.output import FIGURES, SIGNED, check_output, encode, write


def drawing():
    figure = style.blank(2, 2)
    figure.subplots().set_title("a title with $ and <")
    return figure


@pytest.mark.parametrize("suffix", FIGURES)
def test_a_figure_may_be_written_again(tmp_path, suffix):
    path = tmp_path / "made" / f"figure{suffix}"
    with style.styled():
        write(path, encode(drawing(), suffix))
        check_output(path, FIGURES)
        assert encode(drawing(), suffix) == path.read_bytes()  # nothing in it depends on when it was drawn
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SIGNED)
def test_somebody_elses_file_is_left_alone(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_text("by largebatch, says the text")
    with pytest.raises(UserError, match="exists and was not written by largebatch: move it"):
        check_output(path, tuple(SIGNED))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("figure.gif", "end it in .svg or .pdf or .png"),
        ("figure.pngg", "Did you mean '.png'"),
        ("figure", "end it in .svg"),
        ("taken.svg", "is a directory: give the name of a file"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, words):
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(UserError, match=words):
        check_output(tmp_path / name, FIGURES)


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be used: File name too long\. Give another name"):
        check_output(tmp_path / f"{'x' * 300}.svg", FIGURES)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*figure.svg cannot be written"):
        write(tmp_path / "file" / "figure.svg", b"")


@pytest.mark.parametrize("kind", plot.KINDS)
def test_every_figure_is_written_from_the_command_line(record, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    record(5.0, k=1, settings={"lr.base_minibatch": 32})
    probed = record(5.0, k=2, settings={"lr.base_minibatch": 32})
    write_probes(probed, [probe_line(0), probe_line(1)])
    assert plot.run([kind]) == 0
    assert plot.run([kind, "out=a.png", f"out={kind}.svg"]) == 0
    assert capsys.readouterr().out.split() == [f"{kind}.svg", "a.png", f"{kind}.svg"]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_published_points_need_no_run(tmp_path):
    out = tmp_path / "figure1.pdf"
    assert plot.run(["scaling", "paper=true", f"out={out}"]) == 0
    assert out.read_bytes().startswith(b"%PDF")


def test_nothing_is_drawn_over_a_foreign_file_and_no_run_is_read_for_it(tmp_path):
    out = tmp_path / "mine.svg"
    out.write_text("<svg/>")
    with pytest.raises(UserError, match="was not written by largebatch"):
        plot.run(["curves", "runs=nowhere", f"out={out}"])
    assert out.read_text() == "<svg/>"


def test_mistakes_in_words(capsys):
    with pytest.raises(UserError, match=r"not 'curvs'\. Did you mean 'curves'"):
        plot.run(["curvs"])
    with pytest.raises(UserError, match="x=hours is not known: it takes epochs, iterations, images"):
        plot.run(["rates", "x=hours"])
    with pytest.raises(UserError, match="smooth=0 is not a whole number of 1 or more"):
        plot.run(["curves", "smooth=0", "runs=results/digits-curves"])
    assert plot.run(["--help"]) == plot.run(["curves", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {kind} " in printed for kind in plot.KINDS)
    assert "smooth=" in printed


def test_a_corrupt_record_is_named_and_the_status_says_so(record, tmp_path, capsys):
    record(5.0, k=1, settings={"lr.base_minibatch": 32})
    broken = record(5.0, k=2, settings={"lr.base_minibatch": 32})
    (broken / "provenance.json").write_text("{")
    assert plot.run(["curves", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'c.svg'}"]) == 1
    assert f"{broken} was left out, its record is corrupt: provenance.json is not JSON" in capsys.readouterr().err
    assert (tmp_path / "c.svg").exists()
