"""Errors that are shown as a sentence, and the checks that raise them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import typing
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one sentence, exit status 2, never a traceback."""


class Fault(RuntimeError):
    """Something beyond the program went wrong, such as a killed process: shown as it is, exit status 1."""


def installation(*packages: str) -> str:
    """Return the command that installs packages where this program runs: an environment of uv's has no pip."""
    names = " ".join(packages)
    if importlib.util.find_spec("pip"):
        return f"{shlex.quote(sys.executable)} -m pip install {names}"
    return f"uv pip install --python {shlex.quote(sys.executable)} {names}"


def nearest(word: str, allowed: typing.Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed word, or "" where none is close."""
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(key: str, value: str, allowed: typing.Sequence[str]) -> None:
    """Raise :class:`UserError` unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known: it takes {', '.join(allowed)}.{nearest(value, allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    """Raise :class:`UserError` if ``value`` is given and below ``least``."""
    if value is not None and not value >= least:
        raise UserError(f"{key}={value} is too small: it takes {least:g} or more.")
