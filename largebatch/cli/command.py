"""The two kinds of sub-commands: those whose values Hydra composes, and those that take their words as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.base.outcome import Outcome
from largebatch.launch.manifest import Arm

Values = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A sub-command whose values Hydra composes: its line in the list, and what it does for one call.

    ``sweep`` is what it does with all arms of ``-m``, given the sweep's directory, and returns the exit status; where
    it is None the arms are calls one after another.
    """

    summary: str
    run: Callable[[Values], Outcome]
    sweep: Callable[[Path, Sequence[Arm]], int] | None = None


@dataclass(frozen=True)
class PlainCommand:
    """A sub-command that takes its words as they are: its line in the list, and what it does with them.

    ``run`` prints its own help for ``--help``, and returns the exit status.
    """

    summary: str
    run: Callable[[list[str]], int]
