"""``largebatch compact``: records of runs that are small enough to commit."""

from __future__ import annotations

from largebatch.base.outcome import say
from largebatch.cli.command import PlainCommand


def run(arguments: list[str]) -> int:
    """Write a file of compact records, and return the exit status."""
    from pathlib import Path

    from largebatch.base.errors import UserError
    from largebatch.cli.arguments import Vocabulary, Word
    from largebatch.cli.selecting import RUNS, status_after_warnings
    from largebatch.reports.compact import compact
    from largebatch.reports.selection import select

    given = Vocabulary(
        "compact",
        "Copy what figures, tables and a reader need of runs into one file, out=DIR/runs.jsonl: configuration, "
        "provenance, summary, a line an epoch and probes, without iteration lines, weights, checkpoints and logs. Runs "
        "that the file holds already stay in it. Every command that takes runs= reads it as it reads directories.",
        (RUNS, Word("out", None, "The directory of the file.", path=True)),
        (("compact runs=runs/sweeps/digits out=results/digits", "a study's records, to be committed"),),
    ).read(arguments)
    if given is None:
        return 0
    out = given.text("out")
    if not out:
        raise UserError("out= is missing: name the directory that the file goes to, such as out=results/digits.")
    selection = select(given.all("runs"), "none")
    # What counts comes last: of two records with one name, that is the one kept.
    runs = [one for group in selection.groups for one in (*group.duplicates, *group.runs)]
    say(f"{len({one.directory.name for one in runs})} runs written to {compact(runs, Path(out))}")
    return status_after_warnings(selection)


COMPACT = PlainCommand("put records of runs into one file that is small enough to commit", run)
