"""Measure the cost of a checkpoint: the copy on the training path, and the write during training."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from largebatch.bench.compare import Side, Timings, take_turns
from largebatch.bench.step import make_ours
from largebatch.config.run import Config
from largebatch.runtime.placement import Placement
from largebatch.training import checkpoint


def time_checkpoint(
    config: Config, placement: Placement, repeats: int, iterations: int, directory: Path | None = None
) -> tuple[Timings, list[float], int]:
    """Time steps in turn with the same steps while a checkpoint is taken and written.

    Args:
        config: Network, k and n.
        placement: Where they are.
        repeats: Timed turns of each side.
        iterations: Steps of a turn.
        directory: Where a directory for the checkpoints is made; by default where temporary files are.

    Returns:
        Sides ``calm`` and ``saving`` (until the checkpoint is on the disk), the seconds that each copy took on the
        training path, and the bytes of a checkpoint.
    """
    ours = make_ours(config, placement)
    copies: list[float] = []
    with tempfile.TemporaryDirectory(prefix="largebatch-bench-", dir=directory) as here:
        writer = checkpoint.Writer(Path(here), 1, before=lambda: None, complain=_fail)

        def calm() -> None:
            for _ in range(iterations):
                ours.step()

        def saving() -> None:
            started = time.perf_counter()
            tensors, scalars = checkpoint.pack(ours.learner.model, ours.learner.optimizer)
            writer.submit(checkpoint.Snapshot(tensors, {"iteration": len(copies), "optimizer": scalars}))
            copies.append(time.perf_counter() - started)
            calm()
            writer.finish()

        images = iterations * config.minibatch
        sides = {"calm": Side(calm, images), "saving": Side(saving, images)}
        timings = take_turns(sides, repeats, "steps beside a checkpoint")
        size = checkpoint.candidates(Path(here))[0].stat().st_size
    return timings, copies[1:], size


def _fail(text: str) -> None:
    raise OSError(text)
