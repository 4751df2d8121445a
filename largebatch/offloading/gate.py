"""One pass at a time: threads that call a model wait for each other, and a pass may not use another thread."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from largebatch.base.errors import UserError

CALL = "_call_impl"  # of torch.nn.Module: runs a module's hooks and its forward


class Gate:
    """Lets one thread at a time into models whose weights travel.

    A pass is the outermost call of a model, or of a module within it that is called without it. Whose call it is shows
    by the frame: hooks that come last are not called after KeyboardInterrupt, and so a counter of calls would not
    come back to 0.

    Attributes:
        is_open: Whether the context has ended, and every thread may go its way.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: threading.Thread | None = None
        self._frame: FrameType | None = None
        self.is_open = False

    def is_mine(self) -> bool:
        """Return whether this thread is in a pass."""
        return self._owner is not None and self._owner.ident == threading.get_ident()

    def is_busy(self) -> bool:
        """Return whether some thread is in a pass."""
        return self._owner is not None

    def enter(self, name: str, may_wait: bool, frame: FrameType | None = None) -> bool:
        """Begin a pass, from a hook that runs before a module's forward; return False where one goes on already.

        Args:
            name: The module's, for an error.
            frame: Of the call; by default that of the module whose hook this is called from.
            may_wait: Whether to wait for another thread's pass: a whole model does. A module within may be a branch of
                that pass, which would wait for it in turn.

        Raises:
            UserError: another thread is in a pass.
        """
        frame = frame or _calling()
        with self._free:
            while self._owner is not None and not self.is_mine() and self._owner.is_alive():
                if not may_wait:
                    raise UserError(
                        f"{name or 'the model'} is called by thread {threading.current_thread().name} while thread "
                        f"{self._owner.name} is in a pass of the model, and both would need other weights at the same "
                        "time: call the layers of a pass in one thread, or use mode=none."
                    )
                self._free.wait(1.0)  # a thread that died gives no sign
            if self.is_open or (self.is_mine() and _runs(self._frame)):
                return False
            self._owner, self._frame = threading.current_thread(), frame
            return True

    def ends(self) -> bool:
        """Return whether the call whose last hook this is began the pass."""
        return self.is_mine() and _calling() is self._frame

    def leave(self) -> None:
        """End this thread's pass."""
        with self._free:
            self._owner = self._frame = None
            self._free.notify_all()

    def close(self) -> None:
        """Wait until no other thread is in a pass, and keep all others out."""
        with self._free:
            while self._owner is not None and not self.is_mine() and self._owner.is_alive():
                self._free.wait(1.0)
            self._owner, self._frame = threading.current_thread(), None

    def open(self) -> None:
        """Let those who wait go on, with weights that travel no more."""
        self.is_open = True
        self.leave()


def _calling() -> FrameType | None:
    """Return the frame of the module's call that runs the hook from which this is called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != CALL:
        frame = frame.f_back
    return frame


def _runs(wanted: FrameType | None) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None and wanted is not None
