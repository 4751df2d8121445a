"""The only training loop: one large step from k logical workers, however many processes they share."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.base.errors import Fault, UserError
from largebatch.base.files import DISK_TROUBLE
from largebatch.base.numbers import FINAL_EPOCHS, final_error
from largebatch.base.progress import Progress
from largebatch.base.signals import FAULT, Signals
from largebatch.config.run import Config
from largebatch.data.source import Batch, Source, is_lost_loader, lost_loader
from largebatch.data.stream import DROPOUT, IndependentShuffles, SampleStream, key
from largebatch.models.batchnorm import recomputed
from largebatch.models.build import check_shapes
from largebatch.records.provenance import provenance
from largebatch.records.read import holds_run
from largebatch.records.write import Position, Record, Skipped, add_probe, ended_by
from largebatch.runtime.lock import owned
from largebatch.runtime.placement import Placement
from largebatch.runtime.watchdog import Hang, Watchdog
from largebatch.runtime.world import World, leave
from largebatch.training import checkpoint
from largebatch.training.cuda_graph import GraphedStep, copied_aside
from largebatch.training.learner import DTYPES, Learner, make_learner, open_data, start
from largebatch.training.meter import Meter, Sums, Wishes, count_replaced
from largebatch.training.optimizer import set_rate
from largebatch.training.prober import Prober
from largebatch.training.validation import batches_of, evaluate, shard, wide

READ_EVERY = 10  # iterations on a GPU


def train_step(learner: Learner, batches: Iterator[Batch], iteration: int, rate: float) -> Tensor:
    """Make one step of kn samples: ŵ = w − η̂ (1/kn) Σ ∇l(x, w), over all k workers.

    Args:
        learner: Changed in place.
        batches: The next k/P / workers_per_pass of them are taken, workers_per_pass · n samples each.
        iteration: Counted from 0.
        rate: η̂ of this iteration.

    Returns:
        A row a worker of this process, (k/P, FIGURES) on the device.
    """
    set_rate(learner.optimizer, rate)
    return step_at_rate(learner, batches, iteration)


def step_at_rate(learner: Learner, batches: Iterator[Batch], iteration: int) -> Tensor:
    """Make one step as :func:`train_step` does, with the rate that the optimizer has."""
    config, placement = learner.config, learner.placement
    learner.optimizer.zero_grad(set_to_none=True)
    passes = placement.workers // placement.workers_per_pass
    # Normalised by the whole minibatch kn (remark 3), in every process alike.
    samples = config.n if config.pitfall.name == "normalize_by_n" else config.minibatch
    factor = config.loss_scale * learner.exchange.factor / samples
    outcomes, corrupt = [], []
    for number in range(passes):
        batch = next(batches)
        if learner.stochastic:  # dropout is drawn for the worker, wherever it runs
            worker = learner.first_worker + number * placement.workers_per_pass
            torch.manual_seed(key(config.seed, DROPOUT, iteration, worker) >> 1)
        learner.running.before_pass(number)
        # Gradients gather here until the last pass, whose back-propagation overlaps the one exchange of the step.
        with learner.exchange.passing(last=number == passes - 1):
            with learner.autocast():
                logits = learner.exchange.net(batch.images)
            losses = F.cross_entropy(logits.to(DTYPES[placement.precision]), batch.labels, reduction="none")
            (losses.sum() * factor).backward()  # type: ignore[no-untyped-call]
        learner.running.after_pass(number)
        outcomes.append((losses.detach(), logits.detach().argmax(1) == batch.labels))
        corrupt.append(batch.corrupt)
    learner.exchange.finish()
    learner.optimizer.step()
    learner.running.after_step(learner.exchange.statistics, learner.world.size)
    rows = _figures(outcomes, config.n)
    count_replaced(rows, corrupt)
    return rows


def _figures(outcomes: list[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Make the rows of all passes at once: pass by pass, these small operations show in a small network's time."""
    losses, right = (torch.cat(parts).view(-1, n) for parts in zip(*outcomes, strict=True))
    losses, right = losses.to(wide(losses.device)), right.sum(1)
    return torch.stack([losses.sum(1), right, (~losses.isfinite()).sum(1), torch.zeros_like(right)], dim=1)


def make_step(learner: Learner) -> Callable[[Iterator[Batch], int, float], Tensor]:
    """Return :func:`train_step` for this learner, recorded and repeated where cuda_graphs=true."""
    if learner.config.cuda_graphs:
        return GraphedStep(learner, functools.partial(step_at_rate, learner))
    return functools.partial(train_step, learner)


@dataclass
class Journey:
    """How far a run has come: with the tensors, all that a checkpoint holds."""

    iteration: int = 0
    epoch: Sums = field(default_factory=Sums)
    line: Sums = field(default_factory=Sums)
    epoch_seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    nonfinite: int = 0
    replaced: int = 0
    seconds: float = 0.0


def fit(config: Config, placement: Placement, directory: Path) -> dict[str, Any]:
    """Train one run and record it; every process of the run makes this call.

    A run that diverges or is interrupted is a result: it is returned, not raised.

    Args:
        config: The run.
        placement: Where its workers are.
        directory: The run's directory, written by rank 0 alone.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: the data do not fit, cannot be read, or the device's memory is too small.
    """
    world = start(config, placement)
    assert world.size == placement.processes, f"{placement.processes} processes were placed, {world.size} have joined"
    source = open_data(config, placement, world)
    config.check_size(source.train_images)
    shape = config.dataset
    check_shapes(config.model, source.classes, (config.n, shape.channels, shape.height, shape.width))
    with _faults_in_words(config, placement), contextlib.ExitStack() as held:
        directory_is_owned(directory, world, config.resume, held)
        run = Run(make_learner(config, placement, world, source.classes), source, directory)
        run.begin()
        summary = run.recorded_loop()
    del run  # DDP, in it, holds the process group
    leave()  # after a fault it is left open: the other processes would fail, and be taken for the cause
    return summary


def directory_is_owned(directory: Path, world: World, resume: bool, held: contextlib.ExitStack) -> None:
    """Make the run directory, and own it in rank 0 for as long as ``held`` is open; the others wait for that.

    Raises:
        UserError: it cannot be written, another process owns it, or has left a run there in the meantime.
    """
    with world.main_first():
        if not world.main:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(owned(directory))
        except OSError as error:
            raise UserError(f"run_dir={directory} cannot be written: {error}.") from None
        if not resume and holds_run(directory):
            raise UserError(f"run_dir={directory} holds a run that has just been made: use another run_dir.")


@contextlib.contextmanager
def _faults_in_words(config: Config, placement: Placement) -> Iterator[None]:
    """Say in a sentence what the user can do about a lack of memory, or a loader process that is gone."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            samples = placement.workers_per_pass * config.n
            raise UserError(
                f"{placement.device} ran out of memory: a pass holds workers_per_pass={placement.workers_per_pass} "
                f"× n={config.n} = {samples} samples. Use a smaller workers_per_pass (the result stays the "
                "same), then a smaller n (it does not)."
            ) from error
        if is_lost_loader(error):
            raise lost_loader(error) from error
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            raise Fault(
                f"a disk failed the run: {error}. Its checkpoints are whole: when the disk has room again, go on with "
                "resume=true."
            ) from error
        raise


def sample_stream(config: Config, train_images: int) -> SampleStream:
    """Return the order of samples that the configuration asks for."""
    kind = IndependentShuffles if config.pitfall.name == "independent_shuffle" else SampleStream
    return kind(train_images, config.k, config.n, config.seed)


def validation_cuts(config: Config, val_images: int) -> list[range]:
    """Return the batches of the validation set: every sample once, but for pitfall=padded_eval."""
    cuts = batches_of(val_images)
    missing = -val_images % config.k if config.pitfall.name == "padded_eval" else 0
    while missing:  # a padding sampler starts again from the first sample
        cuts.append(range(min(missing, val_images)))
        missing -= len(cuts[-1])
    return cuts


class Run:
    """One run on its way: learner, data, record and how far it has come."""

    def __init__(self, learner: Learner, source: Source, directory: Path) -> None:
        config = learner.config
        self.learner, self.source, self.directory, self.config = learner, source, directory, config
        source.on_skip = Skipped(directory)
        self.stream = sample_stream(config, source.train_images)
        self.rates = config.rates(source.train_images)
        self.total = config.total_iterations(source.train_images)
        self.scheduled = config.epochs * self.stream.iterations_per_epoch
        self.journey = Journey()
        self.record: Record | None = None
        self.writer: checkpoint.Writer | None = None
        self.best: checkpoint.Snapshot | None = None
        self.prober = None if config.probe.every is None else Prober(learner, source)
        self.watchdog = Watchdog(learner.world, config.launcher.timeout, self._give_up)
        self.started = self.saved = self.epoch_started = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.directory / "checkpoints"

    def begin(self) -> None:
        """Start afresh, or from the newest checkpoint that verifies, and open the record."""
        found = checkpoint.newest(self.checkpoints) if self.config.resume else None
        if found is not None:
            self._check_origin(found)
            checkpoint.unpack(found, self.learner.model, self.learner.optimizer)
            self.learner.running.steps = found.state["iteration"]
            values = dict(found.state["journey"])
            self.journey = Journey(**{**values, **{name: Sums(**values[name]) for name in ("epoch", "line")}})
            self.started -= self.journey.seconds
            self.epoch_started -= self.journey.epoch_seconds
        self._check_agreement()
        if self.learner.world.main:
            self._open_record(found)
        self.learner.world.barrier()
        if not self.learner.world.main:
            self.learner.world.redirect(self.directory / "logs")

    def _open_record(self, found: checkpoint.Checkpoint | None) -> None:
        unfinished = holds_run(self.directory)
        devices = [_device_name(self.learner.world.device)] * self.learner.world.size
        origin = provenance(self.config, self.learner.placement, devices) | {"decoder": self.source.decoder}
        position = None
        if found is not None:
            position = Position(int(found.state["iteration"]), int(found.state["record_bytes"]))
        self.record = record = Record.open(self.directory, self.config, origin, position)
        self.writer = checkpoint.Writer(self.checkpoints, self.config.checkpoint.keep, record.settle, self._say)
        (self.directory / "logs").mkdir(exist_ok=True)
        checkpoint.sweep_up(self.checkpoints)
        for other in checkpoint.candidates(self.checkpoints):
            # Left where it is, it would be counted among the newest that are kept.
            if found is None or checkpoint.iteration_of(other) > checkpoint.iteration_of(found.path):
                other.unlink()
                self._say(f"removed {other.name}, which " + ("does not verify" if self.config.resume else "was left"))
        kernel, graphs = self.learner.running.kernel, self.config.cuda_graphs
        if kernel != "separate" or graphs:
            self._say(f"bn.kernel={kernel}" + ", and steps are recorded as a CUDA graph" * graphs)
        if found is not None:
            self._say(f"resumed from {found.path.name}")
        elif unfinished:
            self._say("no checkpoint to resume from: the run starts afresh")

    def _check_origin(self, found: checkpoint.Checkpoint) -> None:
        """Refuse a checkpoint of another run, or of other data."""
        counts = [self.source.train_images, self.source.val_images]
        if found.state["images"] != counts:
            raise UserError(
                f"run_dir={self.directory} was trained on {found.state['images']} training and validation images, and "
                f"now there are {counts}: another order of samples. Restore the data, or use another run_dir."
            )
        if found.state["run_hash"] != self.config.run_hash(self.learner.placement.precision):
            raise UserError(
                f"{found.path} belongs to another experiment or seed, so this one cannot go on from it: use another "
                "run_dir."
            )

    def _check_agreement(self) -> None:
        """Refuse a start from which the processes do not agree."""
        world = self.learner.world
        sums = world.sum(torch.tensor([self.journey.iteration], device=world.device))
        if int(sums) != world.size * self.journey.iteration:
            raise UserError(
                f"the processes do not see the same checkpoints in run_dir={self.directory}: it must be on a file "
                "system that all machines share."
            )

    def _say(self, text: str) -> None:
        """Print a line, and keep it in the log; rank 0 alone."""
        if self.record:
            self.record.log(text)
            print(text, file=sys.stderr, flush=True)

    def recorded_loop(self) -> dict[str, Any]:
        """Train; on a fault, leave a word of it in the record."""
        try:
            with self.watchdog:
                summary = self.loop()
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            if self.writer:  # what it still writes belongs to the run's owner, who leaves now
                self.writer.close()
            if self.record:
                self.record.close()
        self.learner.world.barrier()  # until nobody watches any more, nobody may leave
        return summary

    def loop(self) -> dict[str, Any]:
        """Train from where the journey stands to the end, and return the summary."""
        config, journey, learner = self.config, self.journey, self.learner
        per_epoch = self.stream.iterations_per_epoch
        mine = (learner.first_worker, learner.placement.workers, learner.placement.workers_per_pass)
        passes = self.stream.passes(journey.iteration, self.total, *mine)
        arriving = copied_aside(self.source.train(passes), learner.world.device)
        batches = self.watchdog.watched(arriving, "training")
        step = make_step(learner)
        # Reading a figure makes a GPU wait; but with it come signals, which cannot wait for a rare line of the log.
        read_every = min(config.log_every, READ_EVERY) if learner.placement.device == "cuda" else 1
        meter, wishes, status = Meter(config.k, learner.first_worker, learner.world), Wishes(), ""
        progress = Progress(self.total, journey.iteration, self.record.log if self.record else None)
        with Signals() as signals, contextlib.closing(progress):
            if journey.iteration == 0:
                self._tell_of_probes()
                self._probe(epoch=0)
                self.epoch_started = time.monotonic()
            while not status and journey.iteration < self.total:
                rate = self.rates.rate_at(journey.iteration)
                meter.add(step(batches, journey.iteration, rate), config.minibatch)
                journey.iteration += 1
                self.watchdog.iteration = journey.iteration

                logs = journey.iteration % config.log_every == 0 or journey.iteration == 1
                ends_epoch = journey.iteration % per_epoch == 0
                saves = config.checkpoint.every is not None and journey.iteration % config.checkpoint.every == 0
                last = journey.iteration == self.total
                if not (logs or ends_epoch or saves or last or journey.iteration % read_every == 0):
                    continue
                wishes = Wishes(signals.interrupt, signals.end, signals.notice, save=self._save_is_due())
                wishes = meter.read(wishes, journey.epoch, journey.line)
                line = journey.line
                position = journey.iteration / per_epoch
                progress.update(journey.iteration, position, rate, line.mean_loss, line.error, config.minibatch)
                if self.record and logs:
                    self.record.metric(_line(journey.iteration, position, rate, line))
                if logs:
                    journey.line = Sums()
                if journey.epoch.nonfinite:
                    status = "diverged"
                    journey.nonfinite += journey.epoch.nonfinite
                elif wishes.signal:
                    status = "interrupted"
                if ends_epoch and status != "diverged":
                    progress.say(self._end_epoch(rate))
                if saves or wishes.save or status == "interrupted" or (last and self.total < self.scheduled):
                    self.save()
            self.watchdog.stop()
            status = status or ("done" if journey.iteration >= self.scheduled else "stopped")
            summary = self._end(status, wishes.signal)
            progress.say(_closing_words(summary, self.directory))
        return summary

    def _save_is_due(self) -> bool:
        minutes = (time.monotonic() - self.saved) / 60
        return self.learner.world.main and minutes >= self.config.checkpoint.minutes > 0

    def _end_epoch(self, rate: float) -> str:
        """Validate, record the epoch, and return its line for people."""
        learner, journey, sums = self.learner, self.journey, self.journey.epoch
        seconds = time.monotonic() - self.epoch_started
        learner.running.synchronise(learner.world)
        cuts = validation_cuts(self.config, self.source.val_images)
        mine = shard(len(cuts), learner.world.rank, learner.world.size)

        def validate() -> Any:
            with learner.autocast():
                batches = self.watchdog.watched(self.source.validation([cuts[number] for number in mine]), "validating")
                return evaluate(learner.model, batches, mine, cuts, learner.world)

        measured = validate()
        values: dict[str, Any] = {
            "kind": "epoch",
            "epoch": journey.iteration // self.stream.iterations_per_epoch,
            "iteration": journey.iteration,
            "rate": rate,
            "train_loss": sums.mean_loss,
            "train_error": sums.error,
            "val_error": measured.error,
            "val_error_top5": measured.error_top5,
            "val_loss": measured.loss,
            "images_per_second": sums.seen / seconds,
            "seconds": seconds,
            "nonfinite": sums.nonfinite,
            "replaced": sums.replaced,
            "val_unreadable": measured.unreadable,
        }
        if self.config.bn.recompute:
            with recomputed(learner.model, self._forward, self._recompute_images()):
                values["val_error_recomputed"] = validate().error
        best = measured.error < min(journey.errors, default=math.inf)
        journey.errors.append(measured.error)
        journey.nonfinite += sums.nonfinite
        journey.replaced += sums.replaced
        journey.epoch = Sums()
        if self.record:
            self.record.metric(values)
        self._probe(values["epoch"])
        self.epoch_started = time.monotonic()
        if best:
            self.best = self._snapshot()
        return (
            f"epoch {values['epoch']:3d}/{self.config.epochs}  rate {rate:.4g}  loss {sums.mean_loss:.4f}  "
            f"train error {sums.error:.2f} %  val error {measured.error:.2f} %  "
            f"{values['images_per_second']:,.0f} images/s"
        )

    def _probe(self, epoch: int) -> None:
        """Measure how far k can grow from here, where that is due; the run itself is left as it is."""
        if self.prober is None or self.prober.every is None or epoch % self.prober.every:
            return
        line = self.prober.measure(self.journey.iteration, self.watchdog.watched)
        if self.record:
            add_probe(self.directory, line)

    def _tell_of_probes(self) -> None:
        if self.record and self.prober and self.config.probe.every == "auto":
            every = self.prober.every
            often = f"every {every} epochs" if every else "never: one would take more than 5 % of this run"
            self._say(f"probe.every=auto: {often}")

    def _forward(self, images: Tensor) -> None:
        with self.learner.autocast():
            self.learner.model.forward(images)  # not compiled: every batch has another weight in the mean

    def _recompute_images(self) -> Iterator[Tensor]:
        """Yield worker batches of the coming epoch: the same in every process, so that statistics agree."""
        wanted = min(self.config.bn.recompute_batches, self.config.k * self.stream.iterations_per_epoch)
        epoch = self.journey.iteration // self.stream.iterations_per_epoch
        order = self.stream.order(epoch)[: wanted * self.config.n]
        batches = self.source.train((epoch, ids) for ids in torch.split(order, self.config.n))
        return (batch.images for batch in self.watchdog.watched(batches, "recomputing statistics"))

    def save(self) -> None:
        """Let a checkpoint be written; every process must call it, rank 0 writes."""
        self.learner.running.synchronise(self.learner.world)
        self.saved = time.monotonic()
        snapshot = self._snapshot()
        if self.writer and snapshot:
            self.writer.submit(snapshot, self.best)
            self.best = None

    def _snapshot(self) -> checkpoint.Snapshot | None:
        """Copy all that the run is, in rank 0; running statistics must agree already."""
        if self.record is None:
            return None
        journey, now = self.journey, time.monotonic()
        journey.seconds, journey.epoch_seconds = now - self.started, now - self.epoch_started
        tensors, scalars = checkpoint.pack(self.learner.model, self.learner.optimizer)
        state = {
            "iteration": journey.iteration,
            "journey": asdict(journey),
            "optimizer": scalars,
            "record_bytes": self.record.size(),
            "run_hash": self.config.run_hash(self.learner.placement.precision),
            "images": [self.source.train_images, self.source.val_images],
        }
        return checkpoint.Snapshot(tensors, state)

    def _end(self, status: str, signal: str) -> dict[str, Any]:
        config, journey = self.config, self.journey
        self.learner.running.synchronise(self.learner.world)
        seconds = time.monotonic() - self.started
        summary: dict[str, Any] = {
            "status": status,
            "final_error": final_error(journey.errors) if journey.errors else None,
            "last_error": journey.errors[-1] if journey.errors else None,
            "best_error": min(journey.errors) if journey.errors else None,
            "k": config.k,
            "n": config.n,
            "minibatch": config.minibatch,
            "pitfall": config.pitfall.name,
            "seed": config.seed,
            "reference_rate": config.reference_rate,
            "epochs": len(journey.errors),
            "iterations": journey.iteration,
            "scheduled_iterations": self.scheduled,
            "train_images": self.source.train_images,
            "val_images": self.source.val_images,
            "nonfinite": journey.nonfinite,
            "replaced": journey.replaced,
            "seconds": seconds,
        }
        if status == "interrupted":
            summary["signal"] = signal
        if self.record and self.writer:
            if self.best and status in ("done", "diverged"):
                self.writer.submit(None, self.best)
            self.writer.finish()
            checkpoint.save_weights(self.learner.model, self.directory / "model.safetensors")
            self.record.summary(summary)
        return summary

    def fail(self, error: BaseException) -> None:
        """Leave a word of what went wrong in the record."""
        if self.record:
            ended = ended_by(error)
            self.record.log(f"{ended['status']}: {type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                self.record.summary({**ended, "iterations": self.journey.iteration})

    def _give_up(self, hang: Hang, speaks: bool) -> None:
        """End this process of a run that hangs: the training thread cannot be reached."""
        self.fail(hang)
        if speaks and "TORCHELASTIC_ERROR_FILE" not in os.environ:
            print(f"largebatch: {hang}", file=sys.stderr, flush=True)
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(hang)
        os._exit(FAULT)


def _line(iteration: int, epoch: float, rate: float, sums: Sums) -> dict[str, Any]:
    return {
        "kind": "iteration",
        "iteration": iteration,
        "epoch": epoch,
        "rate": rate,
        "loss": sums.mean_loss,
        "train_error": sums.error,
    }


def _closing_words(summary: dict[str, Any], directory: Path) -> str:
    error = summary["final_error"]
    last = min(summary["epochs"], FINAL_EPOCHS)
    which = "the last epoch" if last == 1 else f"median of the last {last} epochs"
    shown = "" if error is None else f", error {error:.2f} % ({which})"
    return f"{summary['status']}: {summary['iterations']} iterations{shown}; record in {directory}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a type for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
