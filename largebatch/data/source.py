"""Batches of images on the device: from memory, or through loader processes from files."""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from largebatch.base.errors import Fault, UserError
from largebatch.base.signals import ENDING, FAULT
from largebatch.config.groups import DatasetConfig, LoaderConfig
from largebatch.data import native, sets
from largebatch.data.decode import DAMAGE, check_resized, choose_decoder, decode
from largebatch.data.files import Split
from largebatch.data.identity import Identity, identity_in_memory
from largebatch.data.layouts import open_splits
from largebatch.data.transforms import Crops, crop_and_flip, draw_crops, draw_resized_crop, normalise

_Problem = str | UserError | None  # a corrupt image, or what ends the run, as UserError cannot leave a loader process
_Loaded = tuple[Tensor, Tensor, list[str | UserError]]  # pixels, labels and what was wrong, of a batch

# Pixels that are cut in one go: a small image's crop takes less time than the calls that make it.
_CUT_BYTES = 2**20

PREFETCH = 4  # batches a loader process keeps ready by default,
AHEAD = 2**30  # and bytes of all of them in a training process: eight of these on a node take 8 GiB of its memory
_COMPARED = 4  # images of a split whose pixels are compared between processes
UNREADABLE = -100  # the label of a validation image that cannot be read: cross-entropy leaves it out


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

    def images(self, pixels: Tensor, config: DatasetConfig) -> Tensor:
        """Turn uint8 pixels (batch, C, H, W) into the network's input."""
        images = normalise(upload(pixels, self.device), tuple(config.mean), tuple(config.std), self.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def sample_of(config: DatasetConfig) -> Tensor:
    """Return the shape and type of an image as the network takes it, on the meta device: (C, H, W), float32."""
    return torch.empty(config.channels, config.height, config.width, device="meta")


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
    if sets.in_memory(config):
        return MemorySource(config, seed, target)
    workers = min(cores, 16) if loader.workers is None else loader.workers
    return FolderSource(config, seed, target, workers, loader.prefetch)


def _ignore(problem: str) -> None:
    """Leave an image that is skipped unnamed."""


class MemorySource:
    """A small set, kept as uint8 on the device; crop, flip and normalisation are done there by the batch."""

    decoder = "none"

    def __init__(self, config: DatasetConfig, seed: int, target: Target) -> None:
        train, val = sets.load(config)
        first = (train.images.numpy(), train.labels.numpy())
        self.identity = identity_in_memory(first, first if val is train else (val.images.numpy(), val.labels.numpy()))
        device = target.device
        self._train = sets.ImageSet(train.images.to(device), train.labels.to(device))
        self._val = sets.ImageSet(val.images.to(device), val.labels.to(device))
        self.on_skip: Callable[[str], None] = _ignore
        self._config, self._seed, self._target = config, seed, target
        self._drawn: tuple[int, Crops] | None = None
        self.train_images = config.trained_images or len(train.labels)
        self.val_images = config.validated_images or len(val.labels)
        self.classes = config.classes or int(train.labels.max()) + 1
        self.sample = sample_of(config)
        self._check_labels()

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
        _tell(opened.line)
        self.decoder, line = choose_decoder(config)
        _tell(line)
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
            images = _Files(files, self._config, self._seed, train, self.decoder == "native", False)
            pixels, labels, _ = images.__getitems__([(0, row) for row in rows])
            whole.update(pixels.numpy().tobytes() + labels.numpy().tobytes())
        return whole.hexdigest()

    def _load(self, files: Split, batches: Iterable[list[tuple[int, int]]], train: bool) -> Iterator[Batch]:
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
        prefetch = None
        if self._workers and first:
            size = len(first[0]) * 3 * self._config.height * self._config.width
            prefetch = fitting_prefetch(self._prefetch, self._workers, size, _shared_memory())
        loader = DataLoader(
            _Files(files, self._config, self._seed, train, self.decoder == "native", self._target.channels_last),
            batch_sampler=itertools.chain(first, rest),  # any iterable of index lists will do
            num_workers=self._workers,
            prefetch_factor=prefetch,
            pin_memory=self._target.device.type == "cuda",
            collate_fn=_as_it_is,
            worker_init_fn=_belong_to_the_run,
        )
        _take_loaders_along()
        for pixels, labels, problems in _watched(loader):
            for problem in problems:
                if isinstance(problem, UserError):
                    raise problem
            if problems and self._config.on_error == "stop":
                raise UserError(
                    f"{problems[0]}. Mend or remove the file, or use dataset.on_error=skip: such images are counted, "
                    "replaced by the next one in training, and wrong in validation."
                )
            for problem in problems:
                self.on_skip(str(problem))
            images = self._target.images(pixels, self._config)
            yield Batch(images, upload(labels, self._target.device), len(problems))


def fitting_prefetch(wanted: int | None, workers: int, batch: int, room: int | None) -> int:
    """Return how many batches each loader process may keep ready.

    They lie in shared memory, which counts as the job's: a container often has 64 MB of it, and a write beyond that
    kills the loader process.

    Args:
        wanted: ``loader.prefetch``; None takes PREFETCH, or what fits into 1 GiB.
        workers: Loader processes, at least one.
        batch: Bytes of a batch.
        room: Bytes of shared memory for this process, None where the system does not say.

    Raises:
        UserError: there is no room for one batch each.
    """
    prefetch = wanted or max(1, min(PREFETCH, AHEAD // (workers * batch)))
    if room is None or (workers * prefetch + 1) * batch <= room:  # one is in use
        return prefetch
    fits = (room - batch) // (workers * batch)
    need = (workers * prefetch + 1) * batch / 1e6
    if fits < 1:
        raise UserError(
            f"shared memory (/dev/shm) has room for {room / 1e6:.0f} MB, and loader.workers={workers} with "
            f"loader.prefetch={prefetch} take {need:.0f} MB: give the container more (docker run --shm-size=8g), or "
            "use fewer loader.workers, or loader.workers=0."
        )
    _tell(
        f"loader.prefetch={fits} instead of {prefetch}: {need:.0f} MB of batches do not fit into {room / 1e6:.0f} MB "
        "of shared memory (/dev/shm; docker run --shm-size)"
    )
    return fits


def _shared_memory() -> int | None:
    """Return the free bytes of shared memory for this process, a share where several processes train here."""
    try:
        free = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return free.f_bavail * free.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@functools.cache  # once a process, however often its data are opened
def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _belong_to_the_run(worker: int) -> None:
    """Let a loader process live as long as its run: Ctrl-C and a scheduler's SIGTERM reach it too, and are the run's.

    Torch's own watch over the parent sees nothing while an image is read, and not a parent that died first.
    """
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    for number in (signal.SIGINT, *ENDING):
        signal.signal(number, signal.SIG_IGN)


def _end_with(run: multiprocessing.process.BaseProcess) -> None:
    run.join()  # by a pipe that the run has to hold: its parent, to the system, may be a fork server that lives on
    os._exit(FAULT)


@functools.cache  # once a process, however many loaders it has
def _take_loaders_along() -> None:
    """Let this process end although its loader processes ignore SIGTERM.

    When it ends by an exception that nobody expected, loaders are still held by its traceback, and multiprocessing
    sends SIGTERM to what is left of daemons, and waits for them.
    """
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=0)


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def is_lost_loader(error: BaseException) -> bool:
    """Whether a loader process was killed; torch has only words for it, and raises them wherever the run is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def lost_loader(error: BaseException) -> Fault:
    """Return what to raise for a loader process that was killed: what may have happened, and what to do."""
    return Fault(
        f"a loader process is gone: {error} If the machine ran out of memory, use a smaller loader.workers or "
        "loader.prefetch."
    )


def _watched(loader: DataLoader[_Loaded]) -> Iterator[_Loaded]:
    """Iterate over a loader; a pipe that a killed loader process has left is a lost loader too."""
    try:
        yield from loader
        return
    except (OSError, EOFError) as error:
        # Torch's handler would raise for the same death once more, in the middle of whatever clears up.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        problem = repr(error)
    # The exception is gone, and with it the last reference to the loader, which has forgotten its processes.
    signal.signal(signal.SIGCHLD, handler)
    raise RuntimeError(f"DataLoader worker has closed its pipe: {problem}.")


def _as_it_is(batch: Any) -> Any:
    return batch


class _Files(Dataset[_Loaded]):
    """Decode the images of a batch, given as (epoch, index); runs in loader processes.

    In training a corrupt image gives way to the next one that can be read, with that one's label and crop: the
    same one whoever decodes it. In validation it stays in its place, black and labelled ``UNREADABLE``.
    """

    def __init__(
        self, files: Split, config: DatasetConfig, seed: int, train: bool, native: bool, channels_last: bool
    ) -> None:
        self._files, self._config, self._seed, self._train = files, config, seed, train
        self._cropped = train and config.crop == "resized"
        self._native, self._channels_last = native and self._cropped, channels_last

    def __getitems__(self, places: list[tuple[int, int]]) -> _Loaded:
        """Return a batch: pixels are uint8 (batch, 3, H, W), in the memory format that is wanted on the device."""
        pixels = self._room(len(places))
        found = [self._fill(slot, *place) for slot, place in zip(pixels, places, strict=True)]
        return pixels, torch.tensor([label for label, _ in found]), [problem for _, problem in found if problem]

    def _room(self, images: int) -> Tensor:
        """Return a batch to be filled: in a loader process in shared memory, so that it is handed over as it is."""
        height, width = self._config.height, self._config.width
        size = images * 3 * height * width
        flat = torch.empty(0 if get_worker_info() else size, dtype=torch.uint8)
        if get_worker_info():  # what torch's own collate function does
            flat = flat.set_(flat.untyped_storage()._new_shared(size))  # type: ignore[no-untyped-call]
        if self._channels_last:
            return flat.view(images, height, width, 3).permute(0, 3, 1, 2)
        return flat.view(images, 3, height, width)

    def _fill(self, slot: Tensor, epoch: int, index: int) -> tuple[int, _Problem]:
        """Write an image to ``slot``, (3, H, W), and return its label and what was wrong."""
        problem = self._decode(slot, epoch, index)
        if problem is None:
            return int(self._files.labels[index]), None
        if self._train and self._config.on_error == "skip" and isinstance(problem, str):
            for step in range(1, len(self._files)):
                following = (index + step) % len(self._files)
                another = self._decode(slot, epoch, following)
                if another is None:
                    return int(self._files.labels[following]), problem
                if isinstance(another, UserError):
                    break
            else:
                another = UserError(f"no image of this split can be read; the first problem: {problem}")
            problem = another
        slot.zero_()
        return UNREADABLE, problem

    def _decode(self, slot: Tensor, epoch: int, index: int) -> _Problem:
        """Write an image to ``slot``, or say what is wrong with the file."""
        try:
            data = self._files.read(index)
            if not (self._native and self._crop_natively(slot, data, epoch, index)):
                slot.copy_(self._pixels(data, epoch, index))
        except UserError as error:
            return error
        except DAMAGE as error:
            return f"corrupt image {self._files.where(index)}: {error}"
        return None

    def _crop_natively(self, slot: Tensor, data: bytes, epoch: int, index: int) -> bool:
        size = native.size(data)
        if size is None:
            return False
        box, mirrored = draw_resized_crop(self._seed, epoch, index, *size, self._config.flip)
        return native.crop_into(slot, data, box, mirrored)

    def _pixels(self, data: bytes, epoch: int, index: int) -> Tensor:
        """Return pixels as Pillow and torchvision make them."""
        from torchvision.transforms import functional

        image = decode(data)
        config, size = self._config, [self._config.height, self._config.width]
        if self._cropped:
            box, mirrored = draw_resized_crop(self._seed, epoch, index, image.width, image.height, config.flip)
            image = functional.resized_crop(image, *box, size)
            image = functional.hflip(image) if mirrored else image
        else:
            shorter = config.resize or max(size)
            check_resized(image.width, image.height, shorter)
            image = functional.resize(image, [shorter])
            image = functional.center_crop(image, size)
        pixels: Tensor = functional.pil_to_tensor(image)
        return pixels
