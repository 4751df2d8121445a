"""P processes on this machine, through torch's elastic launcher; one process needs no launcher."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from largebatch.config import UserError

R = TypeVar("R")

_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A process of the run failed; the message names it and holds its traceback."""


class Stopped(Exception):
    """The launcher was told to stop by a signal, and has stopped its processes."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(f"stopped by {self.signal}")


def launch(function: Callable[..., R], arguments: tuple[Any, ...], processes: int, threads: int) -> R:
    """Call ``function(*arguments)`` in every process of a group, and return what rank 0 returns.

    One process, or one that a launcher outside has started (RANK is set), is this process itself.

    Args:
        function: Importable by name; joins the group that RANK and WORLD_SIZE describe.
        arguments: Picklable values.
        processes: How many.
        threads: CPU threads of each; children inherit none of torch's settings.

    Raises:
        UserError: what a process found wrong with the user's input.
        RankError: a process failed; the first of them is named.
        Stopped: a signal ended the run.
    """
    if processes == 1 or "RANK" in os.environ:
        return function(*arguments)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent would print every failure in its own words, beside ours.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        results = elastic_launch(config, enter)(os.getpid(), function, arguments)
    except ChildFailedError as error:
        raise _explained(error, processes) from None
    except SignalException as error:
        raise Stopped(int(error.sigval)) from None
    return results[0]  # type: ignore[no-any-return]


def enter(parent: int, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    """Run in a new rank: tie its life to the launcher's, then do the work."""
    from torch.distributed.elastic.multiprocessing.errors import record

    # Ctrl-C reaches the launcher alone, which passes it on; a launcher that is killed takes its ranks along.
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    return cast(R, record(function)(*arguments))


def _explained(error: Any, processes: int) -> Exception:
    rank, failure = error.get_first_failure()
    name, text, trace = _error_file(failure.error_file)
    if name == UserError.__name__:
        return UserError(text)
    if failure.exitcode < 0:
        what = f"was killed by {signal.Signals(-failure.exitcode).name}"
    else:
        what = f"failed with exit status {failure.exitcode}"
    return RankError(f"rank {rank} of {processes} {what}" + (f":\n{trace.rstrip()}" if trace else "."))


def _error_file(path: str) -> tuple[str, str, str]:
    """Return (type, message, traceback) of a rank's exception, empty where it left none."""
    try:
        message = json.loads(Path(path).read_text(encoding="utf-8"))["message"]
        name, _, text = message["message"].partition(": ")
        return name, text, message["extraInfo"]["py_callstack"]
    except (OSError, ValueError, KeyError, TypeError):
        return "", "", ""
