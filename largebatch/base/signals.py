"""Signals as wishes: the first asks the run to stop after a whole iteration, the second stops it at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

FAULT = 1
INTERRUPTED = 130  # exit status after SIGINT, by the shell's convention
ENDED = 75  # exit status after SIGTERM and SIGUSR1: "try again later" (sysexits.h), which schedulers requeue
_PR_SET_PDEATHSIG = 1


class Signals:
    """Within ``with``, remember SIGINT, SIGTERM and SIGUSR1 instead of dying of them.

    A second SIGINT or SIGTERM is the default's. SIGUSR1 is a scheduler's notice that SIGTERM will follow, so after
    it a SIGTERM is the first; a second SIGUSR1 changes nothing.
    """

    def __init__(self) -> None:
        self.interrupt = False
        self.end = False
        self.notice = False
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> signal.Signals | None:
        """The signal that is to be heeded, None where none has come."""
        if self.interrupt:
            return signal.SIGINT
        return signal.SIGTERM if self.end else signal.SIGUSR1 if self.notice else None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and (self.interrupt or self.end):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.interrupt = self.interrupt or number == signal.SIGINT
        self.end = self.end or number == signal.SIGTERM
        self.notice = self.notice or number == signal.SIGUSR1


class Ended(BaseException):
    """SIGTERM or SIGUSR1 came while no run heeds them: it has not begun, or is over."""


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within ``with``, raise :class:`Ended` at SIGTERM and SIGUSR1, as Python raises KeyboardInterrupt at SIGINT."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGUSR1)}
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
