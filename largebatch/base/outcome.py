"""Exit statuses, the outcome of a command, and lines for people."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

FAULT, MISTAKE, DIVERGED = 1, 2, 3
STATUS = {"done": 0, "stopped": 0, "diverged": DIVERGED, "failed": FAULT}


@dataclass(frozen=True)
class Outcome:
    """Result of a call: exit status and, if there is one, the run's directory and summary."""

    status: int
    directory: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


class Unbreakable:
    """A stream of text whose reader may leave: what it does not take is dropped, and nothing fails.

    A terminal that was closed, or a pipe whose reader has ended, must not end a night's run: every line of it is in
    log.txt too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def of(cls, stream: TextIO) -> TextIO:
        """Return the stream, made unbreakable."""
        return cast(TextIO, cls(stream))

    def write(self, text: str) -> int:
        """Write ``text``, if there is still somebody to read it; return its length."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(name: str) -> str:
    """Return a stranger's name as it may be printed: on one line, and in characters that UTF-8 has."""
    return "".join(char if char.isprintable() else "?" for char in name)


def say(text: str) -> None:
    """Print a line for people, once for a group of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
