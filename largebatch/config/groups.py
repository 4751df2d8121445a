"""Groups of a run's configuration: rate, BatchNorm, model, data set and the others, each checked when it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.files import UserPath
from largebatch.config.schedule import SCALINGS

DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "synthetic", "imagenet", "imagefolder")


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
    their pixels are the same, bit for bit. ``holdout`` training images, chosen by ``holdout_seed`` alone, are never
    trained on, and validated on instead of the validation images. ``layout`` chooses what is read where ``root`` holds
    several: auto, folders, archives (ImageNet's official ones), shards or parquet.
    """

    name: str
    root: UserPath | None
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
    holdout: int | None
    holdout_seed: int
    layout: str = "auto"

    def __post_init__(self) -> None:
        one_of("dataset.name", self.name, DATASETS)
        one_of("dataset.crop", self.crop, ("none", "pad", "resized"))
        one_of("dataset.on_error", self.on_error, ("stop", "skip"))
        one_of("dataset.layout", self.layout, ("auto", "folders", "archives", "shards", "parquet"))
        one_of("dataset.decoder", self.decoder, ("none", "auto", "native", "pillow"))
        for key in ("train_images", "val_images", "classes", "channels", "height", "width", "holdout"):
            at_least(f"dataset.{key}", getattr(self, key), 1)
        at_least("dataset.holdout_seed", self.holdout_seed, 0)
        if self.holdout and self.train_images and self.holdout >= self.train_images:
            raise UserError(
                f"dataset.holdout={self.holdout} leaves nothing of the {self.train_images} training images to train "
                "on: hold out fewer."
            )
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

    @property
    def trained_images(self) -> int | None:
        """Images that are trained on: the training set without what is held out; None where it has to be counted."""
        return None if self.train_images is None else self.train_images - (self.holdout or 0)

    @property
    def validated_images(self) -> int | None:
        """Images that are validated on: those that are held out, where there are some."""
        return self.holdout or self.val_images


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
class SweepConfig:
    """How a sweep treats what its directory holds already: ``force`` runs again what is done."""

    force: bool


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
