"""The configuration of one run: frozen values, checked once, and the quantities that follow from them.

Hydra composes plain values from ``conf/``; :func:`Config.from_mapping` checks them and refuses keys it does
not know. k and n are inputs; the minibatch, the reference rate and the number of iterations are properties,
so that no override can leave one of them stale. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.files import UserPath
from largebatch.base.numbers import divisors
from largebatch.config.build import _plain, build, digest
from largebatch.config.groups import (
    KNOWN_BY_DIGEST,
    BatchNormConfig,
    CheckpointConfig,
    DatasetConfig,
    ExchangeConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    RateConfig,
    ScheduleConfig,
    SweepConfig,
    WarmupConfig,
)
from largebatch.config.keys import without_added
from largebatch.config.launchers import LauncherConfig
from largebatch.config.pitfalls import PitfallConfig
from largebatch.config.schedule import RATE_GROUPS, RateSchedule, reference_rate

PRECISIONS = ("fp32", "bf16", "fp64")
LARGEST_RATE = 3.4028e38  # of float32: a larger rate cannot multiply a gradient
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Config:
    """One run. k logical workers of n samples each; everything else is the paper's recipe unless overridden.

    Attributes:
        k: Number of workers: a minibatch has k × n samples, and the learning rate is scaled with it.
        n: Samples per worker in a step.
        seed: Seed of the initial weights, the order of samples and the augmentation.
        epochs: Length of the run; schedule and warmup are scaled with it.
        iterations: Stop the run after this many iterations; the schedule remains that of all epochs. Null: don't stop
            early.
        processes: Processes that share the workers; must divide k. Null: as many GPUs as divide k; 1 on the CPU.
        workers_per_pass: Workers computed in one forward pass: more is faster on a GPU and takes more memory. Null: 1
            on the CPU; on a GPU up to 8, with up to 512 samples in all.
        threads: CPU threads of a process. Null: cores divided by processes.
        precision: fp32, bf16, fp64 or auto: bf16 on a GPU that supports it, otherwise fp32.
        tf32: Let a GPU compute fp32 products in TF32.
        device: cpu, cuda, mps, or auto: the first of cuda, mps, cpu.
        compile: Compile the forward and backward pass.
        cuda_graphs: On one GPU, record a step once and replay it without its kernel launches: for small networks.
        channels_last: Memory format channels_last. Null: on a GPU only.
        deterministic: Use deterministic kernels. Null: the value of exact.
        exact: Compute the same bits on any power of two of processes; workers_per_pass is 1.
        run_dir: Directory of the run's record. Null: runs/<dataset>-<model>/<k, n, warmup, seed, hash>.
        resume: Continue the run in run_dir, or report that it is complete.
        log_every: Iterations per line of the record.

    Raises:
        UserError: a value that is not allowed, with what was given, what is allowed and what to do.
    """

    k: int
    n: int
    seed: int
    epochs: int
    iterations: int | None
    processes: int | None
    workers_per_pass: int | None
    threads: int | None
    precision: str
    tf32: bool
    device: str
    compile: bool
    cuda_graphs: bool
    channels_last: bool | None
    deterministic: bool | None
    exact: bool
    run_dir: UserPath | None
    resume: bool
    log_every: int
    lr: RateConfig
    bn: BatchNormConfig
    model: ModelConfig
    dataset: DatasetConfig
    warmup: WarmupConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    loader: LoaderConfig
    exchange: ExchangeConfig
    checkpoint: CheckpointConfig
    probe: ProbeConfig
    launcher: LauncherConfig
    sweep: SweepConfig
    pitfall: PitfallConfig

    def __post_init__(self) -> None:
        for key in (
            "k",
            "n",
            "epochs",
            "iterations",
            "processes",
            "workers_per_pass",
            "threads",
            "log_every",
        ):
            at_least(key, getattr(self, key), 1)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise UserError(f"seed={self.seed} is too large: it takes up to 2^64 − 1 = {2**64 - 1}.")
        one_of("precision", self.precision, ("auto", *PRECISIONS))
        one_of("device", self.device, DEVICES)
        if self.processes is not None and self.k % self.processes:
            raise UserError(
                f"processes={self.processes} does not divide k={self.k}: every process owns the same number of "
                f"workers. These do: {', '.join(map(str, divisors(self.k)))}."
            )
        if self.dataset.trained_images is not None:
            self.check_size(self.dataset.trained_images)
        if self.reference_rate / self.loss_scale > LARGEST_RATE:
            raise UserError(
                f"lr.base={self.lr.base:g} makes the reference rate {self.reference_rate:g} at kn = {self.minibatch}, "
                f"and float32 holds numbers up to {LARGEST_RATE:.2g}: take a smaller one."
            )
        self._check_epochs()
        self._check_exact()
        self._check_graphs()
        if self.pitfall.absorbs_rate and self.optimizer.name != "sgd":
            raise UserError(f"pitfall={self.pitfall.name} is a form of SGD's momentum: it needs optimizer=sgd.")
        if self.probe.every is not None:
            self.check_probe()

    def _check_epochs(self) -> None:
        given = self.schedule.milestones
        if given is not None and self.schedule.name == "step":
            shown = "[" + ", ".join(f"{epoch:g}" for epoch in given) + "]"
            if any(later <= earlier for earlier, later in pairwise(given)):
                raise UserError(
                    f"schedule.milestones={shown} are out of order: give epochs that rise, such as [30, 60, 80]."
                )
            if given and not (given[0] > 0 and given[-1] < self.epochs):
                raise UserError(
                    f"schedule.milestones={shown} are not within the run: they must be above 0 and below "
                    f"epochs={self.epochs}. Null places them at 1/3, 2/3 and 8/9 of the epochs."
                )
        if self.warmup.epochs is not None and self.warmup.epochs > self.epochs:
            raise UserError(
                f"warmup.epochs={self.warmup.epochs:g} is longer than the run's epochs={self.epochs}: "
                "null makes it 5/90 of them."
            )

    def check_probe(self) -> None:
        """Raise :class:`UserError` where small steps cannot be compared with a large one."""
        if self.k == 1 and self.probe.steps is None:
            raise UserError(
                "k=1 leaves nothing to compare: its large step is the small one, and the noise scale takes the "
                "gradients of two workers. Say how many small steps to follow, such as probe.steps=32, or take "
                "a larger k."
            )
        if self.optimizer.name != "sgd":
            raise UserError(
                f"optimizer={self.optimizer.name} cannot be probed: the small steps and the bound of stability are "
                "those of SGD. Use optimizer=sgd, or probe.every=null."
            )
        if self.pitfall.name != "none":
            raise UserError(
                f"pitfall={self.pitfall.name} cannot be probed: the small steps are those of the paper's recipe. Use "
                "pitfall=none, or probe.every=null."
            )

    def _check_exact(self) -> None:
        if not self.exact:
            return
        if self.workers_per_pass not in (None, 1):
            raise UserError(
                f"exact=true adds up worker by worker, so it cannot go with workers_per_pass={self.workers_per_pass}: "
                "leave workers_per_pass out."
            )
        if self.deterministic is False:
            raise UserError("exact=true needs deterministic kernels, so it cannot go with deterministic=false.")
        if self.cuda_graphs or self.bn.kernel not in ("auto", "separate"):
            given = "cuda_graphs=true" if self.cuda_graphs else f"bn.kernel={self.bn.kernel}"
            raise UserError(f"exact=true computes with PyTorch's own kernels, one by one: leave {given} out.")
        if self.exchange.compress != "none":
            raise UserError(
                f"exact=true keeps every bit of a gradient: leave exchange.compress={self.exchange.compress} out."
            )
        for key, value in (("k", self.k), ("processes", self.processes or 1)):
            if value & (value - 1):
                raise UserError(
                    f"exact=true adds gradients in one binary tree, so {key}={value} must be a power of two."
                )

    def _check_graphs(self) -> None:
        if self.cuda_graphs and self.precision == "fp64":
            raise UserError("cuda_graphs=true keeps the rate in float32: it cannot go with precision=fp64.")
        if self.cuda_graphs and (self.optimizer.name != "sgd" or self.pitfall.absorbs_rate):
            given = (
                f"optimizer={self.optimizer.name}" if self.optimizer.name != "sgd" else f"pitfall={self.pitfall.name}"
            )
            raise UserError(
                f"cuda_graphs=true repeats a step with a rate in GPU memory, which {given} cannot read there: "
                "use optimizer=sgd, or cuda_graphs=false."
            )

    def check_size(self, train_images: int) -> None:
        """Raise :class:`UserError` if one minibatch is larger than the training set."""
        if self.n > train_images:
            raise UserError(
                f"n={self.n} is larger than the training set of dataset={self.dataset.name} ({train_images} images): "
                "take a smaller n."
            )
        if self.minibatch > train_images:
            raise UserError(
                f"kn = {self.k} × {self.n} = {self.minibatch} is larger than the training set of "
                f"dataset={self.dataset.name} ({train_images} images): take k ≤ {train_images // self.n} "
                f"at n={self.n}, or a smaller n."
            )

    @property
    def user_code(self) -> dict[str, str]:
        """The user's own callables, ``module:callable`` by key."""
        found = {"model.name": self.model.name} if self.model.source == "python" else {}
        found |= {"dataset.name": self.dataset.name} if self.dataset.source == "python" else {}
        found |= {"loss.name": self.loss.name} if self.loss.own else {}
        found |= {"optimizer.name": self.optimizer.name} if self.optimizer.own else {}
        return found | ({"dataset.transform": self.dataset.transform} if self.dataset.transform else {})

    @property
    def minibatch(self) -> int:
        """Samples in one step, kn."""
        return self.k * self.n

    @property
    def reference_rate(self) -> float:
        """η̂, the rate after warmup and before the first decay (linear scaling rule: η · kn / base)."""
        return reference_rate(self.lr.base, self.minibatch, self.lr.base_minibatch, self.lr.scaling)

    @property
    def milestones(self) -> tuple[float, ...]:
        """Epochs at which the rate falls; the paper's 30, 60, 80 of 90 in proportion where none are given."""
        if self.schedule.name != "step":
            return ()
        if self.schedule.milestones is not None:
            return self.schedule.milestones
        return (self.epochs / 3, self.epochs * 2 / 3, self.epochs * 8 / 9)

    @property
    def warmup_epochs(self) -> float:
        """Length of the warmup in epochs: 5 of 90 in proportion where none is given, 0 where there is none."""
        if self.warmup.name == "none":
            return 0.0
        return self.epochs * 5 / 90 if self.warmup.epochs is None else self.warmup.epochs

    def iterations_per_epoch(self, train_images: int) -> int:
        """Whole minibatches in the training set; the rest of an epoch's permutation is dropped."""
        return train_images // self.minibatch

    def rates(self, train_images: int) -> RateSchedule:
        """Return the schedule that gives the rate of every iteration."""
        per_epoch = self.iterations_per_epoch(train_images)
        return RateSchedule(
            base=self.lr.base / self.loss_scale,
            reference=self.reference_rate / self.loss_scale,
            warmup=self.pitfall.warmup(self.warmup.name),
            iterations_per_epoch=per_epoch,
            warmup_iterations=round(self.warmup_epochs * per_epoch),
            decay=self.schedule.name,
            milestone_iterations=tuple(round(epoch * per_epoch) for epoch in self.milestones),
            factor=self.schedule.factor,
            total_iterations=self.epochs * per_epoch,
        )

    @property
    def loss_scale(self) -> float:
        """Factor of the cross-entropy, by which the rates are divided: 1 in the paper's recipe."""
        return self.pitfall.loss_scale(self.lr.base, self.reference_rate)

    def same_rates_key(self, precision: str) -> str:
        """Return a key that is equal for configurations of one run: all that is hashed, with the rates for their names.

        A warmup that takes no iteration, for example, gives the run that no warmup gives. Where the size of the data
        set is not known, or a pitfall gives the rates another meaning, it is the run's hash.
        """
        images = self.dataset.train_images
        if images is None or self.pitfall.name != "none":
            return self.run_hash(precision)
        kept = {key: value for key, value in self.experiment(precision).items() if key not in RATE_GROUPS}
        return digest({**kept, "seed": self.seed, "rates": self.rates(images).changes()})

    def total_iterations(self, train_images: int) -> int:
        """Iterations that the run makes: the schedule's, or fewer where ``iterations`` ends it early."""
        scheduled = self.epochs * self.iterations_per_epoch(train_images)
        return scheduled if self.iterations is None else min(scheduled, self.iterations)

    def experiment(self, precision: str) -> dict[str, Any]:
        """Return what defines the experiment, and nothing else: neither seed nor place, path nor logging.

        ``precision`` is the resolved one: fp32, tf32, bf16 or fp64. Two runs of the same experiment differ by
        their seed alone, whatever hardware they ran on. A key that was added later is part of it only where it
        differs from the value in :data:`largebatch.config.keys.ADDED`.
        """
        values = dataclasses.asdict(self)
        kept = {key: values[key] for key in ("k", "n", "epochs", "lr", "model", "optimizer", "loss")}
        kept["precision"] = precision
        kept["pitfall"] = self.pitfall.name
        kept["bn"] = {key: values["bn"][key] for key in ("running", "momentum")}
        kept["exchange"] = {"compress": values["exchange"]["compress"]}
        place = ("root", "layout", "on_error", *(("digest",) if self.dataset.name not in KNOWN_BY_DIGEST else ()))
        kept["dataset"] = {key: value for key, value in values["dataset"].items() if key not in place}
        if self.dataset.decoder != "none":
            kept["dataset"]["decoder"] = "pillow"  # whoever decodes: these are the pixels
        kept["warmup"] = {"name": self.warmup.name, "epochs": self.warmup_epochs}
        kept["schedule"] = {
            "name": self.schedule.name,
            "milestones": self.milestones,
            "factor": self.schedule.factor,
        }
        return without_added(kept)

    def experiment_hash(self, precision: str) -> str:
        """Hash of :meth:`experiment`: equal for runs that belong in one mean ± std."""
        return digest(self.experiment(precision))

    def run_hash(self, precision: str) -> str:
        """Hash of the experiment and the seed: one run."""
        return digest({**self.experiment(precision), "seed": self.seed})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Build from composed plain values; refuse unknown and missing keys and values of another type."""
        return build(cls, values)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, as :meth:`from_mapping` takes them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))
