"""``largebatch.table``: runs against their baseline."""

from __future__ import annotations

import json
from typing import Any

from largebatch.api.recorded import Run, Runs, selection_of
from largebatch.base.errors import one_of
from largebatch.reports import tables
from largebatch.reports.paper import TABLES
from largebatch.reports.selection import Selection


class Table:
    """A table of runs, which prints as ``largebatch table`` does and which a notebook shows.

    Attributes:
        selection: The groups of runs, the baseline among them.
    """

    def __init__(self, selection: Selection | None, margin: float, paper: str | None, notes: str) -> None:
        self.selection = selection
        self._margin, self._paper, self._every_note = margin, paper, notes == "all"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A mapping for each group: settings, errors, difference, verdict, as ``format=json`` writes them."""
        values = json.loads(self.to("json"))
        found: list[dict[str, Any]] = values["rows"] if self.selection else values["published"]["rows"]
        return found

    def to(self, format: str) -> str:
        """Return the table as text, markdown, csv, latex, json or html.

        Raises:
            UserError: another format.
        """
        one_of("format", format, (*tables.FORMATS, "html"))
        return tables.table(self.selection, self._margin, format, self._paper, self._every_note)

    def __str__(self) -> str:
        return self.to("text")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to("html")


def table(
    runs: Runs | None = None,
    *,
    baseline: str | Run | None = None,
    only: str | None = None,
    margin: float = 0.5,
    paper: str | None = None,
    notes: str = "folded",
    allow_mixed: bool = False,
) -> Table:
    """Compare runs with their baseline: final error as mean ± std of the seeds, difference, verdict.

    Args:
        runs: Runs, directories or globs; None with ``paper``: the published rows alone.
        baseline: Settings that name one group, such as ``k=1`` or ``k=8,warmup=none``; a run or a directory; ``none``
            for no comparison; None: the group whose kn is ``lr.base_minibatch``.
        only: Settings such as ``k=8,32``: the baseline and the groups that have one of each are kept.
        margin: Points of error within which groups count as equivalent.
        paper: Put the published rows of this table with ours, such as ``figure1``.
        notes: ``folded``: many notes of a kind are one; ``all``.
        allow_mixed: Compare also runs of different epochs, data sets or models.

    Raises:
        UserError: no run matches, no group or several can be the baseline, or the runs cannot be compared.
        Fault: no run can be read.
    """
    one_of("notes", notes, ("folded", "all"))
    if paper is not None:
        one_of("paper", paper, TABLES)
    alone = runs is None and paper is not None
    selection = None if alone else selection_of("runs" if runs is None else runs, baseline, only, allow_mixed)
    return Table(selection, margin, paper, notes)
