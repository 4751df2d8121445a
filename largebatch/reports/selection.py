"""Group runs by experiment, and find the baseline."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.base.errors import Fault, UserError, nearest
from largebatch.base.outcome import printable
from largebatch.config.keys import ADDED
from largebatch.config.schedule import RATE_GROUPS, reference_rate, schedule_of
from largebatch.records.check import Corrupt
from largebatch.records.read import holds_run
from largebatch.records.runs import ROOT, Run, find, load

# Groups that differ in one of these are not compared, unless the user insists. Keys of starting weights, such as
# model.zero_gamma, may differ: Table 2b is about one.
COMPARABLE = ("epochs", "model.name", "model.source", "model.stem_stride")
CANDIDATES = 6  # listed in a sentence at most


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one experiment: one for every seed, which alone may differ, whatever hardware they ran on.

    Experiments that have the same rate at every iteration, and are equal in all else, are one: their runs are equal,
    number for number, however the rates were described.

    Attributes:
        settings: What defines the experiment under dotted keys, such as ``lr.base``; ``warmup.name`` is none where a
            warmup takes no iteration.
        runs: In the order of their seeds.
        duplicates: Further records of a seed, which are not counted.
    """

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    duplicates: tuple[Run, ...]

    @property
    def hash(self) -> str:
        """The experiment's hash, as the first run's record has it; with the root, where that alone names the data."""
        recorded = self.runs[0].experiment_hash
        return f"{recorded} {self.settings[ROOT]}" if ROOT in self.settings else recorded

    @property
    def k(self) -> int:
        """Logical workers."""
        return int(self.settings["k"])

    @property
    def n(self) -> int:
        """Samples a worker in a step."""
        return int(self.settings["n"])

    @property
    def minibatch(self) -> int:
        """Samples in a step, kn."""
        return self.k * self.n

    @property
    def iterations_per_epoch(self) -> int | None:
        """Whole minibatches in the training set, by a record or by the size of the set; None where neither says it."""
        for run in self.runs:
            if run.epochs_done:
                return int(run.epochs["iteration"][0])
        images = self.settings.get("dataset.train_images")
        return images // self.minibatch if images else None

    @property
    def reference_rate(self) -> float:
        """η̂: the rate after warmup and before the first decay."""
        return _reference_rate(self.settings)

    @property
    def warmup(self) -> str:
        """The warmup that takes place: none, constant or gradual."""
        return str(self.settings["warmup.name"])

    @property
    def pitfall(self) -> str:
        """The mistake made on purpose, or none."""
        return str(self.settings["pitfall"])

    @property
    def label(self) -> str:
        """Return a short name; groups of one comparison may need :func:`Selection.differing` too."""
        mistake = "" if self.pitfall == "none" else f", pitfall {self.pitfall}"
        warmup = "no warmup" if self.warmup == "none" else f"{self.warmup} warmup"
        return f"kn = {self.minibatch}, η = {self.reference_rate:g}, {warmup}{mistake}"

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """The runs that are done: theirs are the numbers of the group."""
        return tuple(run for run in self.runs if run.status == "done")

    @cached_property
    def diverged(self) -> tuple[Run, ...]:
        """The runs whose loss was not finite: a result, without an error."""
        return tuple(run for run in self.runs if run.status == "diverged")

    @cached_property
    def unfinished(self) -> tuple[Run, ...]:
        """The runs that are neither."""
        return tuple(run for run in self.runs if run.status not in ("done", "diverged"))

    @cached_property
    def errors(self) -> tuple[float, ...]:
        """Final error in % of every finished run."""
        return tuple(error for run in self.finished if (error := run.final_error) is not None)

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it has all these settings; a warmup without effect has its own name too."""
        variants = [_with_rates(run.settings) for run in self.runs]
        own = _with_rates(self.settings)
        return all(
            any(_same(values.get(key, ADDED.get(key)), value) for values in (own, *variants))
            for key, value in wanted.items()
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """Runs of a report: groups, baseline and notes.

    Attributes:
        groups: The baseline first where there is one, then by kn, n, rate and the rest.
        baseline: What the others are compared with, or None.
        notes: What a reader of any figure from these runs must know.
        corrupt: Records that could not be read, with the reason.
    """

    groups: tuple[Group, ...]
    baseline: Group | None
    notes: tuple[Note, ...]
    corrupt: tuple[tuple[Path, str], ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run that counts."""
        return tuple(run for group in self.groups for run in group.runs)

    @cached_property
    def differing(self) -> tuple[str, ...]:
        """The keys in which the groups differ."""
        return differing(self.groups)


def select(
    patterns: Sequence[str], baseline: str | None = None, allow_mixed: bool = False, only: str | None = None
) -> Selection:
    """Find runs, put those of one experiment together, and choose the baseline.

    Args:
        patterns: Directories of runs, of sweeps or of records, and globs.
        baseline: Settings such as ``k=8,warmup=none``, a directory of runs, ``none`` for no comparison; None for the
            group whose kn is lr.base_minibatch.
        allow_mixed: Compare also what differs in epochs, data set or model.
        only: Settings such as ``k=8,32,warmup=gradual``: the baseline and the groups that have one of each are kept.

    Raises:
        UserError: no run matches, no group or more than one can be the baseline, or they cannot be compared.
        Fault: no run can be read.
    """
    given = Path(baseline) if baseline and baseline != "none" and _is_place(Path(baseline)) else None
    directories = find([*patterns, str(given)] if given else patterns)
    runs, corrupt = [], []
    for directory in directories:
        try:
            runs.append(load(directory))
        except Corrupt as error:
            corrupt.append((directory, str(error)))
    if not runs:
        raise Fault(
            "; ".join(f"{printable(str(directory))} cannot be read: {reason}" for directory, reason in corrupt) + "."
        )
    groups = grouped(runs)
    if not allow_mixed and baseline != "none":
        refuse_mixed(groups)
    if baseline == "none":
        chosen = None
    elif given:
        within = {path.resolve() for path in find([str(given)])}
        chosen = _one([group for group in groups if any(_lies(run, within) for run in group.runs)], groups, baseline)
    else:
        chosen = choose_baseline(groups, baseline)
    if only:
        groups = [group for group in groups if group is chosen or group in _having(only, groups)]
    ordered = sorted(groups, key=lambda group: (group is not chosen, *_order(group)))
    return Selection(tuple(ordered), chosen, tuple(_notes(ordered)), tuple(corrupt))


def _having(text: str, groups: Sequence[Group]) -> list[Group]:
    """Return the groups that have, of each setting that is named, one of its values."""
    wanted = {
        key: [_value(one) for one in value.split(",")] if isinstance(value, str) else [value]
        for key, value in filter_of(text, groups, "only").items()
    }
    kept = [
        group for group in groups if all(any(group.matches({key: one}) for one in ones) for key, ones in wanted.items())
    ]
    if not kept:
        raise UserError(f"only={text} fits none of these runs.")
    return kept


def _is_place(path: Path) -> bool:
    return path.is_dir() or holds_run(path)


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Put runs of one experiment together: those whose record has the same hash, or differs without effect."""
    same_hash: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        same_hash[json.dumps(run.settings, sort_keys=True)].append(run)
    settings: dict[str, dict[str, Any]] = {}
    members: dict[str, list[Run]] = defaultdict(list)
    for one_experiment in same_hash.values():
        key, effective = _without_effect(Group(one_experiment[0].settings, tuple(one_experiment), ()))
        settings.setdefault(key, effective)
        members[key] += one_experiment
    groups = []
    for key, all_runs in members.items():
        # Of several records of a seed, one that is done counts, else the one that came furthest.
        best = sorted(all_runs, key=lambda run: (run.seed, run.status != "done", -run.epochs_done))
        counted = {run.seed: run for run in reversed(best)}
        kept = tuple(counted[seed] for seed in sorted(counted))
        groups.append(Group(settings[key], kept, tuple(run for run in best if counted[run.seed] is not run)))
    return groups


def _without_effect(group: Group) -> tuple[str, dict[str, Any]]:
    """Return a key that equal runs share, and the settings without a warmup that takes no iteration."""
    settings, per_epoch = dict(group.settings), group.iterations_per_epoch
    shorter = {"warmup.name": "none", "warmup.epochs": 0.0}
    if per_epoch is None:
        settings |= shorter if not group.reference_rate > settings["lr.base"] else {}
        return json.dumps(settings, sort_keys=True), settings
    schedule = schedule_of(settings, per_epoch)
    settings |= {} if schedule.warming else shorter
    kept = settings
    if group.pitfall == "none":  # a pitfall may give the rates another meaning
        kept = {key: value for key, value in settings.items() if key.partition(".")[0] not in RATE_GROUPS}
        kept |= {"rates": schedule.changes()}
    return json.dumps(kept, sort_keys=True), settings


def differing(groups: Sequence[Group]) -> tuple[str, ...]:
    """Return the keys in which groups differ, in the order of the configuration."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return tuple(key for key in keys if len({json.dumps(group.settings.get(key)) for group in groups}) > 1)


def choose_baseline(groups: Sequence[Group], text: str | None) -> Group:
    """Return the one group that a filter such as ``k=8,warmup=none`` names; without one, that of kn = base_minibatch.

    Raises:
        UserError: none or several do; an unknown key.
    """
    if text is not None:
        wanted = filter_of(text, groups)
        return _one([group for group in groups if group.matches(wanted)], groups, text)
    usual = [group for group in groups if group.minibatch == group.settings["lr.base_minibatch"]]
    return _one([group for group in usual if group.pitfall == "none"], groups, None)


def filter_of(text: str, groups: Sequence[Group], name: str = "baseline") -> dict[str, Any]:
    """Return the settings that a filter names; a group such as ``warmup`` stands for its name.

    Raises:
        UserError: it is not key=value, or has a key that no group has.
    """
    known = {key for group in groups for key in _with_rates(group.settings)}
    wanted = {}
    for word in re.split(r",(?=[\w.]+=)", text):
        key, equals, value = word.partition("=")
        if not equals:
            directory = name == "baseline"
            is_not = "neither a directory nor settings" if directory else "not settings"
            others = ", the directory of a run, or none for no comparison" if directory else ""
            raise UserError(f"{name}={text} is {is_not}: it takes some such as k=8 or k=8,warmup=none{others}.")
        key = f"{key}.name" if f"{key}.name" in known else key
        if key not in known:
            raise UserError(
                f"{name}={text}: '{key}' is not a setting of these runs.{nearest(key, known)} It takes the keys that "
                "`largebatch train --help` lists, and kn and rate."
            )
        if key in wanted:
            raise UserError(f"{name}={text} gives {key.removesuffix('.name')} twice: give it once.")
        wanted[key] = _value(value)
    return wanted


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-9 * abs(one)  # a rate such as 0.1 · 8 is written in decimals
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _with_rates(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "kn": settings["k"] * settings["n"], "rate": _reference_rate(settings)}


def _reference_rate(settings: Mapping[str, Any]) -> float:
    minibatch = settings["k"] * settings["n"]
    return reference_rate(settings["lr.base"], minibatch, settings["lr.base_minibatch"], settings["lr.scaling"])


def _one(found: Sequence[Group], groups: Sequence[Group], text: str | None) -> Group:
    if found and all(_equal(group, found[0]) for group in found[1:]):
        return found[0]
    keys = differing(groups)
    ways = [_filter(group, groups, keys) for group in sorted(found or groups, key=_order)]
    shown = ", ".join(f"baseline={way}" for way in ways[:CANDIDATES])
    more = f" and {len(ways) - CANDIDATES} more" if len(ways) > CANDIDATES else ""
    asked = "the default, kn = lr.base_minibatch," if text is None else f"baseline={text}"
    if found:
        raise UserError(f"{asked} fits {len(found)} groups of runs: choose one of {shown}{more}.")
    raise UserError(f"{asked} fits none of these runs: take {shown}{more}, or baseline=none for no comparison.")


def _equal(one: Group, other: Group) -> bool:
    """Whether the runs of two groups have the same seeds and the same numbers."""
    return len(one.runs) == len(other.runs) and all(
        _equal_runs(*pair) for pair in zip(one.runs, other.runs, strict=True)
    )


def _equal_runs(one: Run, other: Run) -> bool:
    names = ("train_error", "val_error")
    equal = all(np.array_equal(one.epochs[name], other.epochs[name], equal_nan=True) for name in names)
    return equal and (one.seed, one.status) == (other.seed, other.status)


def _filter(group: Group, among: Sequence[Group], keys: Sequence[str]) -> str:
    """Return the shortest filter that names a group: of its first differing keys, as many as it takes."""
    wanted: dict[str, Any] = {}
    for key in sorted(keys, key=lambda key: (key not in ("k", "n", "warmup.name", "pitfall"), key.endswith(".epochs"))):
        before = sum(other.matches(wanted) for other in among)
        if sum(other.matches({**wanted, key: group.settings.get(key)}) for other in among) < before:
            wanted[key] = group.settings.get(key)
    return ",".join(
        f"{key.removesuffix('.name')}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in (wanted or {"k": group.k}).items()
    )


def _lies(run: Run, directories: set[Path]) -> bool:
    return run.directory.resolve() in directories


def _order(group: Group) -> tuple[Any, ...]:
    rest = json.dumps([value for key, value in group.settings.items() if not key.startswith("warmup")])
    return (
        group.minibatch,
        group.n,
        group.reference_rate,
        group.pitfall != "none",
        rest,
        group.warmup == "gradual",
        group.warmup,
    )


def refuse_mixed(groups: Sequence[Group]) -> None:
    """Raise :class:`UserError` where groups differ in epochs, data set or model."""
    mixed = []
    for key in differing(groups):
        if key in COMPARABLE or key.startswith("dataset."):
            values = dict.fromkeys(json.dumps(group.settings.get(key)).strip('"') for group in groups)
            mixed.append(f"{key} ({', '.join(values)})")
    if mixed:
        raise UserError(
            f"These runs are not comparable, they differ in {', '.join(mixed)}: choose fewer with runs=…, or insist "
            "with allow_mixed=true."
        )


@dataclass(frozen=True)
class Note:
    """A sentence that a reader of any figure must know.

    Attributes:
        kind: What it is about, one of :data:`KINDS`: many of one kind are shown as one.
        about: The run or group, as it may be shown.
        text: The sentence.
    """

    kind: str
    about: str
    text: str


# What many notes of a kind come to.
KINDS = {
    "unfinished": "runs are unfinished and count in no figure",
    "diverged": "runs diverged and have no final error",
    "cut": "runs have a last line of metrics.jsonl that is cut short, and was left out",
    "resumed": "runs were resumed",
    "same": "records are of the same run as another one, with the same numbers, and are counted once",
    "other": "records are of the same run as another one, with other numbers, and are counted once",
    "single": "groups have a single seed, so no std and no verdict",
    "devices": "groups have times of runs on several kinds of device",
}
FEW = 3  # notes of a kind that are shown one by one


def folded(notes: Sequence[Note]) -> list[str]:
    """Return the sentences of notes; more than :data:`FEW` of a kind are one, with their count."""
    kinds = dict.fromkeys(note.kind for note in notes)
    sentences = []
    for kind in kinds:
        of_it = [note for note in notes if note.kind == kind]
        if len(of_it) <= FEW:
            sentences += [note.text for note in of_it]
        else:
            shown = ", ".join(note.about for note in of_it[:2])
            sentences.append(f"{len(of_it)} {KINDS[kind]}: {shown} and {len(of_it) - 2} more (notes=all lists them).")
    return sentences


def _notes(groups: Sequence[Group]) -> list[Note]:
    notes = []
    for group in groups:
        for run in group.unfinished:
            progress = f"{run.epochs_done} of {group.settings['epochs']} epochs"
            text = f"{run.name} is unfinished ({run.status}, {progress}): it counts in no figure."
            notes.append(Note("unfinished", run.name, text))
        for run in group.diverged:
            text = f"{run.name} diverged after {run.epochs_done} epochs: it has no final error."
            notes.append(Note("diverged", run.name, text))
        for run in group.runs:
            if run.cut_short:
                text = f"{run.name}: the last line of metrics.jsonl is cut short, and was left out."
                notes.append(Note("cut", run.name, text))
            if run.resumed:
                text = f"{run.name} was resumed {run.starts - 1} time{'s' * (run.starts > 2)}."
                notes.append(Note("resumed", run.name, text))
        kept = {run.seed: run for run in group.runs}
        notes += [_note_duplicate(run, kept[run.seed]) for run in group.duplicates]
    return notes


def _note_duplicate(run: Run, kept: Run) -> Note:
    same = _equal_runs(run, kept)
    numbers = "with the same numbers" if same else "with other numbers"
    what = "a record of the same run"
    if run.experiment_hash != kept.experiment_hash:
        what = "the same experiment and seed (the same rate at every iteration, and equal in all else)"
    text = f"{run.name} is {what} as {kept.name}, {numbers}: it is counted once."
    return Note("same" if same else "other", run.name, text)
