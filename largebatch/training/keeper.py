"""The keeper of a run's checkpoints: which one the run goes on from, when others are written, which is the best."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

from largebatch.base.errors import UserError
from largebatch.data.identity import Identity
from largebatch.records.provenance import Run
from largebatch.records.write import Position, Record
from largebatch.training import checkpoint
from largebatch.training.agreement import NO_DIGEST, check_same
from largebatch.training.learner import Learner
from largebatch.training.meter import Sums


@dataclass
class Journey:
    """Progress of a run: with the tensors, the contents of a checkpoint."""

    iteration: int = 0
    epoch: Sums = field(default_factory=Sums)
    line: Sums = field(default_factory=Sums)
    epoch_seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    nonfinite: int = 0
    replaced: int = 0
    seconds: float = 0.0


def check_state(found: checkpoint.Checkpoint, images: list[int], data: Identity, where: str, otherwise: str) -> None:
    """Refuse data on which a checkpoint's run was not trained; of one without a digest, only their numbers are known.

    Args:
        found: The checkpoint.
        images: Training and validation images.
        data: What these are.
        where: What errors call the run.
        otherwise: What to do where the data cannot be restored.

    Raises:
        UserError: they are other data; names the first difference.
    """
    check_same(found.state.get("data"), data, where, otherwise)
    if found.state["images"] != images:
        raise UserError(
            f"{where} was trained on {found.state['images']} training and validation images, and now there are "
            f"{images}: another order of samples. Restore the data, or {otherwise}."
        )


class Keeper:
    """Keeps a run's checkpoints. Every process has one; those of rank 0 alone write, once they have a record.

    Args:
        run: The run.
        learner: Its tensors are what is kept.
        images: How many there are to train on and to validate: another order of samples is another run.
        data: What they are.
    """

    def __init__(self, run: Run, learner: Learner, images: list[int], data: Identity) -> None:
        self._run, self._learner, self._images, self._data = run, learner, images, data
        self._directory = run.directory / "checkpoints"
        self._found: checkpoint.Checkpoint | None = None
        self._record: Record | None = None
        self._writer: checkpoint.Writer | None = None
        self._best: checkpoint.Snapshot | None = None
        self._saved = time.monotonic()

    @property
    def position(self) -> Position | None:
        """Return the position of the checkpoint that the run continues from; None for a new run."""
        if self._found is None:
            return None
        return Position(int(self._found.state["iteration"]), int(self._found.state["record_bytes"]))

    def restore(self) -> Journey:
        """Put the newest checkpoint that verifies into the learner, and return how far it had come.

        Raises:
            UserError: it is another run's, or of other data.
        """
        found = self._found = checkpoint.newest(self._directory) if self._run.config.resume else None
        if found is None:
            return Journey()
        check_state(found, self._images, self._data, f"run_dir={self._run.directory}", "use another run_dir")
        if found.state["run_hash"] != self._run.run_hash:
            raise UserError(
                f"{found.path} belongs to another experiment or seed, so this run cannot continue from it: use another "
                "run_dir."
            )
        checkpoint.unpack(found, self._learner.model, self._learner.optimizer)
        self._learner.running.steps = found.state["iteration"]
        values = found.state["journey"]
        return Journey(**{**values, **{name: Sums(**values[name]) for name in ("epoch", "line")}})

    def write_to(self, record: Record, unfinished: bool) -> None:
        """Begin to write, in rank 0: remove what this run does not go on from, and note where it starts.

        Args:
            record: The run's; a checkpoint refers to what has been written to it.
            unfinished: Whether the directory held a run already.
        """
        self._record = record
        keep = self._run.config.checkpoint.keep
        self._writer = checkpoint.Writer(self._directory, keep, record.settle, record.say)
        checkpoint.sweep_up(self._directory)
        for other in checkpoint.candidates(self._directory):
            # Left where it is, it would be counted among the newest that are kept.
            if self._found is None or checkpoint.iteration_of(other) > checkpoint.iteration_of(self._found.path):
                other.unlink()
                why = "does not verify" if self._run.config.resume else "was left"
                record.say(f"removed {other.name}, which {why}")
        if self._found is not None:
            record.say(f"resumed from {self._found.path.name}")
            if "data" not in self._found.state:
                record.say(f"{self._found.path.name} {NO_DIGEST}")
        elif unfinished:
            record.say("no checkpoint to resume from: the run starts from the beginning")

    def is_due(self) -> bool:
        """Whether the minutes between two checkpoints have passed; in rank 0 alone, so that one clock decides."""
        minutes = (time.monotonic() - self._saved) / 60
        return self._record is not None and minutes >= self._run.config.checkpoint.minutes > 0

    def save(self, journey: Journey) -> None:
        """Let a checkpoint be written; every process must call it, rank 0 writes."""
        self._learner.running.synchronise(self._learner.world)
        self._saved = time.monotonic()
        if self._writer:
            self._writer.submit(self._snapshot(journey), self._best)
            self._best = None

    def keep_best(self, journey: Journey) -> None:
        """Copy the run as the best so far, in rank 0; running statistics must agree already."""
        if self._record:
            self._best = self._snapshot(journey)

    def _snapshot(self, journey: Journey) -> checkpoint.Snapshot:
        assert self._record
        tensors, scalars = checkpoint.pack(self._learner.model, self._learner.optimizer)
        state = {
            "iteration": journey.iteration,
            "journey": asdict(journey),
            "optimizer": scalars,
            "record_bytes": self._record.size(),
            "run_hash": self._run.run_hash,
            "images": self._images,
            "data": self._data.to_mapping(),
        }
        return checkpoint.Snapshot(tensors, state)

    def finish(self, keep_best: bool) -> None:
        """Write the best checkpoint where it is to be kept, wait for the disk, and write the weights."""
        if self._writer is None:
            return
        if self._best and keep_best:
            self._writer.submit(None, self._best)
        self._writer.finish()
        checkpoint.save_weights(self._learner.model, self._run.directory / "model.safetensors")

    def close(self) -> None:
        """Wait for what is being written: it belongs to the run's owner, who leaves now."""
        if self._writer:
            self._writer.close()
