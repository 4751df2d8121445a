"""One grammar for every command: ``key=value`` in any order, flags anywhere between, lists, paths, booleans.

A list is ``a,b`` or ``[a,b]``, and a key that takes one may be given several times. A key that takes one value is
given once. ``~`` at the beginning of a path is the home directory.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largebatch.base.errors import UserError, nearest, one_of
from largebatch.base.files import at_home
from largebatch.config.build import is_list, is_path

WIDTH = 100  # columns of --help
BOOLEAN = ("true", "false")
SWEEPING = {"-m", "--multirun", "hydra.mode=MULTIRUN", "launcher=slurm"}  # a,b is a sweep's two arms
FLAGS = {  # of the commands that Hydra composes: whether a value follows
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--multirun", "-m", "--run", "-r", "--resolve"), False),
    **dict.fromkeys(("--shell-completion", "-sc", "--info", "-i"), False),
    **dict.fromkeys(("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"), True),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--experimental-rerun"), True),
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # may follow --info
_HYDRAS = re.compile(r"[{$]|\w+\(")  # the beginning of a value that Hydra alone can read: a mapping, ${…}, range(…)


def pieces(text: str) -> list[str]:
    """Split a list, ``a,b`` or ``[a,b]``, at its commas: not at those in quotes or brackets. Quotes are kept."""
    if text.startswith("[") and text.endswith("]") and "[" not in text[1:]:
        text = text[1:-1]
    return [piece.strip() for piece in re.findall(r"""(?:'[^']*'|"[^"]*"|\[[^]]*\]|[^,])+|(?<![^,])(?=,|$)""", text)]


def unquoted(text: str) -> str:
    """Return a text without the quotes around it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def paths(text: str) -> list[str]:
    """Return the paths of a list; a path that exists is one, though there is a comma in its name."""
    parts = [text] if Path(text).exists() else pieces(text)
    return [at_home(unquoted(part)) for part in parts]


def keys_of(words: Iterable[str]) -> list[str]:
    """Return the keys of ``key=value`` words, each once."""
    return list(dict.fromkeys(word.partition("=")[0].lstrip("+~") for word in words))


def verb_first(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the first that is neither a flag nor ``key=value`` in front, where there is one."""
    for place, argument in enumerate(arguments):
        follows = place and FLAGS.get(arguments[place - 1])
        if not (follows or "=" in argument or argument[:1] in ("-", "+", "~", "")):
            return [argument, *arguments[:place], *arguments[place + 1 :]]
    return list(arguments)


def is_asked_for_help(arguments: Iterable[str]) -> bool:
    """Whether ``--help`` is among the arguments."""
    return bool({"--help", "-h"} & {*arguments})


def _twice(key: str, first: str, second: str) -> UserError:
    return UserError(f"{key} was given twice, as {key}={first} and as {key}={second}: give it once.")


def _several(key: str, text: str) -> UserError:
    return UserError(f"{key}={text} is several values, and {key} takes one.")


def for_hydra(command: str, arguments: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Return arguments as Hydra reads them: flags first, every list in brackets, paths in quotes.

    Args:
        command: Its name.
        arguments: In any order.
        kinds: The type of every key.

    Raises:
        UserError: a flag that is not known, a key that was given twice, or several values where one is taken.
    """
    flags, words = _split(command, arguments, kinds)
    sweeping = bool(SWEEPING & {*flags, *words})
    done: dict[str, str] = {}  # of a key that was given as it stands
    lists: dict[str, list[str]] = {}
    others = []
    for word in words:
        name, equals, text = word.partition("=")
        key = name.lstrip("+")
        if not equals or name.startswith("~"):
            others.append(word)
            continue
        kind = kinds.get(key)
        many = is_list(kind) and text != "null" and not _HYDRAS.match(text) and not re.match(r"\[.*\],|\[\[", text)
        if key in done or (key in lists and not many):
            raise _twice(key, done.get(key) or ",".join(lists[key]), text)
        if many:
            lists.setdefault(key, []).extend(map(_quote, paths(text)) if is_path(kind) else pieces(text))
            continue
        done[key] = text
        if ".kwargs." in key:  # one argument of a callable, which no configuration of ours names
            name = f"++{key}"
        others.append(f"{name}={_one(key, text, kind, sweeping)}")
    return [*flags, *others, *(f"{key}=[{','.join(values)}]" for key, values in lists.items())]


def _split(command: str, arguments: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return flags, each with its value, and words."""
    flags, words = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
        elif name not in FLAGS or (equals and not FLAGS[name]):
            following = value or next(rest, "")
            shown = "…" if following[:1] in ("-", "") or (not value and "=" in following) else following
            key = name.lstrip("-")
            shown = "true" if key == "resume" and shown == "…" else shown
            hint = f" Keys are written without hyphens: {key}={shown}."
            raise UserError(
                f"'{argument}' is not a flag of {command}: it takes -m, --config-dir DIR, --cfg job, --help."
                f"{(key not in kinds and nearest(name, FLAGS)) or hint}"
            )
        elif FLAGS[name]:
            given = value if equals else next(rest, None)
            if given is None:
                raise UserError(f"{name} needs a value, such as --cfg job or --config-dir DIR.")
            flags += [name, at_home(given)]
        else:
            flags.append(argument)
    if flags and flags[-1] in ("--info", "-i") and words and words[-1] in INFO:
        flags.append(words.pop())
    return flags, words


def _one(key: str, text: str, kind: Any, sweeping: bool) -> str:
    """Return the text of one value, or of a sweep's; a path in quotes, which may hold what Hydra gives a meaning to."""
    quoted = text[:1] in ("'", '"') and unquoted(text) != text
    if text in ("", "null") or text[0] == "[" or _HYDRAS.match(text) or (quoted and not is_path(kind)):
        return text
    parts = [text] if quoted or (is_path(kind) and Path(text).exists()) else pieces(text)
    if len(parts) > 1 and not sweeping and kind is not None:
        raise UserError(f"{_several(key, text)} Add -m to run them one after another.")
    if not is_path(kind):
        return text
    return ",".join(_quote(at_home(unquoted(part))) for part in parts)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


@dataclass(frozen=True)
class Word:
    """A key that a command takes.

    Attributes:
        key: Its name.
        default: Its value where it is not given; None: there is none.
        help: What it does, in a sentence or two, for ``--help``.
        allowed: The values that it takes; empty: any.
        many: Whether it takes a list.
        path: Whether its values are paths.
        alias: Another name of it.
    """

    key: str
    default: str | None
    help: str
    allowed: tuple[str, ...] = ()
    many: bool = False
    path: bool = False
    alias: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """Keys of a command, and the texts of its ``--help``.

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
        if is_asked_for_help(arguments):
            print(self.help())
            return None
        known = {word.key: word for word in self.words}
        known |= {word.alias: word for word in self.words if word.alias}
        values: dict[str, list[str]] = {}
        for argument in arguments:
            name, equals, text = argument.partition("=")
            if not equals or name not in known:
                close = nearest(name.lstrip("-"), known)
                what = f"'{name}' is not a key" if equals else f"'{argument}' is not key=value"
                names = ", ".join(word.key for word in self.words)
                raise UserError(f"{what} of {self.command}: it takes {names}.{close}")
            word = known[name]
            if word.key in values and not word.many:
                raise _twice(word.key, values[word.key][0], text)
            values.setdefault(word.key, []).extend(_read(word, text))
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


def _read(word: Word, text: str) -> list[str]:
    """Return what was given for a key, one value or several."""
    if word.many:
        return paths(text) if word.path else [unquoted(piece) for piece in pieces(text)]
    if word.path:
        return [at_home(unquoted(text))]
    text = text.lower() if word.allowed == BOOLEAN else text
    if word.allowed and text not in word.allowed and len(pieces(text)) > 1:
        raise _several(word.key, text)
    if word.allowed:
        one_of(word.key, text, word.allowed)
    return [text]


@dataclass(frozen=True)
class Given:
    """The words of one call."""

    values: dict[str, list[str]]
    defaults: dict[str, str | None]

    def all(self, key: str) -> list[str]:
        """Return every value of a key that takes a list: the default where it was not given."""
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
        text = self._single(key)
        try:
            value = float(text)
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
        text = self._single(key)
        if not (text.isdecimal() and int(text) >= least):
            raise UserError(f"{key}={text} is not a whole number of {least} or more.")
        return int(text)

    def flag(self, key: str) -> bool:
        """Return whether a key is true.

        Raises:
            UserError: it is neither true nor false.
        """
        text = self._single(key).lower()
        one_of(key, text, BOOLEAN)
        return text == "true"

    def _single(self, key: str) -> str:
        text = self.text(key) or ""
        if len(pieces(text)) > 1:
            raise _several(key, text)
        return text
