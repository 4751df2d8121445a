"""Small sets of labelled images, read whole as uint8, and where any set is."""

from __future__ import annotations

import contextlib
import gzip
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data.holdout import hold_out
from largebatch.data.recognise import given_root, recognise

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
SYNTHETIC_IMAGES = 256
DOWNLOAD_SECONDS = 20  # of silence on a connection before it is given up


@dataclass(frozen=True)
class ImageSet:
    """A split held in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> ImageSet:
        """Return the images at these indices, int64 (M,), as a set of its own."""
        return ImageSet(self.images[rows], self.labels[rows])


def in_memory(config: DatasetConfig) -> bool:
    """Whether the set is one of ours that is read whole."""
    return config.source == "own" and not config.of_files


def search_path(config: DatasetConfig) -> list[Path]:
    """Return the places where the set is looked for, first to last."""
    given = given_root(config)
    places = [given] if given else []
    if not config.root and config.name == "fashion_mnist":
        places.append(DEBIAN_FASHION)
    if not config.root and in_memory(config):
        places.append(Path("data"))
    return places


def locate(config: DatasetConfig) -> str:
    """Say in a few words where the set is, for people; never raises."""
    if config.source == "python":
        return f"made by {config.name}"
    if config.source == "huggingface":
        return f"{config.root or config.name}, by the library datasets"
    if config.name == "digits":
        return "embedded in largebatch"
    if config.name == "synthetic":
        return "made up on the device"
    for place in search_path(config):
        if not in_memory(config):
            with contextlib.suppress(UserError):
                return str(recognise(place, config))
        elif _present(config, place):
            return str(place)
    looked = ", ".join(map(str, search_path(config))) or "nowhere: dataset.root is not set"
    return f"not found ({looked})"


def load(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    """Read a small set whole.

    Where the files hold more images than ``train_images`` or ``val_images`` say, the first ones are the set. What
    ``holdout`` says is then taken out of the training images, and takes the place of the validation images.

    Returns:
        (training, validation).

    Raises:
        UserError: the set is not where it was looked for, or not of the size that the configuration says.
    """
    train, val = _LOADERS[config.name](config)
    if config.name == "synthetic":
        return train, val  # a few images stand for any number of them
    train, val = _first(train, config.train_images), _first(val, config.val_images)
    for split, images, expected in (
        ("train", train.images, config.train_images),
        ("val", val.images, config.val_images),
    ):
        shape = (expected, config.channels, config.height, config.width)
        if tuple(images.shape) != shape:
            raise UserError(
                f"dataset={config.name}: the {split} images are {_by(images.shape)}, where dataset.{split}_images, "
                f"channels, height and width say {_by(shape)}: take the overrides back, or check the files in "
                f"{locate(config)}."
            )
    for split, part in (("train", train), ("val", val)):
        if part.labels.shape != part.images.shape[:1]:
            raise UserError(
                f"dataset={config.name}: the {split} labels ({_by(part.labels.shape)}) are not one for each of the "
                f"{len(part.images)} images: check the files in {locate(config)}."
            )
    if config.holdout:
        kept, held = hold_out(len(train.labels), config.holdout, config.holdout_seed)
        return train.at(kept), train.at(held)
    return train, val


def _first(part: ImageSet, count: int | None) -> ImageSet:
    return ImageSet(part.images[:count], part.labels[:count])


def _by(shape: tuple[int | None, ...] | torch.Size) -> str:
    return "×".join(str(size) for size in shape)


def _present(config: DatasetConfig, place: Path) -> bool:
    if config.name == "fashion_mnist":
        return _idx_folder(place) is not None
    return (place / _CIFAR[config.name].folder).is_dir()


def _digits(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    with np.load(
        Path(__file__).with_name("digits.npz"), allow_pickle=False
    ) as file:  # digits.md names its source and licence
        levels, labels, splits = file["images"], torch.from_numpy(file["labels"]).long(), [file["train"], file["val"]]
    images = torch.from_numpy(np.rint(levels * (255 / 16)).astype(np.uint8))[:, None]
    train, val = (ImageSet(images[rows], labels[rows]) for rows in (torch.from_numpy(split).long() for split in splits))
    return train, val


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ENDS = ("", ".gz")


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{end}" for end in _ENDS if (folder / f"{name}{end}").exists()), None)


def _idx_folder(place: Path) -> Path | None:
    """Return the folder at or below ``place`` (torchvision's layout) with any of the set's files."""
    names = [name for pair in _IDX.values() for name in pair]
    folders = (place, place / "FashionMNIST" / "raw")
    return next((folder for folder in folders if any(_idx_file(folder, name) for name in names)), None)


def read_idx(path: Path) -> Tensor:
    """Read one file of Yann LeCun's idx format (unsigned bytes of any shape), gzipped or not.

    Raises:
        UserError: the file is cut short or of another format.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}. Fetch it again.") from None
    dimensions = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if not dimensions or len(data) - start != np.prod(shape):
        raise UserError(f"{path} is not a complete idx file of bytes: download it again.")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(shape)


def _fashion_mnist(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    def fetch(root: Path) -> None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)

    place = _find(config, fetch, "On Debian and Ubuntu: apt-get install dataset-fashion-mnist.")
    folder = _idx_folder(place)
    assert folder is not None, f"{place} was found to hold the set"
    splits = []
    for images, labels in _IDX.values():
        paths = _idx_file(folder, images), _idx_file(folder, labels)
        if None in paths:
            raise UserError(f"dataset=fashion_mnist: {folder} lacks {images} or {labels}: fetch the set again.")
        pixels, numbers = (read_idx(path) for path in paths if path)
        splits.append(ImageSet(pixels[:, None], numbers.long()))
    return splits[0], splits[1]


@dataclass(frozen=True)
class _Cifar:
    """The binary version of a CIFAR set: nothing in it is unpickled. CIFAR-100 has the coarse label first."""

    archive: str
    md5: str
    folder: str
    train: tuple[str, ...]
    val: str
    label_bytes: int


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR = {
    "cifar10": _Cifar(
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        val="test_batch.bin",
        label_bytes=1,
    ),
    "cifar100": _Cifar(
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=("train.bin",),
        val="test.bin",
        label_bytes=2,
    ),
}
_CIFAR_PIXELS = 3 * 32 * 32


def _cifar(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    layout = _CIFAR[config.name]

    def fetch(root: Path) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR_URL + layout.archive, str(root), md5=layout.md5)

    folder = _find(config, fetch, f"It takes the set's binary version: a folder {layout.folder}.") / layout.folder
    splits = []
    for names in (layout.train, (layout.val,)):
        rows = torch.cat([_cifar_rows(folder / name, layout.label_bytes) for name in names])
        pixels = rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
        splits.append(ImageSet(pixels, rows[:, layout.label_bytes - 1].long()))
    return splits[0], splits[1]


def _cifar_rows(path: Path, label_bytes: int) -> Tensor:
    if not path.exists():
        raise UserError(f"{path} is missing: fetch the set again.")
    data = np.fromfile(path, dtype=np.uint8)
    if len(data) == 0 or len(data) % (label_bytes + _CIFAR_PIXELS):
        raise UserError(f"{path} is cut short: fetch the set again.")
    return torch.from_numpy(data).view(-1, label_bytes + _CIFAR_PIXELS)


def _find(config: DatasetConfig, fetch: Callable[[Path], None], hint: str) -> Path:
    """Return the first place that holds the set, after downloading it where none does."""
    places = search_path(config)
    found = next((place for place in places if _present(config, place)), None)
    if found is not None:
        return found
    root = next(place for place in places if place != DEBIAN_FASHION)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # a network that drops packets would hold us up for minutes
    try:
        fetch(root)
    except (OSError, RuntimeError) as error:  # what urllib and torchvision raise without a network or a disk
        looked = ", ".join(map(str, places))
        reason = " ".join(str(error).split())
        raise UserError(
            f"dataset={config.name} was not found in {looked}, and downloading it to {root} failed: {reason}. {hint}"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return root


def _synthetic(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    shape = (SYNTHETIC_IMAGES, config.channels, config.height, config.width)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    split = ImageSet(images, torch.arange(SYNTHETIC_IMAGES) % (config.classes or 1))
    return split, split


_LOADERS: dict[str, Callable[[DatasetConfig], tuple[ImageSet, ImageSet]]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "synthetic": _synthetic,
}
