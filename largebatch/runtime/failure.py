"""The reason why a group of processes ends, printed once: by the process that finds it, before any of them ends."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from largebatch.base.errors import Fault, UserError

# A launcher ends the other processes when it sees that one has ended, usually at once.
PATIENCE = 60.0  # seconds
EFFECT_WAITS = 1.0
_terminal: TextIO | None = None


def keep_terminal() -> None:
    """Keep standard error as it is now for :func:`tell`, before it is sent to a file."""
    global _terminal
    _terminal = os.fdopen(os.dup(2), "w")


def started_in_group() -> bool:
    """Return whether torchrun, srun or another launcher has started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys() and multiprocessing.parent_process() is None


def tell(text: str) -> None:
    """Print why this process ends, unless another process of its group has printed its reason.

    Under torchrun, one process of a machine writes torchrun's error file, whose text torchrun prints when it has ended
    the others. Elsewhere rank 0 prints; another rank prints while rank 0 is at work, which hosts the group's store,
    and otherwise relies on rank 0. The process that prints must be the first to end: the others wait.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not started_in_group():
        _print(text)
    elif file is None:
        if _is_first_in_store():
            _print(text)
    elif _is_first_on_machine(Path(file)):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}  # torchrun prints the former
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    else:
        time.sleep(PATIENCE)


@contextlib.contextmanager
def effects_wait_for_causes() -> Iterator[None]:
    """In a group that a launcher outside has started, let an error that nobody expected wait for another rank's.

    The other ranks fail as soon as one is gone; the launcher must see that one first. Rank 0 shows its traceback on the
    terminal, the others in torchrun's error file.
    """
    if not started_in_group():
        yield
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    try:
        yield
    except (UserError, Fault):  # printed by tell
        raise
    except Exception as error:
        time.sleep(EFFECT_WAITS)
        if os.environ["RANK"] != "0":
            handler.record_exception(error)
        raise


def give_up(error: Exception, speaks: bool) -> None:
    """Report an error that the processes of a group have found together.

    Args:
        error: In a process that our launcher has started, the launcher prints it.
        speaks: Whether this process is the one to print it, in a group without torchrun.
    """
    if multiprocessing.parent_process() is not None:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        tell(f"largebatch: {error}")
    elif speaks:
        _print(f"largebatch: {error}")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader may have left
        print(text, file=_terminal or sys.stderr, flush=True)


def _is_first_on_machine(error_file: Path) -> bool:
    """Return whether no other rank of this machine has called this before; torchrun gives each rank a directory."""
    try:
        (error_file.parents[1] / "largebatch-reason").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_first_in_store() -> bool:
    """Return whether this rank is to print: the first to ask, while rank 0 hosts the store; rank 0 without a store."""
    from torch.distributed import DistError, TCPStore, is_initialized  # type: ignore[attr-defined]

    if os.environ["RANK"] == "0" and not is_initialized():
        return True
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
        first: bool = store.add("largebatch/reason", 1) == 1
    except (DistError, KeyError, ValueError):  # rank 0 has ended, or will find the same mistake
        return False
    return first
