"""Batches of images on the device: from memory, or through loader processes from files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig, LoaderConfig
from largebatch.data import sets
from largebatch.data.augment import transform_of
from largebatch.data.decode import choose_decoder
from largebatch.data.file_batches import FileBatches
from largebatch.data.files import Split
from largebatch.data.identity import Identity, identity_in_memory
from largebatch.data.layouts import open_splits
from largebatch.data.loading import loaded, tell
from largebatch.data.transforms import Crops, crop_and_flip, draw_crops, normalise
from largebatch.data.user_sets import Batches, Items, OwnSets, open_sets

# Pixels that are cut in one go: a small image's crop takes less time than the calls that make it.
_CUT_BYTES = 2**20

_COMPARED = 4  # images of a split whose pixels are compared between processes


@dataclass(frozen=True)
class Batch:
    """``images`` (batch, C, H, W) normalised, ``labels`` int64 (batch,).

    ``corrupt`` counts images that cannot be read: replaced in training, labelled ``UNREADABLE`` in validation.
    """

    images: Tensor
    labels: Tensor
    corrupt: int = 0


class Source(Protocol):
    """A data set as the training loop sees it. Every batch is a function of (seed, epoch, indices) alone."""

    train_images: int
    val_images: int
    classes: int
    sample: Tensor  # on the meta device: shape and type of an input, (C, H, W) and float32 of images
    decoder: str  # native or pillow for training images, none where nothing is decoded
    on_skip: Callable[[str], None]  # is called with each image that dataset.on_error=skip leaves out, and why
    identity: Identity  # is the same on all processes of a run, and whenever it goes on

    def pixels_digest(self) -> str:
        """Return a digest of a few images as they are decoded here; empty where nothing is decoded."""

    def train(self, passes: Iterable[tuple[int, Tensor]]) -> Iterator[Batch]:
        """Yield the augmented training images of every (epoch, indices)."""

    def validation(self, batches: Sequence[range]) -> Iterator[Batch]:
        """Yield the validation images of every range of indices, without augmentation."""

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield training images of all indices as validation sees its own: without augmentation."""


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device: behind the program's back only from pinned memory to CUDA, whose allocator waits for the copy.

    Elsewhere memory that is freed at once could be read after something else was written to it: on Apple's GPUs,
    training data would be silently wrong.
    """
    return values.to(device, non_blocking=device.type == "cuda" and values.is_pinned())


@dataclass(frozen=True)
class Target:
    """Target of batches: device, float32 or float64, and memory format."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool = False

    def images(self, inputs: Tensor, config: DatasetConfig) -> Tensor:
        """Turn inputs (batch, …) into the network's: uint8 normalised, from [0, 1], other whole numbers as they are."""
        values = upload(inputs, self.device)
        if values.dtype != torch.uint8:
            values = values.to(self.dtype) if values.is_floating_point() else values
        elif values.dim() == 4:
            channels = values.shape[1]
            mean, std = config.mean or (0.0,) * channels, config.std or (1.0,) * channels
            values = normalise(values, tuple(mean), tuple(std), self.dtype)
        else:
            values = values.to(self.dtype).div_(255)
        return (
            values.contiguous(memory_format=torch.channels_last) if self.channels_last and values.dim() == 4 else values
        )


def sample_of(config: DatasetConfig) -> Tensor:
    """Return the shape and type of an image as the network takes it, on the meta device: (C, H, W), float32."""
    return torch.empty(config.channels, config.height, config.width, device="meta")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a data set: its images (or other items), its classes, and an input's shape and type (``sample``)."""

    train_images: int
    val_images: int
    classes: int
    sample: Tensor


def sizes_of(config: DatasetConfig) -> Sizes:
    """Return the sizes of a data set: as configured where all are, else found in the data.

    Raises:
        UserError: they cannot be found.
    """
    if config.source == "python":
        own = open_sets(config)
        return Sizes(len(own.train), len(own.val), own.classes, own.sample)
    if config.trained_images and config.validated_images and config.classes:
        return Sizes(config.trained_images, config.validated_images, config.classes, sample_of(config))
    try:
        opened = open_splits(config)
    except UserError as error:
        raise UserError(
            f"{error} Without the images, give their numbers: dataset.train_images, val_images, classes."
        ) from None
    return Sizes(len(opened.train), len(opened.val), len(opened.train.classes), sample_of(config))


def open_source(config: DatasetConfig, loader: LoaderConfig, seed: int, target: Target, cores: int) -> Source:
    """Open a data set.

    Args:
        config: Which, and how it is augmented.
        loader: Loader processes, for image folders.
        seed: The run's seed; decides every crop and flip.
        target: Where and how batches are wanted.
        cores: Processor cores of this process, one loader process each where no number is given.

    Raises:
        UserError: see :func:`sets.load` and :func:`layouts.open_splits`.
    """
    own = open_sets(config) if config.source == "python" else None
    if (own and own.in_memory()) or (own is None and not config.of_files):
        return MemorySource(config, seed, target, own)
    workers = min(cores, 16) if loader.workers is None else loader.workers
    if own:
        return ItemSource(config, seed, target, workers, loader.prefetch, own)
    return FolderSource(config, seed, target, workers, loader.prefetch)


def _ignore(problem: str) -> None:
    """Leave an image that is skipped unnamed."""


class MemorySource:
    """A small set, kept on the device; crop, flip and normalisation are done there by the batch.

    Args:
        config: Which, and how it is augmented.
        seed: The run's.
        target: Where and how batches are wanted.
        own: Pairs of tensors of the user's own; None: a set of ours.
    """

    decoder = "none"

    def __init__(self, config: DatasetConfig, seed: int, target: Target, own: OwnSets | None = None) -> None:
        train, val = (own and own.in_memory()) or sets.load(config)
        self.identity = own.identity() if own else _identity(train, val)
        device = target.device
        self._train = sets.ImageSet(train.images.to(device), train.labels.to(device))
        self._val = sets.ImageSet(val.images.to(device), val.labels.to(device))
        self.on_skip: Callable[[str], None] = _ignore
        self._config, self._seed, self._target = config, seed, target
        self._drawn: tuple[int, Crops] | None = None
        self.train_images = config.trained_images or len(train.labels)
        self.val_images = config.validated_images or len(val.labels)
        self.classes = own.classes if own else config.classes or int(train.labels.max()) + 1
        self.sample = own.sample if own else sample_of(config)
        self._transform = transform_of(config.transform)
        self._check_labels()
        if own:
            check_images(config, own.sample)

    def pixels_digest(self) -> str:
        """Return nothing: pixels are part of the identity."""
        return ""

    def _check_labels(self) -> None:
        largest = int(torch.cat([self._train.labels, self._val.labels]).max())
        if largest >= self.classes:
            raise UserError(f"dataset.classes={self.classes}, but the labels go up to {largest}.")

    def train(self, passes: Iterable[tuple[int, Tensor]]) -> Iterator[Batch]:
        """Yield augmented batches; see :class:`Source`."""
        pixels = self._train.images[0].numel()
        for epoch, together in _gathered(passes, _CUT_BYTES // pixels):
            indices = torch.cat(together)
            if self._target.device.type == "cuda":  # from ordinary memory, a copy waits for all work before it
                indices = indices.pin_memory()
            indices = upload(indices, self._target.device)
            images, labels = self._pick(self._train, indices)
            if self._config.crop == "pad":
                images = crop_and_flip(images, self._crops(epoch).of(indices), self._config.pad)
            if self._transform:
                pairs = zip(images.cpu(), indices.tolist(), strict=True)
                changed = [self._transform(image, self._seed, epoch, index) for image, index in pairs]
                images = torch.stack(changed).to(self._target.device)
            sizes = [len(part) for part in together]
            for part, its_labels in zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True):
                yield Batch(self._target.images(part, self._config), its_labels)

    def validation(self, batches: Sequence[range]) -> Iterator[Batch]:
        """Yield validation batches; see :class:`Source`."""
        for batch in batches:
            images, labels = self._pick(self._val, torch.arange(batch.start, batch.stop, device=self._target.device))
            yield Batch(self._target.images(images, self._config), labels)

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield training images without augmentation; see :class:`Source`."""
        for indices in batches:
            images, labels = self._pick(self._train, indices.to(self._target.device))
            yield Batch(self._target.images(images, self._config), labels)

    def _crops(self, epoch: int) -> Crops:
        """Draw for a whole epoch at once: for a batch of small images drawing takes longer than cutting."""
        if self._drawn is None or self._drawn[0] != epoch:
            everyone = torch.arange(self.train_images, device=self._target.device)
            drawn = draw_crops(self._seed, epoch, everyone, self._config.pad, self._config.flip)
            self._drawn = (epoch, drawn)
        return self._drawn[1]

    def _pick(self, split: sets.ImageSet, indices: Tensor) -> tuple[Tensor, Tensor]:
        # Synthetic images repeat: a set of any size from a few.
        rows = indices % len(split.labels)
        return split.images[rows], split.labels[rows]


def check_images(config: DatasetConfig, sample: Tensor) -> None:
    """Refuse what only images can have, for other inputs of the user's own.

    Raises:
        UserError: a crop, a flip, a mean or a size that these inputs do not have.
    """
    shape = tuple(sample.shape)
    for name, found in zip(("channels", "height", "width"), shape if len(shape) == 3 else (), strict=False):
        if getattr(config, name) not in (0, found):
            raise UserError(
                f"dataset.{name}={getattr(config, name)}, and the inputs are of shape {shape}: leave it out."
            )
    if config.crop == "pad" and len(shape) != 3:
        raise UserError(f"dataset.crop=pad is for images, (C, H, W), and these inputs are of shape {shape}.")
    for name in ("mean", "std"):
        if len(getattr(config, name)) not in (0, channels_in(shape)):
            raise UserError(
                f"dataset.{name} has {len(getattr(config, name))} values for inputs of shape {shape}: give one for "
                "each channel of images, or none."
            )


def channels_in(shape: tuple[int, ...]) -> int:
    """Return the channels of images, (C, H, W); 0 of other inputs."""
    return shape[0] if len(shape) == 3 else 0


def _identity(train: sets.ImageSet, val: sets.ImageSet) -> Identity:
    first = (train.images.numpy(), train.labels.numpy())
    return identity_in_memory(first, first if val is train else (val.images.numpy(), val.labels.numpy()))


class ItemSource:
    """Items of a data set of the user's own, read one by one by loader processes."""

    decoder = "none"

    def __init__(
        self, config: DatasetConfig, seed: int, target: Target, workers: int, prefetch: int | None, own: OwnSets
    ) -> None:
        check_images(config, own.sample)
        if config.crop != "none" or config.flip:
            raise UserError(
                "dataset.crop and dataset.flip are for pairs of tensors: augment items in get(index, generator) of "
                "your data set, or by dataset.transform."
            )
        self.on_skip: Callable[[str], None] = _ignore
        self._config, self._seed, self._target, self._own = config, seed, target, own
        self._workers, self._prefetch = workers, prefetch
        self.train_images, self.val_images = len(own.train), len(own.val)
        self.classes, self.sample, self.identity = own.classes, own.sample, own.identity()

    def pixels_digest(self) -> str:
        """Return nothing: a few items are part of the identity."""
        return ""

    def train(self, passes: Iterable[tuple[int, Tensor]]) -> Iterator[Batch]:
        """Yield augmented batches; see :class:`Source`."""
        return self._load(self._own.train, ([(epoch, int(i)) for i in ids] for epoch, ids in passes), True)

    def validation(self, batches: Sequence[range]) -> Iterator[Batch]:
        """Yield validation batches; see :class:`Source`."""
        return self._load(self._own.val, ([(0, index) for index in batch] for batch in batches), False)

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield training items without augmentation; see :class:`Source`."""
        return self._load(self._own.train, ([(0, int(index)) for index in batch] for batch in batches), False)

    def _load(self, items: Items, batches: Iterable[list[tuple[int, int]]], train: bool) -> Iterator[Batch]:
        read = Batches(items, self._seed, train, transform_of(self._config.transform))
        size, pinned = 8 * self.sample.numel(), self._target.device.type == "cuda"
        for inputs, labels, _ in loaded(read, batches, size, self._workers, self._prefetch, pinned):
            yield Batch(self._target.images(inputs, self._config), upload(labels, self._target.device))


def _gathered(passes: Iterable[tuple[int, Tensor]], images: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Put consecutive passes of one epoch together, up to a number of images; a larger pass stays alone."""
    epoch, held = 0, list[Tensor]()
    for its_epoch, indices in passes:
        if held and (its_epoch != epoch or sum(map(len, held)) + len(indices) > images):
            yield epoch, held
            held = []
        epoch = its_epoch
        held.append(indices)
    if held:
        yield epoch, held


class FolderSource:
    """JPEGs (or any images) in any layout, decoded by loader processes; pixels stay uint8 until the device."""

    def __init__(self, config: DatasetConfig, seed: int, target: Target, workers: int, prefetch: int | None) -> None:
        if config.channels != 3:
            raise UserError(f"dataset.channels={config.channels}: image folders are read as RGB, 3 channels.")
        largest = max(config.height, config.width)
        if config.resize is not None and config.resize < largest:
            raise UserError(
                f"dataset.resize={config.resize} is smaller than the crop of {config.height}×{config.width}, which "
                f"would get black borders: use {largest} or more, or null for {largest}."
            )
        opened = open_splits(config)
        tell(opened.line)
        self.decoder, line = choose_decoder(config)
        tell(line)
        self.on_skip: Callable[[str], None] = _ignore
        self._files = (opened.train, opened.val)
        self.identity = opened.identity()
        self._config, self._seed, self._target = config, seed, target
        self._workers, self._prefetch = workers, prefetch
        self.train_images, self.val_images = len(opened.train), len(opened.val)
        self.classes = len(opened.train.classes)
        self.sample = sample_of(config)

    def train(self, passes: Iterable[tuple[int, Tensor]]) -> Iterator[Batch]:
        """Yield augmented batches; see :class:`Source`."""
        return self._load(self._files[0], ([(epoch, int(i)) for i in ids] for epoch, ids in passes), True)

    def validation(self, batches: Sequence[range]) -> Iterator[Batch]:
        """Yield validation batches; see :class:`Source`."""
        return self._load(self._files[1], ([(0, index) for index in batch] for batch in batches), False)

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield training images without augmentation, black where one cannot be read; see :class:`Source`."""
        return self._load(self._files[0], ([(0, int(index)) for index in batch] for batch in batches), False)

    def pixels_digest(self) -> str:
        """Decode a few images of both splits, far apart, and return a digest of their pixels."""
        whole = hashlib.sha256()
        for files, train in zip(self._files, (True, False), strict=True):
            rows = sorted({at * (len(files) - 1) // (_COMPARED - 1) for at in range(_COMPARED)})
            images = FileBatches(files, self._config, self._seed, train, self.decoder == "native", False)
            pixels, labels, _ = images.__getitems__([(0, row) for row in rows])
            whole.update(pixels.numpy().tobytes() + labels.numpy().tobytes())
        return whole.hexdigest()

    def _load(self, files: Split, batches: Iterable[list[tuple[int, int]]], train: bool) -> Iterator[Batch]:
        items = FileBatches(
            files, self._config, self._seed, train, self.decoder == "native", self._target.channels_last
        )
        image = 3 * self._config.height * self._config.width
        pinned = self._target.device.type == "cuda"
        for pixels, labels, problems in loaded(items, batches, image, self._workers, self._prefetch, pinned):
            if problems and self._config.on_error == "stop":
                raise UserError(
                    f"{problems[0]}. Mend or remove the file, or use dataset.on_error=skip: such images are counted, "
                    "replaced by the next one in training, and wrong in validation."
                )
            for problem in problems:
                self.on_skip(str(problem))
            images = self._target.images(pixels, self._config)
            yield Batch(images, upload(labels, self._target.device), len(problems))
