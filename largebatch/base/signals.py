"""Signal handling: the first signal ends the run after a whole iteration, with a checkpoint; the second at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any

FAULT = 1
INTERRUPTED = 130  # exit status after SIGINT, by the shell's convention
ENDED = 75  # exit status after SIGTERM, SIGHUP and SIGUSR1: "try again later" (sysexits.h), which schedulers requeue
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ACKNOWLEDGED = b"\nlargebatch: finishing the iteration, then writing a checkpoint; Ctrl-C again ends at once\n"
_PR_SET_PDEATHSIG = 1


class Signals:
    """Within ``with``, remember SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of dying of them.

    A second SIGINT or SIGTERM is the default's. SIGUSR1 is a scheduler's notice that SIGTERM will follow, and a closed
    terminal or a service manager sends SIGHUP beside SIGTERM or twice: so after one of them a SIGTERM is the first, and
    a second one changes nothing. A signal that was ignored before stays ignored: that is how nohup and a shell's ``&``
    protect a run.
    """

    def __init__(self) -> None:
        self.interrupt = False
        self.hangup = False
        self.notice = False
        self._terminate = False
        self._before: dict[int, Any] = {}

    @property
    def end(self) -> bool:
        """Whether SIGTERM or SIGHUP has come."""
        return self._terminate or self.hangup

    @property
    def received(self) -> signal.Signals | None:
        """The signal that is to be heeded, None where none has come."""
        if self.interrupt:
            return signal.SIGINT
        if self._terminate:
            return signal.SIGTERM
        return signal.SIGHUP if self.hangup else signal.SIGUSR1 if self.notice else None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _heeded((signal.SIGINT, *ENDING)):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGINT, signal.SIGTERM) and (self.interrupt or self._terminate):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if number == signal.SIGINT and not self.interrupt:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, ACKNOWLEDGED)  # a handler may come in the middle of a print
        self.interrupt = self.interrupt or number == signal.SIGINT
        self._terminate = self._terminate or number == signal.SIGTERM
        self.hangup = self.hangup or number == signal.SIGHUP
        self.notice = self.notice or number == signal.SIGUSR1


def _heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return those that were not ignored when this process started, or since."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


class Ended(BaseException):
    """SIGTERM, SIGHUP or SIGUSR1 came while no run heeds them: it has not begun, or is over."""


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within ``with``, raise :class:`Ended` at SIGTERM, SIGHUP and SIGUSR1, as Python does at SIGINT."""
    before = {number: signal.signal(number, _end) for number in _heeded(ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Tie the life of this process to the one that started it, ``parent``: when that is gone, so is this one.

    Call it first thing. On systems other than Linux it only finds out whether the parent is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before this process asked to be told
        os._exit(FAULT)
