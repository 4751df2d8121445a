"""The only training loop: one large step from k logical workers, however many processes they share."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from largebatch.base.errors import Fault, UserError
from largebatch.base.files import DISK_TROUBLE
from largebatch.base.numbers import FINAL_EPOCHS, final_error
from largebatch.base.progress import Progress
from largebatch.base.signals import FAULT, Signals
from largebatch.base.user_code import blamed
from largebatch.data.loading import is_lost_loader, lost_loader
from largebatch.data.source import Source
from largebatch.models.build import check_shapes
from largebatch.records.provenance import Run, provenance
from largebatch.records.read import DATA, holds_run
from largebatch.records.write import Record, Skipped, add_probe, ended_by, write_json
from largebatch.runtime.failure import give_up
from largebatch.runtime.lock import owned
from largebatch.runtime.watchdog import Hang, Watchdog
from largebatch.runtime.world import World, leave
from largebatch.training.agreement import check_agreement, check_digest
from largebatch.training.cuda_graph import copied_aside
from largebatch.training.keeper import Keeper
from largebatch.training.learner import Learner, make_learner, open_data, start
from largebatch.training.meter import Meter, Sums, Wishes
from largebatch.training.optimizer import set_rate
from largebatch.training.pitfalls import sample_stream
from largebatch.training.prober import Prober
from largebatch.training.step import make_step
from largebatch.training.validation import Validator

READ_EVERY = 10  # iterations on a GPU


def fit(run: Run) -> dict[str, Any]:
    """Train one run and record it; every process of the run makes this call.

    A run that diverges or is interrupted is a result: it is returned, not raised.

    Args:
        run: Its configuration, its placement and its directory, which rank 0 alone writes.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: the data do not fit, cannot be read, or the device's memory is too small.
    """
    config, placement = run.config, run.placement
    world = start(config, placement)
    assert world.size == placement.processes, f"{placement.processes} processes were placed, {world.size} have joined"
    source = open_data(config, placement, world)
    check_agreement(run, source, world)
    check_digest(config, source.identity)
    config.check_size(source.train_images)
    config.dataset.check_classes(source.classes)
    check_shapes(config.model, source.classes, (config.n, *source.sample.shape), source.sample.dtype)
    with _faults_in_words(run), contextlib.ExitStack() as held:
        _own_directory(run.directory, world, config.resume, held)
        # No name is left that holds it: DDP, in the learner, holds the process group.
        summary = Loop(run, make_learner(config, placement, world, source.classes, source.sample), source).train()
    leave()  # after a fault it is left open: the other processes would fail, and be taken for the cause
    return summary


def _own_directory(directory: Path, world: World, resume: bool, held: contextlib.ExitStack) -> None:
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
def _faults_in_words(run: Run) -> Iterator[None]:
    """Raise in a sentence what the user can do about a lack of memory, a full disk or a lost loader process."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            per_pass, n = run.placement.workers_per_pass, run.config.n
            raise UserError(
                f"{run.placement.device} ran out of memory: a pass holds workers_per_pass={per_pass} × n={n} = "
                f"{per_pass * n} samples. Use a smaller workers_per_pass (the result stays the same), then a smaller n "
                "(it does not)."
            ) from error
        if is_lost_loader(error):
            raise lost_loader(error) from error
        if not isinstance(error, UserError | Fault) and (mine := blamed(error)):
            raise mine from error
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            raise Fault(
                f"a disk failed the run: {error}. Its checkpoints are valid: continue when there is space, with "
                "resume=true."
            ) from error
        raise


class Loop:
    """The loop of one run: steps, and between them lines of the record, validation, probes and checkpoints.

    Args:
        run: The run.
        learner: What it trains.
        source: Its data.
    """

    def __init__(self, run: Run, learner: Learner, source: Source) -> None:
        config = run.config
        self.run, self.config, self.learner, self.source = run, config, learner, source
        source.on_skip = Skipped(run.directory)
        self.stream = sample_stream(config, source.train_images)
        self.rates = config.rates(source.train_images)
        self.total = config.total_iterations(source.train_images)
        self.scheduled = config.epochs * self.stream.iterations_per_epoch
        self.watchdog = Watchdog(learner.world, config.launcher.timeout, self._give_up)
        self.validator = Validator(learner, source, self.watchdog.watched)
        self.prober = None if config.probe.every is None else Prober(learner, source)
        self.record: Record | None = None
        self.sound = True  # whether the network that was validated last is finite, and so are its outputs
        self.started = self.epoch_started = time.monotonic()
        self.keeper = Keeper(run, learner, [source.train_images, source.val_images], source.identity)
        self.journey = self.keeper.restore()
        self.started -= self.journey.seconds
        self.epoch_started -= self.journey.epoch_seconds

    def train(self) -> dict[str, Any]:
        """Train from where the journey stands to the end, and return the summary."""
        config, journey, learner = self.config, self.journey, self.learner
        self._open_record()
        per_epoch = self.stream.iterations_per_epoch
        mine = (learner.first_worker, learner.placement.workers, learner.placement.workers_per_pass)
        # Reading a figure makes a GPU wait, so it is done at fixed iterations. Signals come with it, and cannot wait
        # for these where an iteration takes long: the meter says how often to look.
        read_every = min(config.log_every, READ_EVERY) if learner.placement.device == "cuda" else 1
        meter, wishes, status = Meter(config.k, learner.first_worker, learner.world), Wishes(), ""
        with self._recorded():
            passes = self.stream.passes(journey.iteration, self.total, *mine)
            arriving = copied_aside(self.source.train(passes), learner.world.device)
            batches = self.watchdog.watched(arriving, "training")
            step = make_step(learner)
            progress = Progress(self.total, journey.iteration, self.record.log if self.record else None)
            with Signals() as signals, contextlib.closing(progress):
                if journey.iteration == 0:
                    self._probe(epoch=0)
                    self.epoch_started = time.monotonic()
                while not status and journey.iteration < self.total:
                    rate = self.rates.rate_at(journey.iteration)
                    set_rate(learner.optimizer, rate)
                    meter.add(step(batches, journey.iteration), config.minibatch)
                    journey.iteration += 1
                    self.watchdog.iteration = journey.iteration

                    logs = journey.iteration % config.log_every == 0 or journey.iteration == 1
                    ends_epoch = journey.iteration % per_epoch == 0
                    saves = config.checkpoint.every is not None and journey.iteration % config.checkpoint.every == 0
                    last = journey.iteration == self.total
                    fixed = logs or ends_epoch or saves or last or journey.iteration % read_every == 0
                    if not fixed and journey.iteration % meter.look_every:
                        continue
                    wishes = Wishes(signals.interrupt, signals.end, signals.notice, save=self.keeper.is_due())
                    wishes = meter.read(wishes, journey.epoch, journey.line)
                    line, position = journey.line, journey.iteration / per_epoch
                    progress.update(journey.iteration, position, rate, line.mean_loss, line.error, config.minibatch)
                    if logs:
                        self._log(rate, position)
                    if fixed and journey.epoch.nonfinite:  # a run must not end by the clock
                        status = "diverged"
                        journey.nonfinite += journey.epoch.nonfinite
                    elif wishes.signal:
                        status = "interrupted"
                    if ends_epoch and status != "diverged":
                        progress.say(self._end_epoch(rate))
                        status = status if self.sound else "diverged"
                    if saves or wishes.save or status == "interrupted" or (last and self.total < self.scheduled):
                        self._stop_clocks()
                        self.keeper.save(journey)
                self.watchdog.stop()
                status = status or ("done" if journey.iteration >= self.scheduled else "stopped")
                summary = self._end(status, wishes.signal)
                progress.say(_closing_words(summary, self.run.directory))
        learner.world.barrier()  # until nobody watches any more, nobody may leave
        return summary

    def _open_record(self) -> None:
        """Open the record in rank 0, once all processes agree where the run starts; the others write logs."""
        world, directory = self.learner.world, self.run.directory
        sums = world.sum(torch.tensor([self.journey.iteration], device=world.device))
        if int(sums) != world.size * self.journey.iteration:
            raise UserError(
                f"the processes do not see the same checkpoints in run_dir={directory}: it must be on a file "
                "system that all machines share."
            )
        if world.main:
            unfinished = holds_run(directory)
            device = world.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            origin = provenance(self.run, [name] * world.size)
            origin |= {"decoder": self.source.decoder, "notes": self.rates.notes()}
            origin["data"] = {"digest": self.source.identity.digest, "classes": self.source.classes}
            origin["versions"] |= {"cuda": torch.version.cuda}
            self.record = Record.open(directory, self.config, origin, self.keeper.position)
            write_json(directory / DATA, self.source.identity.to_mapping())
            (directory / "logs").mkdir(exist_ok=True)
            self.keeper.write_to(self.record, unfinished)
            for note in origin["notes"]:
                self.record.say(f"note: {note}")
            kernel, graphs = self.learner.running.kernel, self.config.cuda_graphs
            if kernel != "separate" or graphs:
                self.record.say(f"bn.kernel={kernel}" + ", and steps are recorded as a CUDA graph" * graphs)
            if self.prober and self.config.probe.every == "auto" and self.journey.iteration == 0:
                every = self.prober.every
                often = f"every {every} epochs" if every else "never: one would take more than 5 % of this run"
                self.record.say(f"probe.every=auto: {often}")
        world.barrier()
        if not world.main:
            world.redirect(directory / "logs")

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Watch the run; a fault leaves its reason in the record."""
        try:
            with self.watchdog:
                yield
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.keeper.close()
            if self.record:
                self.record.close()

    def _stop_clocks(self) -> None:
        now = time.monotonic()
        self.journey.seconds, self.journey.epoch_seconds = now - self.started, now - self.epoch_started

    def _log(self, rate: float, position: float) -> None:
        """Write a line of the record, and begin the next one."""
        line, self.journey.line = self.journey.line, Sums()
        if self.record:
            values = {"kind": "iteration", "iteration": self.journey.iteration, "epoch": position, "rate": rate}
            self.record.metric({**values, "loss": line.mean_loss, "train_error": line.error})

    def _end_epoch(self, rate: float) -> str:
        """Validate, record the epoch, and return its line for people."""
        journey, sums = self.journey, self.journey.epoch
        seconds = time.monotonic() - self.epoch_started
        self.learner.running.synchronise(self.learner.world)
        measured = self.validator.validate()
        epoch = journey.iteration // self.stream.iterations_per_epoch
        values: dict[str, Any] = {
            "kind": "epoch",
            "epoch": epoch,
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
            values["val_error_recomputed"] = self.validator.validate_recomputed(self.stream, epoch).error
        without_loss = measured.unreadable == measured.total
        self.sound = (math.isfinite(measured.loss) or without_loss) and self.learner.is_finite()
        best = self.sound and measured.error < min(journey.errors, default=math.inf)
        journey.errors.append(measured.error)
        journey.nonfinite += sums.nonfinite
        journey.replaced += sums.replaced
        journey.epoch = Sums()
        if self.record:
            self.record.metric(values)
        self._probe(epoch)
        self.epoch_started = time.monotonic()
        if best:
            self._stop_clocks()
            self.keeper.keep_best(journey)
        return (
            f"epoch {epoch:3d}/{self.config.epochs}  rate {rate:.4g}  loss {sums.mean_loss:.4f}  "
            f"train error {sums.error:.2f} %  val error {measured.error:.2f} %  "
            f"{values['images_per_second']:,.0f} images/s"
        )

    def _probe(self, epoch: int) -> None:
        """Measure how far k can grow from here, where that is due; the run itself is left as it is."""
        if self.prober is None or self.prober.every is None or epoch % self.prober.every:
            return
        line = self.prober.measure(self.journey.iteration, self.watchdog.watched)
        if self.record:
            add_probe(self.run.directory, line)

    def _end(self, status: str, signal: str) -> dict[str, Any]:
        """Write weights and summary, and return it."""
        config, journey = self.config, self.journey
        self.learner.running.synchronise(self.learner.world)
        if status == "stopped" and not self.learner.is_finite():  # by the last steps, which no validation has seen
            status = "diverged"
        seconds = time.monotonic() - self.started
        summary: dict[str, Any] = {
            "status": status,
            "final_error": final_error(journey.errors) if journey.errors else None,
            "last_error": journey.errors[-1] if journey.errors else None,
            "best_error": min(journey.errors, default=None),
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
        self.keeper.finish(keep_best=status in ("done", "diverged"))
        if self.record:
            self.record.summary(summary)
        return summary

    def _fail(self, error: BaseException) -> None:
        """Leave in the record what went wrong."""
        if self.record:
            ended = ended_by(error)
            self.record.log(f"{ended['status']}: {type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                self.record.summary({**ended, "iterations": self.journey.iteration})

    def _give_up(self, hang: Hang, speaks: bool) -> None:
        """End this process of a run that hangs: the training thread cannot be reached."""
        self._fail(hang)
        give_up(hang, speaks)
        os._exit(FAULT)


def _closing_words(summary: dict[str, Any], directory: Path) -> str:
    error = summary["final_error"]
    last = min(summary["epochs"], FINAL_EPOCHS)
    which = "the last epoch" if last == 1 else f"median of the last {last} epochs"
    shown = "" if error is None else f", error {error:.2f} % ({which})"
    status, count = summary["status"], summary["iterations"]
    runs = shlex.quote(f"runs={directory}")
    following = {"done": f"; largebatch plot curves {runs} shows it", "diverged": ""}.get(
        status, "; resume=true goes on"
    )
    return f"{status}: {count} iteration{'s' * (count != 1)}{shown}; record in {directory}{following}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a type for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
