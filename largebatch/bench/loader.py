"""Images from JPEG files: our loader, and torchvision's usual transforms in a plain DataLoader."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from largebatch.base.errors import UserError
from largebatch.bench.compare import Side, Timings, take_turns
from largebatch.config.groups import DatasetConfig, LoaderConfig
from largebatch.data.loading import PREFETCH
from largebatch.data.recognise import FOLDERS, given_root, recognise
from largebatch.data.source import FolderSource, Target
from largebatch.data.stream import permutation

SIZE = (500, 375)  # width and height of ImageNet's average image
QUALITY = 96
GRAIN = 4.5  # standard deviation of a sensor's noise, in levels of 255: with it a file has about 110 KB
CLASSES = 4
COLOUR_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # those that scikit-image brings along


@dataclass(frozen=True)
class Loading:
    """Work of the two loaders: the files, batches of ``batch`` images, ``workers`` loader processes."""

    files: DatasetConfig
    batch: int
    workers: int
    prefetch: int

    def ours(self) -> Iterator[torch.Tensor]:
        """Yield the training images of one epoch with the product's loader, on the CPU."""
        target = Target(torch.device("cpu"), torch.float32)
        source = FolderSource(self.files, 0, target, self.workers, self.prefetch)
        order = permutation(source.train_images, seed=0, epoch=0)
        for batch in source.train((0, ids) for ids in torch.split(order, self.batch)):
            yield batch.images

    def torchvision(self) -> Iterator[torch.Tensor]:
        """Yield the training images of one epoch as torchvision's examples load them."""
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        files = self.files
        dataset = ImageFolder(
            str(Path(files.root or "") / "train"),
            transforms.Compose(
                [
                    transforms.RandomResizedCrop((files.height, files.width)),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(files.mean, files.std),
                ]
            ),
        )
        return self.plain(dataset)

    def plain(self, dataset: Dataset[tuple[torch.Tensor, int]]) -> Iterator[torch.Tensor]:
        """Yield the images of one epoch of (image, label) by PyTorch's own DataLoader."""
        loader = DataLoader(
            dataset,
            batch_size=self.batch,
            shuffle=True,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
        )
        for images, _ in loader:
            yield images


Load = Callable[[Loading], Iterator[torch.Tensor]]
# What ours is timed against, by name; scripts/peers/decoding.py adds one.
PEERS: dict[str, Load] = {"torchvision": Loading.torchvision}


def loading(files: DatasetConfig, loader: LoaderConfig, batch: int, cores: int) -> Loading:
    """Return what is compared: loader processes as a run would have them.

    Raises:
        UserError: the images do not lie in class folders.
    """
    check_class_folders(files)
    return Loading(
        files, batch, min(cores, 16) if loader.workers is None else loader.workers, loader.prefetch or PREFETCH
    )


def check_class_folders(files: DatasetConfig) -> None:
    """Raise :class:`UserError` unless the images lie in class folders."""
    root = given_root(files)
    if root and (layout := recognise(root, files)).name != FOLDERS:
        raise UserError(
            f"bench loader and data: torchvision's ImageFolder reads class folders alone, and there are {layout}. "
            "Leave dataset.root out for photographs that are made here, or name a directory of class folders."
        )


def time_loaders(what: Loading, repeats: int) -> Timings:
    """Time one epoch of each in turn, from the start of the loader processes to their end.

    Returns:
        Sides ``ours`` and those of ``PEERS``.
    """
    images = sum(len(batch) for batch in what.ours())
    loaders = {"ours": Loading.ours, **PEERS}
    turns = {name: Side(partial(_exhaust, load, what), images) for name, load in loaders.items()}
    return take_turns(turns, repeats, "loader against torchvision's")


def _exhaust(load: Load, what: Loading) -> None:
    for _ in load(what):
        pass


def make_photographs(root: Path, files: DatasetConfig, count: int) -> DatasetConfig:
    """Write ``count`` training images into the empty directory ``root``, and return ``files`` pointing there."""
    write_photographs(root, count)
    return replace(files, name="imagefolder", root=str(root), train_images=None, val_images=None, classes=None)


def write_photographs(root: Path, count: int) -> None:
    """Write JPEGs of ImageNet's size in its layout: ``count`` training images, and a few of validation.

    Windows of the photograph in matplotlib's sample data, and of scikit-image's where it is installed, scaled to
    500×375 or upright, with grain: about 110 KB each, as ImageNet's are. They are the same each time.
    """
    originals, chance, noise = _photographs(), random.Random(0), np.random.default_rng(0)
    for number in range(count):
        original = originals[number % len(originals)]
        size = SIZE if chance.random() < 0.75 else SIZE[::-1]
        share = chance.uniform(0.7, 1.0)
        width = round(share * min(original.width, original.height * size[0] / size[1]))
        height = round(width * size[1] / size[0])
        left, top = chance.randint(0, original.width - width), chance.randint(0, original.height - height)
        window = original.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        grainy = np.asarray(window) + noise.normal(0, GRAIN, (size[1], size[0], 1))
        window = Image.fromarray(np.clip(np.rint(grainy), 0, 255).astype(np.uint8))
        _save(window, root / "train" / f"class{number % CLASSES}" / f"{number}.jpg")
    for number in range(CLASSES):
        _save(originals[0].resize(SIZE), root / "val" / f"class{number}" / "0.jpg")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY)


def _photographs() -> list[Image.Image]:
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        images = [image.convert("RGB")]
    if importlib.util.find_spec("skimage"):
        from skimage import data

        images += [Image.fromarray(getattr(data, name)()) for name in COLOUR_PHOTOGRAPHS]
    return images
