"""``largebatch.train``, ``explain``, ``certify``, ``probe`` and ``predict``: commands as functions."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from largebatch.api.recorded import Run
from largebatch.api.wording import as_words
from largebatch.base.errors import UserError
from largebatch.base.outcome import Outcome
from largebatch.base.signals import ENDED, INTERRUPTED
from largebatch.cli.command import Values
from largebatch.cli.compose import compose
from largebatch.config.run import Config
from largebatch.records.write import finite


class Interrupted(KeyboardInterrupt):
    """Training was interrupted, and has written a checkpoint.

    Attributes:
        run: The run as it was recorded; ``largebatch.train`` with the same words and ``resume=True`` continues it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        super().__init__(
            f"interrupted after {run.summary.get('iterations', 0)} iterations; the checkpoint is in {run.directory}. "
            "Call largebatch.train again with the same arguments and resume=True to continue."
        )


@dataclass(frozen=True)
class Report:
    """The answer of a command, which prints as the command does.

    Attributes:
        facts: The answer as plain values, as ``format=json`` writes it.
        text: The answer as text.
    """

    facts: Mapping[str, Any] = field(repr=False)
    text: str = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        """Return one of the facts."""
        return self.facts[key]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class CertifyReport(Report):
    """The answer of ``certify``.

    Attributes:
        holds: Whether the trainer does what the definition says on every number of processes.
        directory: Where ``certificate.json`` is.
    """

    holds: bool
    directory: Path


@dataclass(frozen=True, repr=False)
class ProbeReport(Report):
    """The answer of ``probe``.

    Attributes:
        run: The run that was probed.
    """

    run: Run


def train(*words: str, progress: bool = True, **keys: Any) -> Run:
    """Train one run in this process, or in processes that it starts, and record it.

    Args:
        words: The words of ``largebatch train``, such as ``"k=8"``.
        progress: Whether lines and a bar show the progress. Processes that are started print in any case.
        keys: The same as keywords, such as ``k=8`` or ``lr__base=0.2``: two underscores stand for a dot.

    Returns:
        The run. Its status is ``done``, ``stopped`` (by ``iterations``) or ``diverged``.

    Raises:
        UserError: a word, a value or the data are not what they must be.
        Fault: something beyond the program went wrong, such as a process that was killed.
        Interrupted: Ctrl-C, or a signal that ends the process: a checkpoint was written. The signal is then passed to
            the handler that was there before.
    """
    from largebatch.api.unchanged import unchanged

    quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with unchanged(), quiet:
        outcome = _trained(_values("train", words, keys))
    return _run_of(outcome)


def explain(*words: str, **keys: Any) -> Report:
    """Return what ``train`` would do with the same words: sizes, rates, parameters, placement.

    Args:
        words: The words of ``largebatch explain``.
        keys: The same as keywords; see :func:`train`. ``rates="full"``: the rate of every iteration.

    Raises:
        UserError: a word or a value is not what it must be.
    """
    from largebatch.api.unchanged import unchanged
    from largebatch.runtime.placement import place
    from largebatch.runtime.world import hardware
    from largebatch.verify.explain import as_text
    from largebatch.verify.explain import explain as explained

    with unchanged():
        values = _values("explain", words, keys)
        values.pop("format")
        full = values.pop("rates") == "full"
        config = Config.from_mapping(values)
        facts = explained(config, place(config, hardware(config.device)), full)
        return Report(facts, as_text({**facts, "rates": []} if full else facts))


def certify(*words: str, **keys: Any) -> CertifyReport:
    """Compare the trainer with the definition of the algorithm, on every number of processes that divides k.

    Args:
        words: The words of ``largebatch certify``.
        keys: The same as keywords; see :func:`train`.

    Raises:
        UserError: a word or a value is not what it must be.
        Fault: a process failed.
    """
    from largebatch.api.unchanged import unchanged
    from largebatch.cli.commands.certify import certified
    from largebatch.verify.certificate import as_text

    with unchanged():
        values = _values("certify", words, keys)
        values.pop("format")
        certificate, directory = certified(values)
    facts = cast(dict[str, Any], finite(certificate.to_mapping()))
    return CertifyReport(facts, as_text(certificate), certificate.holds, directory)


def probe(*words: str, progress: bool = True, **keys: Any) -> ProbeReport:
    """Measure how large a minibatch the task allows: along a new run, or from the checkpoints of a recorded one.

    Args:
        words: The words of ``largebatch probe``.
        progress: See :func:`train`.
        keys: The same as keywords; see :func:`train`. ``run`` takes a run or its directory; ``answer=True`` adds how
            large k may be.

    Raises:
        UserError: a word, a value or the data are not what they must be, or the run has neither probes nor checkpoints.
        Fault: a process failed.
        Interrupted: see :func:`train`.
    """
    from largebatch.api.unchanged import unchanged
    from largebatch.cli.commands.probe import probed_run
    from largebatch.reports.probes import as_text, facts

    quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with unchanged(), quiet:
        outcome, findings = probed_run(_values("probe", words, keys), _trained)
    run = _run_of(outcome)
    if findings is None:
        return ProbeReport({}, "", run)
    return ProbeReport(cast(dict[str, Any], finite(facts(*findings))), as_text(*findings), run)


def predict(*words: str, **keys: Any) -> Report:
    """Predict the time of an iteration, an epoch and a run of k workers on machines that are not here.

    Args:
        words: The words of ``largebatch predict``.
        keys: The same as keywords, such as ``k=[8, 256]``, ``gpus=8``, ``deadline="1h"``.

    Raises:
        UserError: a word or a value is not what it must be, or no number of GPUs meets the deadline.
    """
    from largebatch.cli.commands.predict import VOCABULARY, predicted

    given = VOCABULARY.read(as_words("predict", words, keys, lists_in_brackets=False))
    assert given is not None  # as_words refuses --help
    return Report(*predicted(given))


def _values(name: str, words: tuple[str, ...], keys: Mapping[str, Any]) -> Values:
    """Compose the values of a command.

    Raises:
        UserError: a mistake in them, or a sweep.
    """
    composed = compose(name, as_words(name, words, keys))
    if composed.values is None:
        raise UserError(
            f"largebatch.{name} makes one call, and these words describe a sweep: start it with `largebatch {name}` in "
            "a terminal, and read its runs with largebatch.runs."
        )
    return composed.values


def _trained(values: Values) -> Outcome:
    """Train one run; signals outside of training keep their handlers."""
    from largebatch.launch.run import train_run
    from largebatch.runtime.placement import place
    from largebatch.runtime.world import hardware

    config = Config.from_mapping(values)
    given = any(word.startswith("launcher.timeout=") for word in sys.argv)
    if "RANK" not in os.environ and not given and place(config, hardware(config.device)).processes == 1:
        # A run that hangs is ended with its process, which here is the user's: a debugger that pauses would end it.
        config = replace(config, launcher=replace(config.launcher, timeout=None))
    return train_run(config)


def _run_of(outcome: Outcome) -> Run:
    """Return the recorded run of an outcome.

    Raises:
        Interrupted: a signal ended the training.
    """
    run = Run(outcome.directory)
    if outcome.status in (INTERRUPTED, ENDED):
        name = str(outcome.summary.get("signal", "SIGINT"))
        if name != "SIGINT":  # the process was to end, and had only time for its checkpoint
            signal.raise_signal(signal.Signals[name])
        raise Interrupted(run)
    return run
