"""Real processes of the installed command, and a look at who lives."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
PATIENCE = 300  # seconds before a wait is given up as a hang
SMALL = ("k=2", "n=8", "device=cpu", "threads=1")
ENDLESS = (*SMALL, "epochs=1000000", "log_every=1")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def last(*words: str) -> list[str]:
    """Return words with the last one of every key: the command takes a key once."""
    return list({word.partition("=")[0]: word for word in words}.values())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def ranks(launcher: int) -> list[int]:
    """Return the ranks that a launcher has started: each leads a session of its own."""
    return [process for process in descendants(launcher) if os.getsid(process) == process]


class Run:
    """A run on its way, in the run directory ``run``."""

    def __init__(self, here: Path, *arguments: str) -> None:
        self.directory = here / "run"
        self.process = subprocess.Popen(
            [BIN / "largebatch", "train", *last("run_dir=run", *arguments)],
            cwd=here,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def lines(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @property
    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    def until_it_trains(self, beyond: int = 0) -> None:
        wait_for(lambda: self.lines > beyond or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()[1]

    def end(self) -> tuple[int, str]:
        """Wait for the end, and return exit status and what was printed."""
        _, printed = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, printed
