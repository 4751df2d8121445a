"""P processes on this machine, through torch's elastic launcher; one process needs no launcher."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

from largebatch.base.errors import Fault, UserError
from largebatch.base.outcome import Unbreakable
from largebatch.base.signals import Signals, end_with
from largebatch.runtime.failure import EFFECT_WAITS, effects_wait_for_causes

R = TypeVar("R")

HANG = "Hang"  # the exception's name, by which the word of a rank that found the run hanging is known
_WATCH_SECONDS = 0.1  # between two looks at the ranks


class RankError(Fault):
    """A process of the run failed; the message names it, and holds its traceback where it left one."""


class RankLost(RankError):
    """A process of the run was killed, or hangs: what it did may be done again."""


class Stopped(Exception):
    """A signal ended the processes before they could return a result."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(f"stopped by {self.signal}")


def launch(function: Callable[..., R], arguments: tuple[Any, ...], processes: int, threads: int) -> R:
    """Call ``function(*arguments)`` in every process of a group, and return what rank 0 returns.

    One process, or one that a launcher outside has started (RANK and WORLD_SIZE are set), is this process itself. A
    first signal to end is passed on to the processes, which decide what to return; a second one ends them and this one
    at once.

    Args:
        function: Importable by name; joins the group that RANK and WORLD_SIZE describe.
        arguments: Picklable values.
        processes: How many.
        threads: CPU threads of each; children inherit none of torch's settings.

    Raises:
        UserError: what a process found wrong with the user's input.
        RankError: a process failed; the first of them is named.
        RankLost: it was killed, or hung.
        Stopped: a signal came before the processes could heed it.
    """
    if processes == 1 or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        with effects_wait_for_causes():
            return function(*arguments)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # they tell of every failure in words of their own
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A rank that does not heed SIGTERM hangs: it has lost another one, or is stopped. (Newer versions read this.)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # Then the agent opens no store of its own, on every network of this machine: see _meeting_point.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,  # its restarts share a store with the dead, and often fail: who restarts calls again
        monitor_interval=_WATCH_SECONDS,
        start_method="spawn",
        # The agent would end the ranks within 30 s of a signal, never fetch what they return, and take over a signal
        # that nohup had us ignore.
        signals_to_handle="",
    )
    with tempfile.TemporaryDirectory() as directory, _Relay() as relay:
        config.logs_specs = DefaultLogsSpecs(log_dir=directory)
        config.rdzv_endpoint = str(Path(directory) / "rendezvous")
        store = _meeting_point()
        try:
            results = elastic_launch(config, enter)((os.getpid(), store.port), function, arguments)
        except ChildFailedError as error:
            if relay.received:
                raise Stopped(relay.received) from None
            raise explained(error, processes) from None
    return results[0]  # type: ignore[no-any-return]


def _meeting_point() -> Any:
    """Return a store for the ranks, which listens to this machine alone: PyTorch's own listen to every network."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.create_server(("127.0.0.1", 0)) as server:
        # The store closes what it is given.
        return TCPStore(
            "127.0.0.1",
            server.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(server.fileno()),
        )


class _Relay(Signals):
    """Within ``with``, pass signals on to the ranks."""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        ranks = multiprocessing.active_children()
        if not ranks:
            raise Stopped(number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cast(int, rank.pid), number)


def enter(launcher: tuple[int, int], function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    """Run in a new rank: tie its life to the launcher's (process, port of its store), then do the work."""
    parent, port = launcher
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    # Ctrl-C reaches the launcher alone, which passes it on; a launcher that is killed takes its ranks along.
    os.setsid()
    end_with(parent)
    sys.stderr = Unbreakable.of(sys.stderr)
    try:
        return function(*arguments)
    except Exception:
        # The other ranks fail as soon as this one is gone, for want of it. Whoever fails of itself must be seen to
        # be gone first: a fault that this rank only suffers from waits until the launcher has looked again.
        time.sleep(EFFECT_WAITS)
        raise


def explained(error: Any, processes: int) -> Exception:
    """Return what is to be raised for a ChildFailedError: a sentence where the rank left one, else its traceback."""
    rank, failure = error.get_first_failure()
    name, text, trace = _error_file(failure.error_file)
    if name == UserError.__name__:
        return UserError(text)
    if name == Fault.__name__:
        return RankError(f"rank {rank} of {processes}: {text}")
    if name == HANG:  # found by another rank than the one that it names
        return RankLost(text)
    if failure.exitcode < 0:
        return RankLost(f"rank {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}.")
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
