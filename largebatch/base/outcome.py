"""Exit statuses, the outcome of a command, and lines for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAULT, MISTAKE, DIVERGED = 1, 2, 3
STATUS = {"done": 0, "stopped": 0, "diverged": DIVERGED, "failed": FAULT}


@dataclass(frozen=True)
class Outcome:
    """What a call came to: exit status, and where there is one the run's directory and summary."""

    status: int
    directory: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)


def say(text: str) -> None:
    """Print a line for people, once for a group of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
