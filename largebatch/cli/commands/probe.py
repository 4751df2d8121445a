"""``largebatch probe``: measure along a run how large k can be."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from largebatch.base.errors import UserError, nearest, one_of
from largebatch.base.files import UserPath
from largebatch.base.outcome import Outcome, say
from largebatch.base.signals import ENDED, INTERRUPTED
from largebatch.cli.arguments import keys_of
from largebatch.cli.command import Values
from largebatch.cli.commands.train import train
from largebatch.config.build import build
from largebatch.config.groups import KNOWN_BY_DIGEST
from largebatch.config.run import Config
from largebatch.records.check import flat
from largebatch.records.read import read_summary
from largebatch.records.runs import find
from largebatch.records.write import finite
from largebatch.reports.answer import (
    Answer,
    Probed,
    Trained,
    answer,
    check_places,
    fits,
    open_probed,
    readable,
    trained,
)
from largebatch.reports.probes import as_text, facts
from largebatch.reports.selection import select
from largebatch.runtime.lock import holder, owned

Findings = tuple[Probed, Answer | None, Sequence[Trained], float | None]


@dataclass(frozen=True)
class Asked:
    """The keys of the command itself.

    Attributes:
        run: Directory of a recorded run: measured from its checkpoints, or as it was probed.
        runs: Directories and globs of a sweep, for comparison with the answer.
        answer: Print how large k may be, whether a warmup is needed, and its length.
        baseline: Baseline of runs=. Null: kn = lr.base_minibatch.
        margin: Largest difference of errors that counts as equivalent, in points of error.
        format: text or json.
    """

    run: UserPath | None
    runs: tuple[UserPath, ...]
    answer: bool
    baseline: str | None
    margin: float
    format: str

    def __post_init__(self) -> None:
        one_of("format", self.format, ("text", "json"))
        if self.runs and not self.answer:
            raise UserError("runs= is what an answer is compared with: add answer=true.")
        if not self.margin > 0:
            raise UserError(f"margin={self.margin:g} is not a number of points above 0.")


OURS = tuple(field.name for field in dataclasses.fields(Asked))
# What may be said beside a recorded run; all else is as it was trained.
FREE = ("probe", "device", "threads", "loader", "dataset.root", "dataset.layout", "dataset.on_error")


def probe(values: Values) -> Outcome:
    """Train and probe a run, or probe a recorded one; print what was measured, and the answer where asked for."""
    shape = values["format"]
    outcome, findings = probed_run(values, train)
    if findings is not None:
        print(json.dumps(finite(facts(*findings)), indent=2) if shape == "json" else as_text(*findings))
    return outcome


def probed_run(values: Values, trained_by: Callable[[Values], Outcome]) -> tuple[Outcome, Findings | None]:
    """Probe a run; return its outcome, and what :func:`~largebatch.reports.probes.as_text` takes.

    The findings are None where the run was interrupted, and in every rank but 0. ``trained_by`` trains a run that is
    probed on its way.
    """
    words = values.pop("given")
    asked = build(Asked, {key: values.pop(key) for key in OURS})
    outcome = _trained(values, asked, trained_by) if asked.run is None else _recorded(Path(asked.run), values, words)
    if outcome.status in (ENDED, INTERRUPTED) or os.environ.get("RANK", "0") != "0":
        return outcome, None
    probed = open_probed(Path(outcome.directory))
    said = answer(probed) if asked.answer else None
    compared = _compared(probed, asked)
    # Of a run that was probed on its way: what is measured afterwards has not kept it.
    seconds = (read_summary(probed.directory) or {}).get("seconds") if asked.run is None else None
    share = sum(line["seconds"] for line in probed.lines) / seconds if seconds else None
    return outcome, (probed, said, compared, share)


def _trained(values: Values, asked: Asked, trained_by: Callable[[Values], Outcome]) -> Outcome:
    config = Config.from_mapping(values)
    if config.probe.every is None:
        raise UserError("probe.every=null measures nothing: give a number of epochs, or largebatch train.")
    if asked.answer:
        _check_answer(config, asked)
    return trained_by(values)


def _check_answer(config: Config, asked: Asked) -> None:
    """Refuse what would leave the run without an answer, before it is trained for one; as far as it is known by now."""
    settings = flat(config.experiment(config.precision))
    if asked.runs:
        selection = select(asked.runs, asked.baseline)
        trained(selection, asked.margin)
        if config.dataset.name not in KNOWN_BY_DIGEST and config.dataset.source == "own":
            fits(Probed(Path("this run"), settings, []), selection)
    images, every = config.dataset.trained_images, config.probe.every
    if images is None or not isinstance(every, int) or config.iterations is not None:
        return
    rates, per_epoch = config.rates(images), config.iterations_per_epoch(images)
    last = config.epochs * per_epoch - 1
    places = range(0, config.epochs + 1, every)
    check_places(settings, {epoch: rates.rate_at(min(epoch * per_epoch, last)) for epoch in places})


def _recorded(directory: Path, values: Values, words: Sequence[str]) -> Outcome:
    """Probe a recorded run wherever it has a checkpoint."""
    found = find([str(directory)], "run")
    if found != [directory]:
        raise UserError(f"run={directory} is not a run, but contains {len(found)}: name one, such as run={found[0]}.")
    if "RANK" in os.environ:
        raise UserError("a recorded run is probed by one process: run it without torchrun.")
    for key in keys_of(words):
        if not any(key == name or key.startswith(f"{name}.") for name in (*FREE, *OURS, "hydra")):
            raise UserError(
                f"{key}= cannot be given with run=, which is probed as it was trained: leave it out. These can: "
                f"{', '.join((*OURS[1:], *FREE))}.{nearest(key, (*OURS, *FREE))}"
            )
    readable(directory)  # before minutes are spent on it
    if holder(directory) is not None:
        raise UserError(f"run={directory} is still training: wait, or probe it on its way with probe.every=1.")
    if any((directory / "checkpoints").glob("*.safetensors")):
        from largebatch.training.probe_checkpoints import probe_checkpoints

        with owned(directory):
            count = probe_checkpoints(directory, values, FREE)
        if count:
            say(f"measured from {count} checkpoint{'s' * (count > 1)} of {directory}")
    return Outcome(0, str(directory))


def _compared(probed: Probed, asked: Asked) -> list[Trained]:
    if not asked.runs:
        return []
    selection = select(asked.runs, asked.baseline)
    fits(probed, selection)
    return trained(selection, asked.margin)
