"""Several batches on one upload: each pauses where it needs other weights, until all have come that far."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.offloading.flat import Group

_here = threading.local()


class _Stopped(BaseException):
    """Unwinds a batch that will not be finished, because another one failed."""


class Turn:
    """One batch's way through the model, in a thread that runs only while it is its turn."""

    def __init__(self, owner: object, model: nn.Module, batch: Tensor, device: torch.device) -> None:
        self.owner = owner
        self.wants: Group | None = None  # before its first group: nothing
        self.output: Any = None
        self.error: BaseException | None = None
        self.done = False
        self._stop = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, batch, _Setting(device)), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, batch: Tensor, setting: _Setting) -> None:
        self._go.acquire()
        try:
            _here.turn = self
            with setting.entered():
                if not self._stop:
                    self.output = model(batch)
        except _Stopped:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it
            self.error = error
        self.done = True
        self._back.release()

    def ask(self, group: Group) -> None:
        """Pause this thread until a group is on the device."""
        self.wants = group
        self._back.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def go(self) -> None:
        """Let the batch run until it asks for a group or is done; raises what it raised."""
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """End the thread, of a batch that is done or where it is."""
        self._stop = True
        self._go.release()
        self._thread.join()


class _Setting:
    """PyTorch's settings of a thread, copied from the thread that makes this, for computing on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kind = device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        kind, dtype, enabled = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(torch.autocast(kind, dtype, enabled))
            stack.enter_context(torch.cuda.stream(self._stream))
            yield


def current(owner: object) -> Turn | None:
    """Return whose turn this thread is, among the batches that ``owner`` runs."""
    turn: Turn | None = getattr(_here, "turn", None)
    return turn if turn is not None and turn.owner is owner else None


def run(owner: object, model: nn.Module, batches: Sequence[Tensor], bring: Any, device: torch.device) -> list[Any]:
    """Return the model's outputs, of batches that go through it together, group by group.

    Args:
        owner: Whose hooks the model has.
        model: Its hooks call :meth:`Turn.ask` of the turn that is :func:`current`.
        batches: As many as activations fit on the device.
        bring: Has a group on the device.
        device: Where it computes: batches may still be elsewhere.
    """
    turns = [Turn(owner, model, batch, device) for batch in batches]
    try:
        while waiting := [turn for turn in turns if not turn.done]:
            wanted = waiting[0].wants
            if wanted is not None:
                bring(wanted)
            for turn in waiting:
                if turn.wants is wanted:
                    turn.go()
    finally:
        for turn in turns:
            turn.end()
    return [turn.output for turn in turns]
