"""Loader processes: batches of a data set, read ahead by processes that live and end with the run."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from largebatch.base.errors import Fault, UserError
from largebatch.base.signals import ENDING, FAULT

Loaded = tuple[Tensor, Tensor, list[str | UserError]]  # inputs, labels and what was wrong, of a batch

PREFETCH = 4  # batches a loader process keeps ready by default,
AHEAD = 2**30  # and bytes of all of them in a training process: eight of these on a node take 8 GiB of its memory


def loaded(
    items: Dataset[Loaded],
    batches: Iterable[list[tuple[int, int]]],
    item_bytes: int,
    workers: int,
    prefetch: int | None,
    pinned: bool,
) -> Iterator[Loaded]:
    """Yield batches that loader processes read, or this process where there are none.

    Args:
        items: Its ``__getitems__`` takes a list of (epoch, index), and returns their batch.
        batches: Those lists.
        item_bytes: Of an item in a batch.
        workers: Loader processes.
        prefetch: ``loader.prefetch``.
        pinned: Whether batches lie in memory that a GPU reads at once.

    Raises:
        UserError: what a loader process found wrong.
        RuntimeError: one was killed; see :func:`is_lost_loader`.
    """
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    if workers and first:
        prefetch = fitting_prefetch(prefetch, workers, len(first[0]) * item_bytes, _shared_memory())
    loader = DataLoader(
        items,
        batch_sampler=itertools.chain(first, rest),  # any iterable of index lists will do
        num_workers=workers,
        prefetch_factor=prefetch if workers and first else None,
        pin_memory=pinned,
        collate_fn=_as_it_is,
        worker_init_fn=_belong_to_the_run,
    )
    _take_loaders_along()
    for inputs, labels, problems in _watched(loader):
        for problem in problems:
            if isinstance(problem, UserError):
                raise problem
        yield inputs, labels, problems


def fitting_prefetch(wanted: int | None, workers: int, batch: int, room: int | None) -> int:
    """Return how many batches each loader process may keep ready.

    They lie in shared memory, which counts as the job's: a container often has 64 MB of it, and a write beyond that
    kills the loader process.

    Args:
        wanted: ``loader.prefetch``; None takes PREFETCH, or what fits into 1 GiB.
        workers: Loader processes, at least one.
        batch: Bytes of a batch.
        room: Bytes of shared memory for this process, None where the system does not say.

    Raises:
        UserError: there is no room for one batch each.
    """
    prefetch = wanted or max(1, min(PREFETCH, AHEAD // (workers * batch)))
    if room is None or (workers * prefetch + 1) * batch <= room:  # one is in use
        return prefetch
    fits = (room - batch) // (workers * batch)
    need = (workers * prefetch + 1) * batch / 1e6
    if fits < 1:
        raise UserError(
            f"shared memory (/dev/shm) has room for {room / 1e6:.0f} MB, and loader.workers={workers} with "
            f"loader.prefetch={prefetch} take {need:.0f} MB: give the container more (docker run --shm-size=8g), or "
            "use fewer loader.workers, or loader.workers=0."
        )
    tell(
        f"loader.prefetch={fits} instead of {prefetch}: {need:.0f} MB of batches do not fit into {room / 1e6:.0f} MB "
        "of shared memory (/dev/shm; docker run --shm-size)"
    )
    return fits


def _shared_memory() -> int | None:
    """Return the free bytes of shared memory for this process, a share where several processes train here."""
    try:
        free = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return free.f_bavail * free.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@functools.cache  # once a process, however often its data are opened
def tell(line: str) -> None:
    """Print a line for people, once for a group of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _belong_to_the_run(worker: int) -> None:
    """Let a loader process live as long as its run: Ctrl-C and a scheduler's SIGTERM reach it too, and are the run's.

    Torch's own watch over the parent sees nothing while an image is read, and not a parent that died first.
    """
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, signal.SIG_IGN)


def _end_with(run: multiprocessing.process.BaseProcess) -> None:
    run.join()  # by a pipe that the run has to hold: its parent, to the system, may be a fork server that lives on
    os._exit(FAULT)


@functools.cache  # once a process, however many loaders it has
def _take_loaders_along() -> None:
    """Let this process end although its loader processes ignore SIGTERM.

    When it ends by an exception that nobody expected, loaders are still held by its traceback, and multiprocessing
    sends SIGTERM to what is left of daemons, and waits for them.
    """
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=0)


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def is_lost_loader(error: BaseException) -> bool:
    """Whether a loader process was killed; torch has only words for it, and raises them wherever the run is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def lost_loader(error: BaseException) -> Fault:
    """Return what to raise for a loader process that was killed: what may have happened, and what to do."""
    return Fault(
        f"a loader process is gone: {error} If the machine ran out of memory, use a smaller loader.workers or "
        "loader.prefetch."
    )


def _watched(loader: DataLoader[Loaded]) -> Iterator[Loaded]:
    """Iterate over a loader; a pipe that a killed loader process has left is a lost loader too."""
    try:
        yield from loader
        return
    except (OSError, EOFError) as error:
        # Torch's handler would raise for the same death once more, in the middle of whatever clears up.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        problem = repr(error)
    # The exception is gone, and with it the last reference to the loader, which has forgotten its processes.
    signal.signal(signal.SIGCHLD, handler)
    raise RuntimeError(f"DataLoader worker has closed its pipe: {problem}.")


def _as_it_is(batch: Any) -> Any:
    return batch
