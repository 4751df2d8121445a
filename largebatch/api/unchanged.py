"""Keep the state of this process: what a run sets for itself is as it was when the call returns."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from largebatch.base.signals import ENDING
from largebatch.cli.compose import keep_hydra

# Set by torchrun's launcher, which reports failures in its own words.
LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
Undo = Callable[[], object]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Restore, when the block ends, the state of this process that training sets.

    This is: signal handlers, environment variables, ``sys.argv``, ``sys.path``, levels of loggers, Hydra's
    configuration; the number of threads; the default type, precision switches and deterministic algorithms of PyTorch;
    the random states of Python, numpy and PyTorch; the current CUDA device. Inside the block the default type and the
    default device are PyTorch's own, so that a run computes what the command computes.
    """
    with contextlib.ExitStack() as restored:
        for undo in (*_process(), *_random(), *_arithmetic(), keep_hydra()):
            restored.callback(undo)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            restored.enter_context(torch.device("cpu"))
        yield


def _process() -> Iterator[Undo]:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            handler = signal.getsignal(number)
            if handler is not None:  # one that was not set from Python cannot be set again
                yield functools.partial(signal.signal, number, handler)
    environment, arguments = dict(os.environ), sys.argv
    yield lambda: _set_environment(environment)
    yield lambda: setattr(sys, "argv", arguments)
    places = list(sys.path)
    yield lambda: sys.path.__setitem__(slice(None), places)
    for logger in map(logging.getLogger, LOGGERS):
        yield functools.partial(logger.setLevel, logger.level)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _random() -> Iterator[Undo]:
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(numbers)
    yield lambda: torch.set_rng_state(cpu)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states, device = torch.cuda.get_rng_state_all(), torch.cuda.current_device()
        yield lambda: torch.cuda.set_rng_state_all(states)
        yield lambda: torch.cuda.set_device(device)


def _arithmetic() -> Iterator[Undo]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield lambda: torch.set_num_threads(threads)
    yield lambda: torch.set_default_dtype(dtype)
    mode = torch.get_deterministic_debug_mode()
    yield lambda: torch.set_deterministic_debug_mode(mode)
    backends: Any = torch.backends
    # Undone from the last to the first: the newer switches come after the older ones, which change them.
    for switches in (
        *(backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn, backends.mkldnn.matmul),
    ):
        yield _restoring(switches, "fp32_precision")
    for switches, name in (
        (backends.cuda.matmul, "allow_tf32"),
        *((backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")),
    ):
        with contextlib.suppress(RuntimeError):  # who has used the newer switches alone cannot read the older ones
            yield _restoring(switches, name)


def _restoring(owner: Any, name: str) -> Undo:
    value = getattr(owner, name)
    return lambda: setattr(owner, name, value)
