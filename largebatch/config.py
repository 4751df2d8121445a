"""What a run is: frozen values, checked once, and the quantities that follow from them.

Hydra composes plain values from ``conf/``; :func:`Config.from_mapping` checks them and refuses keys it does
not know. k and n are inputs; the minibatch, the reference rate and the number of iterations are properties,
so that no override can leave one of them stale. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, TypeVar

from largebatch.schedule import SCALINGS, RateSchedule, reference_rate

T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp64")
DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "synthetic", "imagenet", "imagefolder")
DEVICES = ("auto", "cpu", "cuda", "mps")


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one sentence, exit status 2, never a traceback."""


class Fault(RuntimeError):
    """Something beyond the program went wrong, such as a killed process: shown as it is, exit status 1."""


def nearest(word: str, allowed: typing.Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed word, or "" where none is close."""
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(key: str, value: str, allowed: typing.Sequence[str]) -> None:
    """Raise :class:`UserError` unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known: it takes {', '.join(allowed)}.{nearest(value, allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    """Raise :class:`UserError` if ``value`` is given and below ``least``."""
    if value is not None and not value >= least:
        raise UserError(f"{key}={value} is too small: it takes {least:g} or more.")


@dataclass(frozen=True)
class RateConfig:
    """Learning rate of the small-minibatch baseline and how it scales.

    ``base`` is η at ``base_minibatch`` samples; ``scaling`` is linear (the paper's rule), sqrt or none.
    """

    base: float
    base_minibatch: int
    scaling: str

    def __post_init__(self) -> None:
        if not (self.base > 0 and math.isfinite(self.base)):
            raise UserError(f"lr.base={self.base} is not a rate: it takes a number above 0.")
        at_least("lr.base_minibatch", self.base_minibatch, 1)
        one_of("lr.scaling", self.scaling, SCALINGS)


@dataclass(frozen=True)
class BatchNormConfig:
    """Whose statistics the running averages follow, and by how much a step moves them.

    ``running`` is worker0 (what one worker sees, the paper's) or mean (over the k workers). ``momentum`` is in
    PyTorch's convention: 0.1 is the paper's 0.9. ``recompute`` also evaluates with statistics averaged over
    ``recompute_batches`` worker batches of training images. ``kernel`` is how the k workers' statistics are computed:
    separate (PyTorch's BatchNorm once a worker), joint (one expression, for a compiler to fuse), fused (GPU kernels
    that also add the shortcut and take the ReLU) or auto.
    """

    running: str
    momentum: float
    kernel: str
    recompute: bool
    recompute_batches: int

    def __post_init__(self) -> None:
        one_of("bn.running", self.running, ("worker0", "mean"))
        one_of("bn.kernel", self.kernel, ("auto", "separate", "joint", "fused"))
        if not 0 < self.momentum <= 1:
            raise UserError(f"bn.momentum={self.momentum} is out of range: it takes a number above 0, up to 1.")
        at_least("bn.recompute_batches", self.recompute_batches, 1)


@dataclass(frozen=True)
class ModelConfig:
    """A network by name.

    ``source`` is own, torchvision or timm; ``init`` is paper (He, N(0, 0.01²), γ = 1), own (what the library
    does) or auto: paper for residual networks, own elsewhere. ``zero_gamma`` sets γ = 0 in the last BN of every
    residual block under ``init=paper``. ``stem_stride`` is the first convolution's, for our small networks.
    """

    name: str
    source: str
    init: str
    zero_gamma: bool
    stem_stride: int

    def __post_init__(self) -> None:
        one_of("model.source", self.source, ("own", "torchvision", "timm"))
        one_of("model.init", self.init, ("auto", "paper", "own"))
        at_least("model.stem_stride", self.stem_stride, 1)


@dataclass(frozen=True)
class DatasetConfig:
    """A set of labelled images: its size, its shape, and what a training crop is.

    ``train_images`` and ``val_images`` may be null only for image folders, which are counted. ``crop`` is none,
    pad (zero padding of ``pad`` pixels and a random window, for small images) or resized (random scale and
    aspect ratio). ``height`` and ``width`` are the network's input in pixels. ``mean`` and ``std`` are per
    channel, for pixels in [0, 1]. ``decoder`` of files is auto, native (compiled here, twice as fast) or pillow:
    their pixels are the same, bit for bit.
    """

    name: str
    root: str | None
    train_images: int | None
    val_images: int | None
    classes: int | None
    channels: int
    height: int
    width: int
    crop: str
    pad: int
    flip: bool
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoder: str
    on_error: str

    def __post_init__(self) -> None:
        one_of("dataset.name", self.name, DATASETS)
        one_of("dataset.crop", self.crop, ("none", "pad", "resized"))
        one_of("dataset.on_error", self.on_error, ("stop", "skip"))
        one_of("dataset.decoder", self.decoder, ("none", "auto", "native", "pillow"))
        for key in ("train_images", "val_images", "classes", "channels", "height", "width"):
            at_least(f"dataset.{key}", getattr(self, key), 1)
        at_least("dataset.pad", self.pad, 0)
        folders = self.name in ("imagenet", "imagefolder")
        if self.crop == ("pad" if folders else "resized"):
            raise UserError(
                f"dataset.crop={self.crop} is not for dataset={self.name}: image folders take resized or none, sets in "
                "memory pad or none."
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise UserError(
                    f"dataset.{key} has {len(getattr(self, key))} values for {self.channels} channels: "
                    "give one for each channel."
                )
        if any(value <= 0 for value in self.std):
            raise UserError(f"dataset.std={list(self.std)} has a value that is not above 0.")


@dataclass(frozen=True)
class WarmupConfig:
    """How a large minibatch starts: none, constant or gradual, over ``epochs`` (null: 5/90 of the run's)."""

    name: str
    epochs: float | None

    def __post_init__(self) -> None:
        one_of("warmup", self.name, ("none", "constant", "gradual"))
        at_least("warmup.epochs", self.epochs, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the rate falls: step (× ``factor`` at each of ``milestones``, in epochs) or cosine (to 0)."""

    name: str
    milestones: tuple[float, ...] | None
    factor: float

    def __post_init__(self) -> None:
        one_of("schedule", self.name, ("step", "cosine"))
        if not 0 < self.factor <= 1:
            raise UserError(f"schedule.factor={self.factor:g} is out of range: it takes a number above 0, up to 1.")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule: sgd (the paper's), lars or lamb, with its own constants."""

    name: str
    momentum: float
    nesterov: bool
    weight_decay: float
    trust_coefficient: float

    def __post_init__(self) -> None:
        one_of("optimizer", self.name, ("sgd", "lars", "lamb"))
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum} is out of range: it takes 0 up to below 1.")
        if self.nesterov and self.momentum == 0:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0.")


@dataclass(frozen=True)
class LoaderConfig:
    """Loader processes for image folders (null: what the cores allow) and batches each keeps ready."""

    workers: int | None
    prefetch: int

    def __post_init__(self) -> None:
        at_least("loader.workers", self.workers, 0)
        at_least("loader.prefetch", self.prefetch, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written: every so many minutes, and every so many iterations where given.

    The newest ``keep`` stay, and beside them the one with the lowest validation error.
    """

    minutes: float
    every: int | None
    keep: int

    def __post_init__(self) -> None:
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.minutes", self.minutes, 0)
        at_least("checkpoint.every", self.every, 1)


@dataclass(frozen=True)
class ExchangeConfig:
    """How the gradients of several processes are averaged.

    They travel in buckets of ``bucket_mb`` MiB, each as soon as back-propagation has filled it: smaller ones start
    earlier, larger ones use the network better. ``gradient_as_bucket_view`` keeps gradients in the buckets and saves
    their memory once. ``static_graph`` promises that every pass uses the same layers. ``compress`` is none, or bf16
    for half the bytes, with gradients rounded to 8 bits of precision on the way.
    """

    bucket_mb: float
    gradient_as_bucket_view: bool
    static_graph: bool
    compress: str

    def __post_init__(self) -> None:
        if not self.bucket_mb > 0:
            raise UserError(f"exchange.bucket_mb={self.bucket_mb:g} is out of range: it takes MiB above 0.")
        one_of("exchange.compress", self.compress, ("none", "bf16"))

    @property
    def bucket_bytes(self) -> int:
        """Size of a bucket."""
        return round(self.bucket_mb * 2**20)


@dataclass(frozen=True)
class ProbeConfig:
    """What is measured of how far k can grow: at a run's start and every ``every`` epochs; null: nothing.

    ``every`` auto: as often as takes 5 % of the run's back-propagations at most; never, where one probe takes more.
    ``steps`` small steps of n samples are followed (null: k of them). The sharpness is that of the mean loss over
    ``batches`` minibatches of n, by ``products`` Hessian-vector products at most. ``layers`` keeps figures by layer.
    """

    every: int | str | None
    steps: int | None
    batches: int
    products: int
    layers: bool

    def __post_init__(self) -> None:
        if isinstance(self.every, str):
            if self.every != "auto":
                raise UserError(f"probe.every={self.every} is not known: it takes a number of epochs, auto or null.")
        else:
            at_least("probe.every", self.every, 1)
        for key in ("batches", "products"):
            at_least(f"probe.{key}", getattr(self, key), 1)
        if self.steps is not None and self.steps < 2:
            raise UserError(
                f"probe.steps={self.steps} is too few: drift is between two small steps, and the noise scale between "
                "the gradients of two workers. It takes 2 or more."
            )


@dataclass(frozen=True)
class LauncherConfig:
    """Who starts the processes of a run, or of a sweep's runs.

    A run whose process died, or that a cluster took off its nodes, goes on from its last checkpoint up to
    ``max_restarts`` times. A run in which no batch goes on anywhere for ``timeout`` seconds is ended as hung; null
    waits for ever.
    """

    name: str
    max_restarts: int
    timeout: float | None

    def __post_init__(self) -> None:
        at_least("launcher.max_restarts", self.max_restarts, 0)
        at_least("launcher.timeout", self.timeout, 1)


@dataclass(frozen=True)
class LocalConfig(LauncherConfig):
    """On this machine, or by whatever set RANK and WORLD_SIZE. ``jobs`` arms of a sweep run at once."""

    jobs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("launcher.jobs", self.jobs, 1)


@dataclass(frozen=True)
class SlurmConfig(LauncherConfig):
    """A SLURM cluster: what each task of a sweep asks it for. Null leaves a request to the cluster.

    A task has one process a GPU: ``gpus`` of them in all, or where that is null the largest divisor of k up to
    ``gpus_per_node``; 0 asks for no GPU, and ``processes`` counts. They are spread over ``nodes``, null for as few as
    hold them. ``cpus_per_gpu`` are the cores of a process (there is one without a GPU too), ``mem`` the memory of a
    node (64G) and ``time`` that of a task (04:00:00). ``max_concurrent`` tasks of a shape run at once.
    ``signal_seconds`` before its time is up, a task writes a checkpoint and queues again. ``setup`` are lines of
    shell that come before the processes (module load cuda), ``options`` further ones of sbatch (--exclusive).
    ``dry_run`` prints the batch scripts, and submits nothing.
    """

    gpus: int | None
    gpus_per_node: int
    nodes: int | None
    cpus_per_gpu: int | None
    mem: str | None
    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    max_concurrent: int | None
    signal_seconds: int
    setup: tuple[str, ...]
    options: tuple[str, ...]
    dry_run: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("gpus_per_node", "nodes", "cpus_per_gpu", "max_concurrent", "signal_seconds"):
            at_least(f"launcher.{key}", getattr(self, key), 1)
        at_least("launcher.gpus", self.gpus, 0)
        for option in self.options:
            if not option.startswith("-"):
                raise UserError(
                    f"launcher.options: '{option}' is no option of sbatch: give such as --exclusive or "
                    "--constraint=a100, one an element."
                )


LAUNCHERS: dict[str, type[LauncherConfig]] = {"local": LocalConfig, "slurm": SlurmConfig}


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep treats what its directory holds already: ``force`` runs again what is done."""

    force: bool


PITFALLS = {
    "none": "the paper's recipe, without a mistake",
    "scale_loss": "the cross-entropy is scaled up instead of the rate, so weight decay is not (remark 1)",
    "absorb_rate": "momentum absorbs the rate, v ← m v + η g, without correction when η changes (remark 2)",
    "absorb_rate_corrected": "momentum absorbs the rate, with correction: the recipe up to rounding (remark 2)",
    "normalize_by_n": "gradients are normalised by n a worker and then summed, not by kn (remark 3)",
    "independent_shuffle": "each worker shuffles for itself: some samples come twice, some never (remark 4)",
    "sync_bn": "BatchNorm takes its statistics over all kn samples",
    "decay_bn": "weight decay on γ and β of BatchNorm",
    "gamma_one": "γ = 1 in the last BN of every residual block",
    "per_epoch_warmup": "the warmup's rate rises once an epoch, not every iteration",
    "warmup_from_zero": "the warmup starts at a rate of 0, not at η",
    "padded_eval": "validation repeats samples until k divides their number, and counts them",
}


@dataclass(frozen=True)
class PitfallConfig:
    """One well-known mistake made on purpose, or none; see ``PITFALLS`` for what each does."""

    name: str

    def __post_init__(self) -> None:
        one_of("pitfall", self.name, tuple(PITFALLS))


@dataclass(frozen=True)
class Config:
    """One run. k logical workers of n samples each; everything else is the paper's recipe unless overridden.

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
    run_dir: str | None
    resume: bool
    log_every: int
    lr: RateConfig
    bn: BatchNormConfig
    model: ModelConfig
    dataset: DatasetConfig
    warmup: WarmupConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
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
        one_of("precision", self.precision, ("auto", *PRECISIONS))
        one_of("device", self.device, DEVICES)
        if self.processes is not None and self.k % self.processes:
            raise UserError(
                f"processes={self.processes} does not divide k={self.k}: every process owns the same number of "
                f"workers. These do: {', '.join(map(str, divisors(self.k)))}."
            )
        if self.dataset.train_images is not None:
            self.check_size(self.dataset.train_images)
        self._check_epochs()
        self._check_exact()
        self._check_graphs()
        self._check_pitfall()
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
                    f"schedule.milestones={shown} do not lie within the run: they must be above 0 and below "
                    f"epochs={self.epochs}. Null places them at 1/3, 2/3 and 8/9 of the epochs."
                )
        if self.warmup.epochs is not None and self.warmup.epochs > self.epochs:
            raise UserError(
                f"warmup.epochs={self.warmup.epochs:g} is longer than the run's epochs={self.epochs}: "
                "null makes it 5/90 of them."
            )

    def _check_pitfall(self) -> None:
        if self.pitfall.name.startswith("absorb_rate") and self.optimizer.name != "sgd":
            raise UserError(f"pitfall={self.pitfall.name} is a form of SGD's momentum: it needs optimizer=sgd.")

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
        if self.cuda_graphs and (self.optimizer.name != "sgd" or self.pitfall.name.startswith("absorb_rate")):
            given = (
                f"optimizer={self.optimizer.name}" if self.optimizer.name != "sgd" else f"pitfall={self.pitfall.name}"
            )
            raise UserError(
                f"cuda_graphs=true repeats a step with a rate that lies on the GPU, which {given} cannot read there: "
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
        form = {"per_epoch_warmup": "staircase", "warmup_from_zero": "from_zero"}.get(self.pitfall.name)
        return RateSchedule(
            base=self.lr.base / self.loss_scale,
            reference=self.reference_rate / self.loss_scale,
            warmup=form if form and self.warmup.name == "gradual" else self.warmup.name,
            iterations_per_epoch=per_epoch,
            warmup_iterations=round(self.warmup_epochs * per_epoch),
            decay=self.schedule.name,
            milestone_iterations=tuple(round(epoch * per_epoch) for epoch in self.milestones),
            factor=self.schedule.factor,
            total_iterations=self.epochs * per_epoch,
        )

    @property
    def loss_scale(self) -> float:
        """Factor of the cross-entropy: 1, but η̂/η under pitfall=scale_loss, where the rates are divided by it."""
        return self.reference_rate / self.lr.base if self.pitfall.name == "scale_loss" else 1.0

    def total_iterations(self, train_images: int) -> int:
        """Iterations that the run makes: the schedule's, or fewer where ``iterations`` ends it early."""
        scheduled = self.epochs * self.iterations_per_epoch(train_images)
        return scheduled if self.iterations is None else min(scheduled, self.iterations)

    def experiment(self, precision: str) -> dict[str, Any]:
        """Return what defines the experiment, and nothing else: neither seed nor place, path nor logging.

        ``precision`` is the resolved one: fp32, tf32, bf16 or fp64. Two runs of the same experiment differ by
        their seed alone, whatever hardware they ran on.
        """
        values = dataclasses.asdict(self)
        kept = {key: values[key] for key in ("k", "n", "epochs", "lr", "model", "optimizer")}
        kept["precision"] = precision
        kept["pitfall"] = self.pitfall.name
        kept["bn"] = {key: values["bn"][key] for key in ("running", "momentum")}
        if self.exchange.compress != "none":
            kept["exchange"] = {"compress": self.exchange.compress}
        kept["dataset"] = {key: value for key, value in values["dataset"].items() if key not in ("root", "on_error")}
        if self.dataset.decoder != "none":
            kept["dataset"]["decoder"] = "pillow"  # whoever decodes: these are the pixels
        kept["warmup"] = {"name": self.warmup.name, "epochs": self.warmup_epochs}
        kept["schedule"] = {
            "name": self.schedule.name,
            "milestones": self.milestones,
            "factor": self.schedule.factor,
        }
        return kept

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


@dataclass(frozen=True)
class CertifyConfig:
    """How an experiment is certified: see ``conf/certify.yaml``."""

    iterations: int
    processes: tuple[int, ...] | None
    tolerance: float | None
    minutes: float

    def __post_init__(self) -> None:
        if self.iterations < 3:
            raise UserError(f"certify.iterations={self.iterations} is too few: warmup and a decay take 3 or more.")
        at_least("certify.tolerance", self.tolerance, 0)
        at_least("certify.minutes", self.minutes, 0)


def listed(numbers: typing.Iterable[int]) -> str:
    """Return numbers as people write them in a sentence."""
    return ", ".join(map(str, numbers))


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, rising."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Make the dataclass ``cls`` from ``values``.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing one, or a value of another type.
    """
    fields = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"'{prefix}{key}' is not a key of this configuration.{nearest(str(key), fields)}")
    missing = [key for key in fields if key not in values]
    if missing:
        raise UserError(f"'{prefix}{missing[0]}' is missing from the configuration.")
    return cls(**{key: _convert(kind, values[key], prefix + key) for key, kind in fields.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            keys = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(kind))
            raise UserError(f"{key}={_shown(value)} is not known: '{key}' is a group of keys: {keys}.")
        if kind is LauncherConfig:  # its name says which
            one_of(key, str(value.get("name")), tuple(LAUNCHERS))
            kind = LAUNCHERS[str(value["name"])]
        return build(typing.cast(type[Any], kind), value, f"{key}.")
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            element = typing.get_args(option)[0]
            return tuple(_convert(element, item, key) for item in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{key}={value} is not a finite number.")
            return float(value)
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if option is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # a name such as run_dir=2024 is read as a number by the override grammar
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise UserError(f"{key}={_shown(value)} is of the wrong kind: it takes {_kind_name(options)}.")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _kind_name(options: tuple[Any, ...]) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a word",
        bool: "true or false",
        type(None): "null",
    }
    return " or ".join(names.get(option, "a list of numbers") for option in options)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def digest(values: Mapping[str, Any]) -> str:
    """Return the hash of plain values: of what JSON keeps of them."""
    text = json.dumps(_plain(dict(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
