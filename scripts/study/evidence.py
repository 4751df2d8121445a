"""What the records of the study say, by the names of its experiments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from plan import ARMS, BASELINE, BEYOND, HOLDS, MARGIN, RECIPE, named

from largebatch.reports.paper import published
from largebatch.reports.rows import Row, make_rows
from largebatch.reports.selection import Group, Selection, select
from largebatch.reports.statistics import BETTER, EQUIVALENT, WORSE, Comparison, Spread, compare
from largebatch.reports.tables import NONE, difference, spread, verdict


@dataclass(frozen=True)
class Evidence:
    """The runs of every experiment that has some, by name."""

    groups: Mapping[str, Group]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Path) -> Evidence:
        """Read all records below a directory.

        Raises:
            ValueError: a record belongs to no experiment of the study, or could not be read.
        """
        selection = select([str(records)], "none")
        if selection.corrupt:
            raise ValueError(f"records that cannot be read: {selection.corrupt}")
        groups = {}
        for group in selection.groups:
            names = [name for name, arm in ARMS.items() if group.matches({**RECIPE, **arm.settings})]
            if len(names) != 1:
                raise ValueError(f"{group.runs[0].directory} belongs to {names or 'no experiment'} of the study")
            if names[0] in groups:
                both = f"{group.runs[0].directory} and {groups[names[0]].runs[0].directory}"
                raise ValueError(f"{both} differ in their settings, and both are {names[0]}")
            groups[names[0]] = group
        return cls({name: groups[name] for name in ARMS if name in groups}, selection.notes)

    def selection(self, names: Iterable[str]) -> Selection:
        """Return these experiments, with the baseline first, as reports take them."""
        others = [self.groups[name] for name in names if name != BASELINE]
        baseline = self.groups[BASELINE]
        return Selection((baseline, *others), baseline, self.notes, ())

    def row(self, name: str, other: str = BASELINE) -> Row:
        """Return an experiment's row in a table that compares with ``other``."""
        group, against = self.groups[name], self.groups[other]
        groups = (against,) if group is against else (against, group)
        return make_rows(Selection(groups, against, (), ()), MARGIN)[-1]

    def comparison(self, name: str, other: str = BASELINE, margin: float = MARGIN) -> Comparison:
        """Compare two experiments: the first one's error minus the other's."""
        group, against = self.groups[name], self.groups[other]
        return compare(group.errors, against.errors, margin, bool(group.diverged or against.diverged))

    def at(self, name: str, column: str, epoch: int) -> str:
        """Return a column of the epochs' lines, mean over the seeds, with one decimal; the last epoch is -1."""
        values = [run.epochs[column][epoch - 1 if epoch > 0 else epoch] for run in self.groups[name].finished]
        return f"{fmean(values):.1f}"

    def warmup_iterations(self, name: str) -> int:
        """Return how many iterations the warmup of an experiment takes."""
        group = self.groups[name]
        per_epoch = group.runs[0].summary["scheduled_iterations"] / group.settings["epochs"]
        return round(group.settings["warmup.epochs"] * per_epoch)

    def error(self, name: str) -> str:
        """Return mean ± std of the final errors, and how many runs have none."""
        group = self.groups[name]
        said = spread(Spread.of(group.errors) if group.errors else None)
        return said + f", {len(group.diverged)} of {len(group.runs)} diverged" * bool(group.diverged)

    def against(self, name: str, other: str = BASELINE) -> tuple[str, str]:
        """Return the difference in points with its 95 % interval, and the verdict, in words."""
        row = self.row(name, other)
        return difference(row), verdict(row)


def theirs(table: str, kn: int, what: str | None = None) -> str:
    """Return what the paper published for one row, by what it calls it: mean ± std in %."""
    rows = [row for row in published(table).rows if row.kn == kn and what in (None, row.what)]
    if what is None and not rows:  # the study's kn need not be the paper's
        return NONE
    (row,) = rows
    return NONE if row.error is None else f"{row.error:.2f} ± {row.std:.2f}"


def claims(evidence: Evidence, margin: float) -> dict[str, bool]:
    """Return what every size of the study is to find, and whether these records bear it out.

    Args:
        evidence: The records.
        margin: Within which two errors count as equal, in points.
    """
    holds = evidence.comparison(named(HOLDS), BASELINE, margin).verdict == EQUIVALENT
    unwarmed = evidence.comparison(f"{named(BEYOND)}_none", named(BEYOND), margin).verdict == WORSE
    return {
        f"kn = {HOLDS} is equivalent to the baseline, kn = 64": holds,
        f"kn = {BEYOND} without warmup is worse than with it": unwarmed,
    }


def conclusions(evidence: Evidence) -> dict[str, bool]:
    """Return what the page says in words of its own, and whether the records bear it out."""

    def verdict(name: str, other: str = BASELINE) -> str | None:
        return evidence.comparison(name, other).verdict

    def mean(name: str) -> float:
        return fmean(evidence.groups[name].errors)

    def trained(kn: int) -> float:
        return float(evidence.at(named(kn), "train_error", -1))

    late, fresh = (float(evidence.at("study_1k", name, 3)) for name in ("val_error", "val_error_recomputed"))
    return claims(evidence, MARGIN) | {
        "kn = 128 is equivalent to the baseline": verdict("study_128") == EQUIVALENT,
        "kn = 512 is worse than kn = 64": verdict("study_512") == WORSE,
        "kn = 512 is equivalent to kn = 256": verdict("study_512", "study_256") == EQUIVALENT,
        "kn = 1024 is worse than the baseline": verdict("study_1k") == WORSE,
        "kn = 2048 is broken, from 4096 on nothing is learned": 20 < mean("study_2k") < 60 < mean("study_4k"),
        "gradual is the best of three warmups at kn = 1024": mean("study_1k")
        < min(mean("study_1k_constant"), mean("study_1k_none")),
        "no warmup is equivalent to the gradual one at kn = 512": verdict("study_512_none", "study_512") == EQUIVALENT,
        "the reference rate is the best of three at kn = 256": mean("study_256")
        < min(mean("study_256_half"), mean("study_256_double")),
        "smaller rates are better at kn = 1024": {
            verdict(f"study_1k_{rate}", "study_1k") for rate in ("sqrt", "unscaled")
        }
        == {BETTER},
        "LARS trains where SGD does not": verdict("study_4k_lars", "study_4k") == BETTER,
        "LARS does not come near the baseline": verdict("study_4k_lars") == WORSE,
        "validation is misleading early": late > 2 * fresh,
        "training errors rise with kn": trained(64) < trained(256) < trained(512) < trained(1024),
    }
