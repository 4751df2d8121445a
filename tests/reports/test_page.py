"""The page: what it says is what the records say, and records cannot put code into it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recorded_runs import EPOCHS, changed, ending, write_run

from largebatch.cli.commands import report
from largebatch.reports.page import answer, page, question
from largebatch.reports.rows import make_rows
from largebatch.reports.selection import select

BASELINE = {"lr.base_minibatch": 32}


class Reader(HTMLParser):
    """Collects the elements of a page, and its text without styles and scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def comparison(compose, tmp_path_factory):
    """Return a selection of k = 1 (the baseline), 2 (equivalent) and 4 (worse), two seeds each."""
    runs = tmp_path_factory.mktemp("comparison") / "runs"
    for k, errors in ((1, (5.0, 5.1)), (2, (5.05, 5.15)), (4, (9.0, 9.2))):
        for seed, error in enumerate(errors):
            settings = {"epochs": EPOCHS, "warmup.name": "none", "k": k, "seed": seed, **BASELINE}
            write_run(runs, changed(compose(), settings), ending(error))
    return select([str(runs)])


@pytest.fixture(scope="module")
def text(comparison):
    """Return its page."""
    return page(comparison, 0.5)


def test_question_and_answer(comparison):
    assert question(comparison) == (
        "Do runs that differ in k reach the error of the baseline, kn = 32, η = 0.1, no warmup?"
    )
    assert answer(comparison, make_rows(comparison, 0.5), 0.5) == (
        "The baseline reaches 5.05 ± 0.07 %. Of 2 other groups, 1 is equivalent to it within ± 0.5 points (k = 2); "
        "1 is worse (k = 4)."
    )


def test_one_verdict_on_all_is_said_once(record, tmp_path):
    for k in (1, 2, 4):
        for seed in (0, 1):
            record(5.0 + 0.1 * seed, k=k, seed=seed, settings=BASELINE)
    selection = select([str(tmp_path / "runs")])
    assert answer(selection, make_rows(selection, 0.5), 0.5) == (
        "The baseline reaches 5.05 ± 0.07 %. Both other groups are equivalent to it within ± 0.5 points (k = 2, k = 4)."
    )


def test_without_seeds_nothing_is_judged(record, tmp_path):
    record(5.0, k=1, settings=BASELINE)
    record(5.0, k=2, settings=BASELINE)
    selection = select([str(tmp_path / "runs")])
    assert answer(selection, make_rows(selection, 0.5), 0.5).startswith("Nothing is judged: that takes")


def test_it_is_complete_and_loads_nothing(text):
    read = Reader(text)
    assert {tag for tag, _ in read.elements} & {"link", "img", "iframe", "object", "embed"} == set()
    assert not any("src" in attributes for _, attributes in read.elements)
    references = [value for _, own in read.elements for name, value in own.items() if name.endswith("href")]
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert not re.search(r"url\((?!#)", text)
    ids = [own["id"] for _, own in read.elements if "id" in own]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references} <= set(ids)
    assert {found[1] for found in re.finditer(r"url\(#([^)]*)\)", text)} <= set(ids)
    assert len(read.all("figure")) == 6
    assert [own["data-toggle"] for own in read.all("input")] == ["0", "1", "2"]


def test_values_to_read_are_those_of_the_records(text):
    readings = json.loads(re.search(r'<script type="application/json" id="readings">(.*?)</script>', text, re.S)[1])
    last = readings["val_error"]["marks"][-1]
    # The last epoch's errors are 9 below the final ones: -4 and -3.9, whose mean is -3.95.
    assert last["name"] == "epoch 6"
    assert last["values"] == [[0, "-3.95 ± 0.07 %"], [1, "-3.90 ± 0.07 %"], [2, "0.10 ± 0.14 %"]]
    assert readings["scaling"]["marks"][2]["values"] == [[2, "9.10 ± 0.14 %, worse"]]
    assert readings["rates"]["marks"][0]["values"] == [[0, "0.1"], [1, "0.2"], [2, "0.4"]]


def test_every_part_of_a_group_can_be_hidden(text):
    groups = re.findall(r"<svg aria-hidden.*?</svg>", text, re.S)
    curves = next(svg for svg in groups if "val_error-" in svg)
    assert {number: curves.count(f'data-group="{number}"') for number in "012"} == {"0": 2, "1": 2, "2": 2}


def test_text_from_records_is_text(record, tmp_path):
    attack = "</script><script>alert('&')</script>"
    settings = BASELINE | {"dataset.name": "imagefolder", "dataset.crop": "none", "model.name": attack}
    for seed in (0, 1):
        record(5.0, k=1, seed=seed, settings=settings, device=attack, command=f"largebatch train {attack}")
        record(5.0, k=2, seed=seed, settings=settings | {"optimizer.name": "lars"}, device=attack)
    text = page(select([str(tmp_path / "runs")]), 0.5)
    assert len(Reader(text).all("script")) == 2  # the page's own: the readings and the program
    assert f"largebatch train {attack}" in "".join(Reader(text).words)


def test_the_command_and_a_corrupt_record(record, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record(5.0, k=1, settings=BASELINE)
    broken = record(5.0, k=2, settings=BASELINE)
    assert report.run(["margin=0.25"]) == 0
    text = Path("report.html").read_text(encoding="utf-8")
    assert "margin ± 0.25 points" in text
    assert len(text) < 5e6
    (broken / "summary.json").write_text("[]")
    assert report.run(["out=report.html"]) == 1  # over its own file
    words = f"{broken.relative_to(tmp_path)} was left out, its record is corrupt: summary.json is not a JSON object."
    assert words in Path("report.html").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert printed.out.split() == ["report.html", "report.html"]
    assert words in printed.err
    assert report.run(["--help"]) == 0
    assert "margin=" in capsys.readouterr().out
