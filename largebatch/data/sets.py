"""Where labelled images come from. Small sets are read whole, as uint8; folders are listed."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from largebatch.config import DatasetConfig, UserError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
SYNTHETIC_IMAGES = 256


@dataclass(frozen=True)
class ImageSet:
    """A split held in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FileSet:
    """A split in class folders: one path and one label an image, ``classes`` in the order of the labels."""

    paths: list[str]
    labels: list[int]
    classes: list[str]


def in_memory(config: DatasetConfig) -> bool:
    """Whether the set is read whole."""
    return config.name not in ("imagenet", "imagefolder")


def search_path(config: DatasetConfig) -> list[Path]:
    """Return the places where the set is looked for, first to last."""
    places = [Path(config.root).expanduser()] if config.root else []
    if not config.root and os.environ.get("LARGEBATCH_DATA"):
        places.append(Path(os.environ["LARGEBATCH_DATA"]).expanduser())
    if not config.root and config.name == "fashion_mnist":
        places.append(DEBIAN_FASHION)
    if not config.root and in_memory(config):
        places.append(Path("data"))
    return places


def locate(config: DatasetConfig) -> str:
    """Say in a few words where the set is, for people; never raises."""
    if config.name == "digits":
        return "embedded in scikit-learn"
    if config.name == "synthetic":
        return "made up on the device"
    for place in search_path(config):
        if in_memory(config):
            if _present(config, place):
                return str(place)
        elif (place / "train").is_dir() and (place / "val").is_dir():
            return str(place)
    looked = ", ".join(map(str, search_path(config))) or "nowhere: dataset.root is not set"
    return f"not found ({looked})"


def load(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    """Read a small set whole.

    Returns:
        (training, validation).

    Raises:
        UserError: the set is not where it was looked for, or not of the size that the configuration says.
    """
    train, val = _LOADERS[config.name](config)
    for split, images, expected in (
        ("train", train.images, config.train_images),
        ("val", val.images, config.val_images),
    ):
        shape = (expected, config.channels, config.height, config.width)
        if config.name != "synthetic" and tuple(images.shape) != shape:
            raise UserError(
                f"dataset={config.name}: the {split} images are {_by(images.shape)}, where dataset.{split}_images, "
                f"channels, height and width say {_by(shape)}: take the overrides back, or check the files in "
                f"{locate(config)}."
            )
    return train, val


def list_folders(config: DatasetConfig) -> tuple[FileSet, FileSet]:
    """List class folders below ``dataset.root``: (training, validation).

    Raises:
        UserError: no root, no train/ or val/, a class folder without images, classes that differ between the
            two, or (``imagenet``) other than its 1000 synsets.
    """
    if not search_path(config):
        raise UserError(
            f"dataset={config.name} needs dataset.root (or $LARGEBATCH_DATA): a directory with train/ and val/, "
            "each with one folder of images a class."
        )
    root = search_path(config)[0]
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UserError(
                f"dataset={config.name}: no directory {root / split}. dataset.root must hold train/ and val/, each "
                f"with one folder of images a class; {_holds(root)}."
            )
    train, val = _folder(root / "train"), _folder(root / "val")
    if train.classes != val.classes:
        only_train, only_val = (sorted(set(a) - set(b)) for a, b in _pairs(train.classes, val.classes))
        raise UserError(
            f"dataset={config.name}: {root}/train and {root}/val do not have the same class folders: "
            f"{_some(only_train)} in train alone, {_some(only_val)} in val alone."
        )
    if config.name == "imagenet" and not (
        len(train.classes) == 1000 and all(c[0] == "n" and c[1:].isdigit() and len(c) == 9 for c in train.classes)
    ):
        raise UserError(
            f"dataset=imagenet: {root}/train has {len(train.classes)} class folders ({_some(train.classes)}), where "
            "ImageNet-1k has 1000 named by synset, n01440764 … n15075141. For other images use dataset=imagefolder."
        )
    if config.classes not in (None, len(train.classes)):
        raise UserError(f"dataset.classes={config.classes}, but {root}/train has {len(train.classes)} class folders.")
    return train, val


def _pairs(a: list[str], b: list[str]) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    return (a, b), (b, a)


def _folder(root: Path) -> FileSet:
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, class_to_label = find_classes(str(root))
        samples = make_dataset(str(root), class_to_label, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise UserError(f"{root}: {error} Every class folder must hold at least one image.") from None
    return FileSet([path for path, _ in samples], [label for _, label in samples], classes)


def _holds(root: Path) -> str:
    if not root.is_dir():
        return f"{root} does not exist"
    return f"{root} holds {_some(sorted(entry.name for entry in root.iterdir()))}"


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _by(shape: tuple[int | None, ...] | torch.Size) -> str:
    return "×".join(str(size) for size in shape)


def _present(config: DatasetConfig, place: Path) -> bool:
    if config.name == "fashion_mnist":
        return any((folder / f"{_IDX['train'][0]}{end}").exists() for folder in _idx_folders(place) for end in _ENDS)
    binary, pickled = _CIFAR[config.name]
    return (place / binary).is_dir() or (place / pickled).is_dir()


def _missing(config: DatasetConfig, hint: str) -> UserError:
    looked = ", ".join(map(str, search_path(config)))
    return UserError(f"dataset={config.name} was not found in {looked}. {hint}")


def _digits(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Scans of 0 … 16 grey levels; the split is fixed, and equal in its share of every digit.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(np.arange(len(pixels)), test_size=360, stratify=digits.target, random_state=0)
    images, labels = torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target).long()
    return ImageSet(images[train], labels[train]), ImageSet(images[val], labels[val])


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ENDS = ("", ".gz")


def _idx_folders(place: Path) -> tuple[Path, ...]:
    return (place, place / "FashionMNIST" / "raw")


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
        raise UserError(f"{path} is not a whole idx file of bytes: fetch it again.")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(shape)


def _fashion_mnist(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    places = search_path(config)
    for place in places:
        for folder in _idx_folders(place):
            found = {
                name: next((folder / f"{name}{end}" for end in _ENDS if (folder / f"{name}{end}").exists()), None)
                for names in _IDX.values()
                for name in names
            }
            if any(found.values()):
                lacking = [name for name, path in found.items() if path is None]
                if lacking:
                    raise UserError(f"dataset=fashion_mnist: {folder} lacks {', '.join(lacking)}: fetch them again.")
                tensors = [read_idx(path) for path in found.values() if path]
                return (
                    ImageSet(tensors[0][:, None], tensors[1].long()),
                    ImageSet(tensors[2][:, None], tensors[3].long()),
                )

    def fetch(root: Path) -> tuple[ImageSet, ImageSet]:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST(str(root), train=train, download=True) for train in (True, False)]
        train, val = (ImageSet(split.data[:, None], split.targets.long()) for split in sets)
        return train, val

    return _download(config, places, fetch, "On Debian and Ubuntu: apt-get install dataset-fashion-mnist.")


_CIFAR = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}


def _cifar(config: DatasetConfig) -> tuple[ImageSet, ImageSet]:
    places = search_path(config)
    for place in places:
        folder = place / _CIFAR[config.name][0]
        if folder.is_dir():
            return _cifar_binary(config, folder)

    def fetch(root: Path) -> tuple[ImageSet, ImageSet]:
        from torchvision import datasets

        kind = datasets.CIFAR10 if config.name == "cifar10" else datasets.CIFAR100
        sets = [kind(str(root), train=train, download=True) for train in (True, False)]
        train, val = (
            ImageSet(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
            for split in sets
        )
        return train, val

    hint = f"Put the folder {_CIFAR[config.name][0]} of the set's binary version into dataset.root."
    return _download(config, places, fetch, hint)


def _cifar_binary(config: DatasetConfig, folder: Path) -> tuple[ImageSet, ImageSet]:
    fine = config.name == "cifar100"
    names = ["train.bin"] if fine else [f"data_batch_{number}.bin" for number in range(1, 6)]
    label_bytes = 2 if fine else 1  # CIFAR-100 has the coarse label first
    splits = []
    for files in (names, ["test.bin" if fine else "test_batch.bin"]):
        rows = []
        for name in files:
            if not (folder / name).exists():
                raise UserError(f"dataset={config.name}: {folder} lacks {name}: fetch the set again.")
            data = np.fromfile(folder / name, dtype=np.uint8)
            if len(data) == 0 or len(data) % (label_bytes + 3072):
                raise UserError(f"{folder / name} is cut short: fetch the set again.")
            rows.append(torch.from_numpy(data).view(-1, label_bytes + 3072))
        table = torch.cat(rows)
        splits.append(ImageSet(table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1].long()))
    return splits[0], splits[1]


def _download(
    config: DatasetConfig, places: list[Path], fetch: Callable[[Path], tuple[ImageSet, ImageSet]], hint: str
) -> tuple[ImageSet, ImageSet]:
    root = next(place for place in places if place != DEBIAN_FASHION)
    try:
        return fetch(root)
    except (OSError, RuntimeError) as error:  # what urllib and torchvision raise without a network or a disk
        raise _missing(config, f"Downloading it to {root} failed: {error}. {hint}") from None


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
NAMES = (*_LOADERS, "imagenet", "imagefolder")
