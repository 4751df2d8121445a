"""Turn the arguments of a Python call into the words of a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.base.errors import UserError

# What Hydra reads as it stands; other text is put into quotes, where it is a part of a list or a mapping.
_PLAIN = re.compile(r"[\w./:@%+~-]+")


def as_words(name: str, words: Sequence[str], keys: Mapping[str, Any], lists_in_brackets: bool = True) -> list[str]:
    """Return the words of a command line.

    Args:
        name: The function, for errors.
        words: ``key=value`` as on the command line.
        keys: Values by key. Two underscores stand for a dot: ``lr__base=0.2`` is ``lr.base=0.2``.
        lists_in_brackets: Write a list as ``[a,b]``, else as ``a,b``.

    Raises:
        UserError: a word that is not key=value, or a value that has no form on a command line.
    """
    found = []
    for word in words:
        if not isinstance(word, str) or "=" not in word or word.startswith("-"):
            raise UserError(
                f"largebatch.{name} takes words such as 'k=8' and keywords such as k=8, not {word!r}. Sweeps (-m) and "
                "other flags belong to the command line."
            )
        found.append(word)
    for key, value in keys.items():
        text = _text(key, value, 0)
        found.append(f"{key.replace('__', '.')}={text if lists_in_brackets else text.strip('[]')}")
    return found


def _text(key: str, value: Any, depth: int) -> str:
    """Return a value as it is written on a command line; ``depth`` counts the lists and mappings around it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    directory = getattr(value, "directory", None)  # of a run
    path = directory if isinstance(directory, os.PathLike) else value
    if isinstance(path, str | os.PathLike):
        text: str = os.fspath(path)
        if depth == 0:  # a comma would make several values of it; a list that is given as text stays one
            return _quoted(text) if "," in text and text[0] not in "[{$'\"" else text
        return text if _PLAIN.fullmatch(text) else _quoted(text)
    if isinstance(value, Mapping):
        pairs = (f"{_text(key, one, depth + 1)}:{_text(key, other, depth + 1)}" for one, other in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(_text(key, one, depth + 1) for one in value) + "]"
    if callable(getattr(value, "item", None)):  # a number of numpy or PyTorch
        return _text(key, value.item(), depth)
    raise UserError(
        f"{key}={value!r} has no form on the command line: it takes text, a path, a number, True, False, None, a list "
        "or a mapping of these."
    )


def _quoted(text: str) -> str:
    mark = '"' if "'" in text else "'"
    return mark + text.replace(mark, f"\\{mark}") + mark
