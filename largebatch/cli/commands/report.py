"""``largebatch report``: a page on what runs say."""

from __future__ import annotations

from largebatch.cli.command import PlainCommand


def run(arguments: list[str]) -> int:
    """Write the page, and return the exit status."""
    from pathlib import Path

    from largebatch.cli.arguments import Vocabulary, Word
    from largebatch.cli.selecting import BELONGING, NOTES, SELECTING, selected, status_after_warnings
    from largebatch.reports.statistics import DEFINITIONS

    given = Vocabulary(
        "report",
        "Write one page on a comparison of runs: the question and the answer in a sentence, figures whose groups can "
        "be shown and hidden, the table, how the groups differ, where every run comes from. The file holds all of it, "
        "opens in any browser and loads nothing from a network.",
        (
            *SELECTING,
            Word("out", "report.html", "The file to write, .html.", path=True),
            Word("margin", "0.5", "Largest difference of errors that counts as equivalent, in points of error."),
            NOTES,
        ),
        (("report runs=runs/digits-resnet8 out=digits.html", "every experiment below, against the baseline"),),
        (BELONGING, *DEFINITIONS),
    ).read(arguments)
    if given is None:
        return 0
    from largebatch.reports.output import check_output, write
    from largebatch.reports.page import page

    path = Path(str(given.text("out")))
    check_output(path, (".html",))
    margin = given.number("margin", above=0)
    selection = selected(given)
    write(path, page(selection, margin, given.text("notes") == "all").encode())
    print(path)
    return status_after_warnings(selection)


REPORT = PlainCommand("write a page on a comparison of recorded runs, for a browser", run)
