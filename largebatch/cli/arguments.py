"""``key=value`` words of the commands that Hydra does not compose: split at the first =, values as they stand."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.base.errors import UserError, nearest, one_of

WIDTH = 100  # columns of --help


@dataclass(frozen=True)
class Word:
    """A key that a command takes.

    Attributes:
        key: Its name.
        default: Its value where it is not given; None: there is none.
        help: What it does, in a sentence or two, for ``--help``.
        allowed: The values that it takes; empty: any.
        repeats: Whether it may be given several times.
    """

    key: str
    default: str | None
    help: str
    allowed: tuple[str, ...] = ()
    repeats: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """What a command takes, and how its ``--help`` teaches it.

    Attributes:
        command: Its name, such as ``table``.
        summary: A sentence on what it does.
        words: Its keys.
        examples: Command lines without the program's name, each with what it does.
        closing: Paragraphs after the keys, such as how a figure is defined.
    """

    command: str
    summary: str
    words: tuple[Word, ...]
    examples: tuple[tuple[str, str], ...]
    closing: tuple[str, ...] = ()

    def read(self, arguments: Sequence[str]) -> Given | None:
        """Return what was given, or None after ``--help`` was printed.

        Raises:
            UserError: a word is not key=value, a key is not known or given twice, or a value is not allowed.
        """
        if {"--help", "-h"} & {*arguments}:
            print(self.help())
            return None
        known = {word.key: word for word in self.words}
        values: dict[str, list[str]] = {}
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals or key not in known:
                close = nearest(key.lstrip("-"), known)
                what = f"'{key}' is not a key" if equals else f"'{argument}' is not key=value"
                raise UserError(f"{what} of {self.command}: it takes {', '.join(known)}.{close}")
            if known[key].allowed:
                one_of(key, value, known[key].allowed)
            if key in values and not known[key].repeats:
                raise UserError(f"{key} was given twice, as {key}={values[key][0]} and as {key}={value}: give it once.")
            values.setdefault(key, []).append(value)
        return Given(values, {word.key: word.default for word in self.words})

    def help(self) -> str:
        """Return the text of ``--help``."""
        width = max(len(word.key) for word in self.words) + 3
        lines = [f"largebatch {self.command} [key=value …]", "", *textwrap.wrap(self.summary, WIDTH), ""]
        for word in self.words:
            text = word.help
            if word.allowed:
                text += f" One of {', '.join(word.allowed)}."
            if word.default is not None:
                text += f" By default {word.default}."
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"  {word.key + '=':<{width}}", subsequent_indent=" " * (width + 2)
            )
        for paragraph in self.closing:
            lines += ["", *textwrap.wrap(paragraph, WIDTH)]
        lines += ["", "Examples:"]
        for line, what in self.examples:
            lines += [f"  largebatch {line}", f"      {what}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Given:
    """The words of one call."""

    values: dict[str, list[str]]
    defaults: dict[str, str | None]

    def all(self, key: str) -> list[str]:
        """Return every value of a key that repeats: the default where it was not given."""
        default = self.defaults[key]
        return self.values.get(key, [] if default is None else [default])

    def text(self, key: str) -> str | None:
        """Return a value as it stands."""
        return next(iter(self.all(key)), None)

    def number(self, key: str, above: float = -math.inf) -> float:
        """Return a number.

        Raises:
            UserError: it is not a finite one above ``above``.
        """
        text = self.text(key)
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above):
            what = "a number" if above == -math.inf else f"a number above {above:g}"
            raise UserError(f"{key}={text} is not {what}.")
        return value

    def whole(self, key: str, least: int) -> int:
        """Return a whole number.

        Raises:
            UserError: it is not one of ``least`` or more.
        """
        text = self.text(key) or ""
        if not (text.isdecimal() and int(text) >= least):
            raise UserError(f"{key}={text} is not a whole number of {least} or more.")
        return int(text)

    def flag(self, key: str) -> bool:
        """Return whether a key is true.

        Raises:
            UserError: it is neither true nor false.
        """
        text = self.text(key) or ""
        one_of(key, text, ("true", "false"))
        return text == "true"
