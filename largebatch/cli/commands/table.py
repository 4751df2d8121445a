"""``largebatch table``: runs against the baseline, and beside what the paper published."""

from __future__ import annotations

from largebatch.cli.command import PlainCommand


def run(arguments: list[str]) -> int:
    """Print a table of runs, and return the exit status."""
    from largebatch.cli.arguments import Vocabulary, Word
    from largebatch.cli.selecting import BELONGING, NOTES, SELECTING, selected, status_after_warnings
    from largebatch.reports.paper import TABLES
    from largebatch.reports.statistics import DEFINITIONS
    from largebatch.reports.tables import FORMATS, table

    given = Vocabulary(
        "table",
        "Print a row for every group of runs: final error as mean ± std of the seeds, the difference to the baseline "
        "and whether it is equivalent.",
        (
            *SELECTING,
            Word("margin", "0.5", "Largest difference of errors that counts as equivalent, in points of error."),
            NOTES,
            Word("format", "text", "How the table is written.", FORMATS),
            Word(
                "paper",
                None,
                "Put the published rows beside ours, and say which of ours fall within the published mean ± 2 std. "
                "Without runs=, the published rows alone. In CSV it is the published table that is written.",
                TABLES,
            ),
        ),
        (
            ("table runs=runs/digits-resnet8", "every experiment below, against the one with kn = lr.base_minibatch"),
            ("table runs=results/pitfalls baseline=pitfall=none", "what each pitfall costs"),
            ("table 'runs=runs/sweeps/*' baseline=k=8,warmup=none format=markdown", "for a README"),
            ("table paper=figure1", "what the paper published"),
        ),
        (BELONGING, *DEFINITIONS),
    ).read(arguments)
    if given is None:
        return 0
    margin = given.number("margin", above=0)
    published, shape = given.text("paper"), given.text("format") or "text"
    selection = None if published and "runs" not in given.values else selected(given)
    print(table(selection, margin, shape, published, given.text("notes") == "all"))
    return status_after_warnings(selection) if selection else 0


TABLE = PlainCommand("compare recorded runs with their baseline, and with the paper", run)
