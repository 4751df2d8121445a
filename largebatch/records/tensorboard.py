"""Write TensorBoard's files: scalars under readable tags, and the experiment's values as hparams.

``tensorboard --logdir runs`` then compares the runs of a sweep by their values. Seeds of one experiment are one trial,
whose metrics TensorBoard averages.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# By kind of line and figure; TensorBoard puts what has the same first word under one heading.
TAGS = {
    ("iteration", "rate"): "rate/learning_rate",
    ("iteration", "loss"): "loss/train",
    ("iteration", "train_error"): "error/train",
    ("epoch", "rate"): "rate/learning_rate_epoch",
    ("epoch", "train_loss"): "loss/train_epoch",
    ("epoch", "val_loss"): "loss/val",
    ("epoch", "train_error"): "error/train_epoch",
    ("epoch", "val_error"): "error/val",
    ("epoch", "val_error_top5"): "error/val_top5",
    ("epoch", "val_error_recomputed"): "error/val_recomputed",
    ("epoch", "images_per_second"): "speed/images_per_second",
    ("epoch", "seconds"): "speed/seconds_per_epoch",
}


class Events:
    """Writes a run's event file. TensorBoard is a convenience: where its file cannot be written, training goes on."""

    def __init__(self, directory: Path, resume_at: int | None) -> None:
        """Begin an event file.

        Args:
            directory: The run's.
            resume_at: The iteration that the run goes on from, or None for a new run: what earlier files say of later
                iterations is void.

        Raises:
            OSError: the file cannot be made.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Not EventFileWriter: its thread reports a full disk in a traceback of its own. TensorBoard reads a directory's
        # files in the order of their names: each start's must come after those before it, wherever the clock was set.
        before = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")]
        number = max(int(time.time()), 1 + max((int(text) for text in before if text.isdecimal()), default=0))
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer: Any = RecordWriter((directory / name).open("ab"))
        self._add(file_version="brain.Event:2")
        if resume_at is not None:  # the reader drops later events when it sees a start at an earlier step
            self._add(step=resume_at + 1, session_log=SessionLog(status=SessionLog.START))

    def hparams(self, origin: Mapping[str, Any]) -> None:
        """Write the experiment's values, once a run.

        Args:
            origin: The run's provenance, with ``experiment`` and ``experiment_hash``.
        """
        from tensorboard.plugins.hparams import summary_v2

        # No list of an experiment's hparams, which no single run knows: TensorBoard makes it from all runs, with their
        # types, which of them differ, and every scalar as a metric.
        values = dict(_flat(origin["experiment"]))
        self._add(summary=summary_v2.hparams_pb(values, trial_id=origin["experiment_hash"]))

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Write the figures of one line of ``metrics.jsonl``; errors are in %."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        kind = line["kind"]
        values = [
            Summary.Value(tag=TAGS.get((kind, name), f"{kind}/{name}"), simple_value=value)
            for name, value in line.items()
            if isinstance(value, float) and name != "epoch"
        ]
        self._add(step=int(line["iteration"]), summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was lost before
                writer.close()

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._writer is None:
            return
        try:
            self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._writer.flush()
        except OSError:  # after half a line, the rest of the file would not be read
            self.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float | str) else str(value)
