"""Select runs and their baseline, with warnings: shared by all commands that read runs."""

from __future__ import annotations

from largebatch.base.outcome import FAULT, printable, say
from largebatch.cli.arguments import BOOLEAN, Given, Word
from largebatch.reports.selection import Selection, select

RUNS = Word(
    "runs",
    "runs",
    "Directories of runs, of sweeps or of committed records, with all runs below them, or globs; "
    "several as runs=a,b or runs=a runs=b.",
    many=True,
    path=True,
)
SELECTING = (
    RUNS,
    Word(
        "baseline",
        None,
        "Baseline of the comparison: settings that name one group of runs, such as k=8 or "
        "k=8,warmup=none or optimizer=sgd; or a directory of its runs; or none. Left out: the runs whose kn is "
        "lr.base_minibatch.",
        path=True,
    ),
    Word(
        "only",
        None,
        "Groups that are shown with the baseline: settings, each with one or several values, such as "
        "k=8,32,warmup=gradual. Left out: all.",
    ),
    Word("allow_mixed", "false", "Compare also runs of different epochs, data sets or models.", BOOLEAN),
)
NOTES = Word(
    "notes",
    "folded",
    "How notes on runs are shown: folded, more than three of a kind as one with their count; or all.",
    ("folded", "all"),
)
BELONGING = (
    "Runs of one experiment are one group, whatever hardware they ran on: they differ by their seed alone, as the "
    "experiment_hash in provenance.json says. Runs that are unfinished, diverged, resumed or made with a pitfall are "
    "shown as such."
)


def selected(given: Given) -> Selection:
    """Return the runs that the words name.

    Raises:
        UserError: no run matches, no group or several can be the baseline, or they cannot be compared.
        Fault: no run can be read.
    """
    return select(given.all("runs"), given.text("baseline"), given.flag("allow_mixed"), given.text("only"))


def status_after_warnings(selection: Selection) -> int:
    """Say on standard error which records were left out; return the exit status: a fault where there was one."""
    for directory, reason in selection.corrupt:
        say(f"largebatch: {printable(str(directory))} was left out, its record is corrupt: {reason}.")
    return FAULT if selection.corrupt else 0
