"""Groups of a run's configuration: rate, BatchNorm, model, data set and the others, each checked when it is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.files import UserPath
from largebatch.config.schedule import SCALINGS

DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "synthetic", "imagenet", "imagefolder")
# Sets whose name does not say which images they hold: their digest is part of an experiment.
KNOWN_BY_DIGEST = ("imagefolder",)


OPTIMIZERS = ("sgd", "lars", "lamb", "adamw")


@dataclass(frozen=True)
class RateConfig:
    """Learning rate of the small-minibatch baseline, and how it scales.

    Attributes:
        base: η, the learning rate at base_minibatch samples.
        base_minibatch: Samples in a step of the baseline.
        scaling: linear (the paper's rule, for SGD and LARS), sqrt (by default of LAMB, AdamW and an optimizer of your
            own) or none.
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
    """BatchNorm: whose statistics the running averages follow, and by how much a step moves them.

    Attributes:
        running: Statistics that the running averages follow: worker0 (of one worker, the paper's) or mean (over the k
            workers).
        momentum: Momentum of the running averages, in PyTorch's convention: 0.1 is the paper's 0.9.
        kernel: Computation of the k workers' statistics: separate (PyTorch's BatchNorm once per worker), joint (one
            expression, for a compiler to fuse), fused (GPU kernels that also add the shortcut and apply ReLU) or auto,
            the fastest that the device supports.
        recompute: Also validate with statistics that are averaged over training images.
        recompute_batches: Worker batches over which these are averaged.
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

    Attributes:
        name: Name of the network; with model=torchvision or model=timm a name from that library, with model=python
            module:callable or the name of a plug-in.
        source: own, torchvision, timm or python.
        init: paper (He, N(0, 0.01²), γ = 1), own (the library's initialisation) or auto: paper for residual networks,
            otherwise own.
        zero_gamma: Set γ = 0 in the last BatchNorm of every residual block if init is the paper's.
        stem_stride: Stride of the first convolution of this package's small networks.
        kwargs: Further arguments of the constructor, such as {img_size: 64} for timm's; null: none.
    """

    name: str
    source: str
    init: str
    zero_gamma: bool
    stem_stride: int
    kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        one_of("model.source", self.source, ("own", "torchvision", "timm", "python"))
        one_of("model.init", self.init, ("auto", "paper", "own"))
        at_least("model.stem_stride", self.stem_stride, 1)


@dataclass(frozen=True)
class DatasetConfig:
    """A set of labelled images: its size, its shape, and what a training crop is.

    Attributes:
        name: Name of the data set; with dataset=python module:callable or the name of a plug-in, with
            dataset=huggingface its name on the hub.
        root: Directory of the files. Null: $LARGEBATCH_DATA, or the directory of the data set's package.
        train_images: Number of training images, the first of a larger set; null for image folders, which are counted.
        val_images: Number of validation images, as above.
        classes: Number of classes; null for image folders.
        channels: Channels of an image; with dataset=python, 0 for channels, height and width means that they are found.
        height: Height of the network's input in pixels.
        width: Width of the network's input in pixels.
        crop: none, pad (zero padding of pad pixels and a random window, for small images) or resized (random scale and
            aspect ratio).
        pad: Pixels of padding.
        flip: Mirror half of the training images.
        resize: Length of the shorter side before the centre crop of validation, in pixels.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        decoder: Decoder of image files: auto, native (compiled on this machine, twice as fast) or pillow. Their pixels
            are equal, bit for bit.
        on_error: Reaction to a corrupt image: stop the run, or skip it.
        holdout: Number of training images, chosen by holdout_seed alone, that are never trained on and replace the
            validation images. Null: none.
        holdout_seed: Seed of their choice.
        layout: Layout that is read if root has several: auto, folders, archives (ImageNet's official ones), shards or
            parquet.
        digest: Of classes, labels, names and sizes of all images; other images are refused. Null: whatever is there; of
            an image folder it is computed, and is part of the experiment.
        source: own, python or huggingface.
        kwargs: Further arguments of the callable of dataset=python, or of datasets.load_dataset; null: none.
        reproducible: Refuse items of dataset=python that differ from one look to the next.
        transform: module:callable from a PIL image and a torch.Generator to a PIL image, after crop and flip of
            training images; null: none.
        config: Which configuration of a set of dataset=huggingface; null: the only one.
        image_column: Its column of images; null: the only one.
        label_column: Its column of classes; null: the only one.
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
    digest: str | None = None
    source: str = "own"
    kwargs: Mapping[str, Any] | None = None
    reproducible: bool = True
    transform: str | None = None
    config: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        one_of("dataset.source", self.source, ("own", "python", "huggingface"))
        if self.source == "own":
            one_of("dataset.name", self.name, DATASETS)
        one_of("dataset.crop", self.crop, ("none", "pad", "resized"))
        one_of("dataset.on_error", self.on_error, ("stop", "skip"))
        one_of("dataset.layout", self.layout, ("auto", "folders", "archives", "shards", "parquet"))
        one_of("dataset.decoder", self.decoder, ("none", "auto", "native", "pillow"))
        for key in ("train_images", "val_images", "classes", "holdout"):
            at_least(f"dataset.{key}", getattr(self, key), 1)
        for key in ("channels", "height", "width"):
            at_least(f"dataset.{key}", getattr(self, key), 0 if self.source == "python" else 1)
        if self.kwargs and self.source == "own":
            raise UserError(f"dataset.kwargs is for dataset=python and dataset=huggingface, not for {self.name}.")
        at_least("dataset.holdout_seed", self.holdout_seed, 0)
        if self.holdout and self.train_images and self.holdout >= self.train_images:
            raise UserError(
                f"dataset.holdout={self.holdout} leaves nothing of the {self.train_images} training images to train "
                "on: hold out fewer."
            )
        at_least("dataset.pad", self.pad, 0)
        if self.crop == ("pad" if self.of_files else "resized"):
            raise UserError(
                f"dataset.crop={self.crop} is not for dataset={self.name}: image folders take resized or none, sets in "
                "memory pad or none."
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels and self.source != "python":
                raise UserError(
                    f"dataset.{key} has {len(getattr(self, key))} values for {self.channels} channels: "
                    "give one for each channel."
                )
        if any(value <= 0 for value in self.std):
            raise UserError(f"dataset.std={list(self.std)} has a value that is not above 0.")

    def check_classes(self, classes: int) -> None:
        """Raise :class:`UserError` where there is one class alone."""
        if classes < 2:
            raise UserError(
                f"dataset={self.name} has one class, and a network tells two or more apart: give each class a folder, "
                "or leave dataset.classes out."
            )

    @property
    def of_files(self) -> bool:
        """Whether images are read from files, one by one."""
        return self.source == "huggingface" or (self.source == "own" and self.name in ("imagenet", "imagefolder"))

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
    """Warmup: the learning rate at the start of a large minibatch's run.

    Attributes:
        name: none, constant or gradual.
        epochs: Length of the warmup. Null: 5/90 of the run's.
    """

    name: str
    epochs: float | None

    def __post_init__(self) -> None:
        one_of("warmup", self.name, ("none", "constant", "gradual"))
        at_least("warmup.epochs", self.epochs, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule: the decay of the learning rate.

    Attributes:
        name: step (× factor at each of the milestones) or cosine (to 0).
        milestones: Epochs at which the rate is reduced. Null: 1/3, 2/3 and 8/9 of the run (30, 60, 80 of 90).
        factor: Factor of the rate at a milestone.
    """

    name: str
    milestones: tuple[float, ...] | None
    factor: float

    def __post_init__(self) -> None:
        one_of("schedule", self.name, ("step", "cosine"))
        if not 0 < self.factor <= 1:
            raise UserError(f"schedule.factor={self.factor:g} is out of range: it takes a number above 0, up to 1.")


@dataclass(frozen=True)
class LossConfig:
    """The loss of a sample.

    Attributes:
        name: cross_entropy, or with loss=python module:callable from (outputs, labels) to one value for each sample.
        label_smoothing: Of the cross-entropy in training: the share of the target that all classes get alike.
    """

    name: str
    label_smoothing: float

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing={self.label_smoothing:g} is out of range: it takes 0 up to below 1.")
        if self.own and self.label_smoothing:
            raise UserError("loss.label_smoothing is the cross-entropy's: leave it out of a loss of your own.")

    @property
    def own(self) -> bool:
        """Whether it is a callable of the user's."""
        return self.name != "cross_entropy"


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, with its own constants.

    Attributes:
        name: sgd (the paper's), lars, lamb or adamw, or with optimizer=python module:class of a torch.optim.Optimizer.
        momentum: Momentum; for LAMB and AdamW β₁, with β₂ = 0.999.
        nesterov: Use Nesterov's momentum.
        weight_decay: Weight decay, not on γ and β of normalisations.
        trust_coefficient: Trust coefficient of LARS.
        kwargs: Further arguments of AdamW, or of the class of optimizer=python, such as {eps: 1e-6}; null: none.
        clip_norm: Largest norm of the gradient of the whole minibatch, which is scaled down to it; null: any.
    """

    name: str
    momentum: float
    nesterov: bool
    weight_decay: float
    trust_coefficient: float
    kwargs: Mapping[str, Any] | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.own:
            one_of("optimizer", self.name, OPTIMIZERS)
        if self.kwargs and not (self.own or self.name == "adamw"):
            raise UserError(f"optimizer.kwargs is for optimizer=adamw and optimizer=python, not for {self.name}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(
                f"optimizer.clip_norm={self.clip_norm:g} is out of range: it takes a norm above 0, or null."
            )
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum} is out of range: it takes 0 up to below 1.")
        if self.nesterov and self.momentum == 0:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0.")

    @property
    def own(self) -> bool:
        """Whether it is a class of the user's: named as module:class, or not at all."""
        return ":" in self.name or self.name in ("", "null")

    @property
    def adaptive(self) -> bool:
        """Whether it divides a gradient by its own size; of a class of the user's own, that is assumed."""
        return self.own or self.name in ("lamb", "adamw")


@dataclass(frozen=True)
class LoaderConfig:
    """Loader processes for image folders.

    Attributes:
        workers: Processes that decode images. Null: as many as the cores allow.
        prefetch: Batches that each process prepares in advance. Null: 4, or fewer if those of a training process would
            take more than 1 GiB.
    """

    workers: int | None
    prefetch: int | None

    def __post_init__(self) -> None:
        at_least("loader.workers", self.workers, 0)
        at_least("loader.prefetch", self.prefetch, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: their intervals, and the number that is kept.

    Attributes:
        minutes: Minutes between two checkpoints, which are written during training; 0: never.
        every: Iterations between two checkpoints. Null: only minutes counts.
        keep: Number of newest checkpoints that are kept, in addition to the one with the lowest validation error.
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
    """Exchange of gradients between processes.

    Attributes:
        bucket_mb: MiB per message; each bucket is sent when back-propagation has filled it. Smaller ones start earlier,
            larger ones use the network better.
        gradient_as_bucket_view: Store gradients in the buckets, which saves one copy of them.
        static_graph: Assert that every pass uses the same layers.
        compress: none, or bf16 for half the bytes: another experiment, because gradients are rounded to 8 bits of
            precision.
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
    """Probes of the largest useful k: see `largebatch probe --help`.

    Attributes:
        every: Epochs between two probes, with one at the start; auto: as often as at most 5 % of the run's
            back-propagations allow, never if one probe takes more. Null: no probes.
        steps: Small steps of n samples per probe, the largest k that the answer can give. Null: k.
        batches: Minibatches of n samples whose mean loss the sharpness refers to.
        products: Largest number of Hessian-vector products.
        layers: Also report each layer (format=json, probes.jsonl).
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
    """Treatment of the runs that a sweep's directory already holds.

    Attributes:
        force: Run again what is done; the earlier record is moved to replaced/ in the sweep's directory.
    """

    force: bool


@dataclass(frozen=True)
class CertifyConfig:
    """Scope of ``largebatch certify``.

    Attributes:
        iterations: Steps that are compared, 3 or more.
        processes: Numbers of processes; null: every one up to 4 (the GPUs, on GPUs) that divides k.
        tolerance: Largest relative difference; null: the precision's.
        minutes: Time at most: k is reduced, with a notice, where more would be needed.
    """

    iterations: int
    processes: tuple[int, ...] | None
    tolerance: float | None
    minutes: float

    def __post_init__(self) -> None:
        if self.iterations < 3:
            raise UserError(f"certify.iterations={self.iterations} is too few: warmup and a decay take 3 or more.")
        at_least("certify.tolerance", self.tolerance, 0)
        at_least("certify.minutes", self.minutes, 0)
