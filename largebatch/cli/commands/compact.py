"""``largebatch compact``: records of runs that are small enough to commit."""

from __future__ import annotations

from largebatch.base.outcome import say
from largebatch.cli.command import PlainCommand


def run(arguments: list[str]) -> int:
    """Write compact records, and return the exit status."""
    from pathlib import Path

    from largebatch.base.errors import UserError
    from largebatch.cli.arguments import Vocabulary, Word
    from largebatch.cli.selecting import RUNS, status_after_warnings
    from largebatch.reports.compact import compact
    from largebatch.reports.selection import select

    given = Vocabulary(
        "compact",
        "Copy what figures, tables and a reader need of runs: configuration, provenance, summary and a line an epoch, "
        "without iteration lines, weights, checkpoints and logs. Every command that takes runs= reads the copies too.",
        (RUNS, Word("out", None, "The directory that holds the records, each under its run's name.", path=True)),
        (("compact runs=runs/sweeps/digits out=results/digits", "records of a sweep, to be committed"),),
    ).read(arguments)
    if given is None:
        return 0
    out = given.text("out")
    if not out:
        raise UserError("out= is missing: name the directory that the records go to, such as out=results/digits.")
    selection = select(given.all("runs"), "none")
    # What counts comes last: of two records with one name, that is the one kept.
    made = {compact(one, Path(out)) for group in selection.groups for one in (*group.duplicates, *group.runs)}
    say(f"{len(made)} compact records in {out}")
    return status_after_warnings(selection)


COMPACT = PlainCommand("make records of runs that are small enough to commit", run)
