"""Several tasks of a sweep at once on this machine, each in a process of its own with its share of the machine."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from largebatch.base.cores import affinity, allowed_cores
from largebatch.base.progress import Redrawn
from largebatch.base.signals import Signals
from largebatch.launch.manifest import Task, log_of
from largebatch.launch.status import progress

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.1  # between two looks at the processes
_LOOK_SECONDS = 1.0  # and at their records


def run_at_once(
    directory: Path,
    tasks: Sequence[Task],
    jobs: int,
    started: Callable[[Task], None],
    ended: Callable[[Task, int], None],
) -> None:
    """Run ``tasks``, ``jobs`` at once, until all have ended or a signal has.

    A first SIGINT, SIGTERM or SIGUSR1 is passed on to those that run, which write a checkpoint and end; the others
    are not started. A second one ends this process, and with it, by SIGTERM, the others.

    Args:
        directory: The sweep's.
        tasks: In the order in which they start.
        jobs: At least 1.
        started: Called when a task starts.
        ended: Called with its exit status when it has ended; that is negative where a signal killed it.
    """
    jobs = min(jobs, len(tasks))
    most = max(1, allowed_cores() // jobs)  # of each: a quota may allow fewer cores than there are
    cores = [share[:most] for share in shares(affinity(), jobs)]
    gpus = shares(_gpus(), jobs)
    waiting, running = deque(tasks), dict[int, tuple[Task, subprocess.Popen[bytes]]]()
    passed: signal.Signals | None = None
    with Signals() as signals, _Line() as line:
        while running or (waiting and not passed):
            for slot in sorted({*range(jobs)} - running.keys()):
                if waiting and not passed:
                    task = waiting.popleft()
                    line.clear()
                    started(task)
                    running[slot] = task, _start(directory, task, cores[slot], gpus[slot])
            if (came := signals.received) and came != passed:
                passed = came
                for _, process in running.values():
                    process.send_signal(passed)
            for slot, (task, process) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[slot]
                    line.clear()
                    ended(task, status)
            done = len(tasks) - len(waiting) - len(running)
            line.show(done, len(tasks), [task for task, _ in running.values()])
            time.sleep(_WATCH_SECONDS)


def _start(directory: Path, task: Task, cores: Sequence[int], gpus: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a task, its output at the end of its log."""

    def tie() -> None:  # in the new process: this one has no other threads, so Python may run there
        if sys.platform == "linux":
            os.sched_setaffinity(0, cores)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    libc = ctypes.CDLL(None)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
    with log_of(directory, task.number).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "largebatch", "sweep", "run", str(directory), str(task.number)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            preexec_fn=tie,
        )


def shares(things: Sequence[T], jobs: int) -> list[Sequence[T]]:
    """Share out consecutive things evenly; where there are fewer than jobs, several jobs share one."""
    if not things:
        return [()] * jobs
    count = len(things)
    return [
        things[slot * count // jobs : (slot + 1) * count // jobs] or things[slot * count // jobs :][:1]
        for slot in range(jobs)
    ]


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; asking costs no torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in said if line.startswith("GPU-")]  # where there is none, it says so here too


class _Line:
    """On a terminal, a line below all others that says how far the sweep has come."""

    def __init__(self) -> None:
        self._lines = Redrawn(sys.stderr)
        self._next = 0.0

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Take it away, before another line is printed; the next look draws it again."""
        self._lines.clear()
        self._next = 0.0

    def show(self, done: int, total: int, running: Sequence[Task]) -> None:
        """Say how many tasks are done, and where the others are."""
        if not sys.stderr.isatty() or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        where = [
            f"task {task.number} epoch {progress(task.directory)[0]:.1f} of {task.config.epochs}" for task in running
        ]
        self._lines.show("; ".join([f"{done} of {total} done", *where]))
