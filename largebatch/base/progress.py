"""Show progress while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows bars though its output is no terminal."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def said_after(seconds: float, text: str) -> Iterator[None]:
    """Print a line on a terminal where what is done within ``with`` takes longer than some seconds."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def notebook_bar() -> Any:
    """Return tqdm's bar for notebooks: a widget where ipywidgets is installed, else text."""
    if importlib.util.find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as widget

    return widget


class Progress:
    """A bar over the run's iterations, with a line above it for every epoch.

    Args:
        total: Iterations of the run.
        start: Iterations done already.
        log: Where every line goes too (``log.txt``); None for a process that prints nothing.
    """

    def __init__(self, total: int, start: int, log: Callable[[str], None] | None) -> None:
        self._log = log
        self._at, self._since = start, time.monotonic()
        in_notebook = is_notebook()
        shown = log is not None and (in_notebook or sys.stderr.isatty())
        self._bar = (notebook_bar() if shown and in_notebook else tqdm)(
            total=total,
            initial=start,
            unit="it",
            disable=not shown,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        )

    def update(self, iteration: int, epoch: float, rate: float, loss: float, error: float, minibatch: int) -> None:
        """Show where the run is: rate, loss and error since the last look, images/s."""
        self._bar.set_description(f"epoch {epoch:.1f}", refresh=False)
        now = time.monotonic()
        speed = (iteration - self._at) * minibatch / max(now - self._since, 1e-9)
        self._at, self._since = iteration, now
        self._bar.set_postfix_str(
            f"rate {rate:.4g}, loss {loss:.3f}, error {error:.1f} %, {speed:,.0f} images/s", refresh=False
        )
        self._bar.update(iteration - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line and keep it in the log."""
        if self._log is None:
            return
        self._log(text)
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class Redrawn:
    """Lines at the end of a terminal that are drawn again in place, cut at its width and height.

    No thread refreshes them: processes may be started meanwhile. Clear them before anything else is printed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rows = stream, 0

    def show(self, text: str) -> None:
        """Draw these lines in the place of the last ones."""
        size = shutil.get_terminal_size()
        lines = text.splitlines()[: size.lines - 1]
        self.clear()
        for line in lines:
            self._stream.write((line if len(line) < size.columns else f"{line[: size.columns - 2]}…") + "\n")
        self._stream.flush()
        self._rows = len(lines)

    def clear(self) -> None:
        """Take the lines away."""
        if self._rows:
            self._stream.write(f"\x1b[{self._rows}F\x1b[J")  # to the beginning of the first one; all below it goes
            self._rows = 0
