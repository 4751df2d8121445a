"""Signals as wishes: the first asks the run to stop after a whole iteration, the second stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # exit status after SIGINT, by the shell's convention
ENDED = 75  # exit status after SIGTERM: "try again later" (sysexits.h), which schedulers requeue


class Signals:
    """Within ``with``, remember SIGINT and SIGTERM instead of dying of them; a second one is the default's."""

    def __init__(self) -> None:
        self.interrupt = False
        self.end = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.interrupt or self.end:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.interrupt = self.interrupt or number == signal.SIGINT
        self.end = self.end or number == signal.SIGTERM
