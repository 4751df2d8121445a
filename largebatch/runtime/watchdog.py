"""A run that hangs is ended, with the name of the process that hangs and its iteration, instead of waited for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from largebatch.base.errors import Fault
from largebatch.base.numbers import listed
from largebatch.runtime.world import World

T = TypeVar("T")
Watched = Callable[[Iterable[Any], str], Iterator[Any]]  # Watchdog.watched, or unwatched

LOADING = "loading images"
_LONGEST_LOOK = 5.0  # seconds between two looks
_LOOKS = 10  # before a run without progress is given up, at least


class Hang(Fault):
    """No process has made progress for too long; the message names those that keep the others waiting."""


def unwatched(batches: Iterable[T], doing: str) -> Iterator[T]:
    """Yield ``batches``; nobody waits for them."""
    return iter(batches)


@dataclass(frozen=True)
class Beat:
    """Last report of a process: number of checks, number of batches, iteration, and activity."""

    looks: int
    batches: int
    iteration: int
    doing: str


class Watchdog:
    """Watches, within ``with``, that batches go on somewhere in the run; any process of it has one.

    Every process tells the others where it is, through the store that they met in. A process that has not moved for
    half of ``seconds`` looks at all of them, and again at the end: if nobody has moved in between, the run hangs.

    Args:
        world: The processes.
        seconds: Without a batch in any process, before the run is given up; None watches nothing.
        give_up: Called in a thread of its own with what was found, and whether this process is the one to tell
            people of it. It must end the process: the training thread may wait in a kernel for ever.
    """

    def __init__(self, world: World, seconds: float | None, give_up: Callable[[Hang, bool], None]) -> None:
        self.iteration = 0
        self._world, self._seconds, self._give_up = world, seconds, give_up
        self._looks, self._batches, self._doing = 0, 0, "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no more: what follows has no batches, and may take its time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def watched(self, batches: Iterable[T], doing: str) -> Iterator[T]:
        """Yield ``batches``, and take every one of them for progress in ``doing``."""
        for batch in batches:
            self._doing = doing
            self._batches += 1
            yield batch
            self._doing = LOADING

    def _watch(self) -> None:
        assert self._seconds is not None
        store = None if self._world.store is None else self._world.store.clone()
        if store is not None:
            store.set_timeout(timedelta(seconds=self._seconds))
        look = min(self._seconds / _LOOKS, _LONGEST_LOOK)
        # Counted in looks, not by the clock: a process that was itself stopped has not waited meanwhile.
        waited, last, half = 0.0, -1, None
        while not self._stop.wait(look):
            self._looks += 1
            beat = Beat(self._looks, self._batches, self.iteration, self._doing)
            try:
                if store is not None:
                    store.set(_key(self._world.rank), json.dumps(asdict(beat)))
                if beat.batches != last:
                    waited, last, half = 0.0, beat.batches, None
                    continue
                waited += look
                if half is None and waited >= self._seconds / 2:
                    half = self._beats(store, beat)
                elif half is not None and waited >= self._seconds:
                    now = self._beats(store, beat)
                    if any(one.batches != other.batches for one, other in zip(half, now, strict=True)):
                        waited, half = self._seconds / 2, now
                        continue
                    text, speaker = verdict(half, now, self._seconds)
                    self._give_up(Hang(text), self._world.rank == speaker)
                    return
            except DistError:
                if self._stop.wait(look):  # the training thread has felt it too, and is on its way out
                    return
                text = (
                    f"rank {self._world.rank} of {self._world.size}, {self._doing} in iteration {self.iteration + 1}, "
                    "has lost the store that the processes met in, which rank 0 or its launcher keeps."
                )
                self._give_up(Hang(text), True)
                return

    def _beats(self, store: Store | None, own: Beat) -> list[Beat]:
        if store is None:
            return [own]
        keys = [_key(rank) for rank in range(self._world.size)]
        # A key that is not there would be waited for: its process has not come to its first look.
        return [Beat(**json.loads(store.get(key))) if store.check([key]) else Beat(0, 0, 0, "starting") for key in keys]


def _key(rank: int) -> str:
    return f"largebatch/beat/{rank}"


def verdict(before: list[Beat], now: list[Beat], seconds: float) -> tuple[str, int]:
    """Say who keeps the others waiting.

    Args:
        before: A beat a rank, some looks ago.
        now: The same without any batch in between.
        seconds: For which nothing has moved.

    Returns:
        A sentence, and the rank that is to say it: the lowest of those that are able to.
    """
    silent = [rank for rank, (one, other) in enumerate(zip(before, now, strict=True)) if one.looks == other.looks]
    awake = [rank for rank in range(len(now)) if rank not in silent]
    guilty = silent
    if not silent:
        behind = min(beat.iteration for beat in now)
        guilty = [rank for rank in awake if now[rank].iteration == behind]
        loading = [rank for rank in guilty if now[rank].doing == LOADING]
        guilty = loading or guilty
    doing, iteration = now[guilty[0]].doing, now[guilty[0]].iteration + 1
    if len(guilty) == 1:
        who = f"rank {guilty[0]} of {len(now)} " + ("has stopped responding" if silent else f"is still {doing}")
    else:
        who = f"ranks {listed(guilty)} of {len(now)} " + ("have stopped responding" if silent else f"are still {doing}")
    wait = "" if len(guilty) == len(now) else ", and the others wait"
    text = f"no progress for {seconds:g} s (launcher.timeout): {who} in iteration {iteration}{wait}."
    return text, awake[0] if awake else 0
