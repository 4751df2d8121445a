"""What the sub-commands are given and what they come to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largebatch.sweep.manifest import Arm

FAULT, MISTAKE, DIVERGED = 1, 2, 3
STATUS = {"done": 0, "stopped": 0, "diverged": DIVERGED, "failed": FAULT}

Values = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a command: the values that were composed for it."""

    values: Values


@dataclass(frozen=True)
class Outcome:
    """What a call came to: exit status, and where there is one the run's directory and summary."""

    status: int
    directory: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A sub-command whose values Hydra composes: its line in the list, and what it does for one call.

    ``sweep`` is what it does with all arms of ``-m``, given the sweep's directory, and returns the exit status; where
    it is None the arms are calls one after another.
    """

    summary: str
    run: Callable[[Call], Outcome]
    sweep: Callable[[Path, Sequence[Arm]], int] | None = None


@dataclass(frozen=True)
class PlainCommand:
    """A sub-command that takes its words as they are: its line in the list, and what it does with them.

    ``run`` prints its own help for ``--help``, and returns the exit status.
    """

    summary: str
    run: Callable[[list[str]], int]


def say(text: str) -> None:
    """Print a line for people, once for a group of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
