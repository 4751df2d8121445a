"""The two kinds of sub-commands: those whose values Hydra composes, and those that take their words as they are."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from largebatch.base.errors import UserError, one_of
from largebatch.base.outcome import Outcome
from largebatch.cli.arguments import keys_of
from largebatch.config.build import build
from largebatch.launch.manifest import Arm

Values = dict[str, Any]
T = TypeVar("T")


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


def take_format(values: Values) -> str:
    """Take ``format`` out of the values of a call: text or json."""
    shape = str(values.pop("format"))
    one_of("format", shape, ("text", "json"))
    return shape


def take_own(name: str, cls: type[T], values: Values) -> tuple[T, list[str]]:
    """Take the keys of a command of one process out of the values, and return them and the run's keys that were given.

    Raises:
        UserError: one of them is not allowed, or this is a rank of several.
    """
    ours = list(typing.get_type_hints(cls))
    asked, words = build(cls, {key: values.pop(key) for key in ours}), values.pop("given")
    if "RANK" in os.environ:
        raise UserError(f"{name} is one process on one device: run it without torchrun.")
    return asked, [key for key in keys_of(words) if key not in (*ours, "format") and not key.startswith("hydra.")]
