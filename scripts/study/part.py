"""A part of Fashion-MNIST, as a data set of its own in the same format."""

from __future__ import annotations

import gzip
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from largebatch.cli.compose import configuration_directory
from largebatch.config.groups import DatasetConfig
from largebatch.data.sets import load


def take_first(out: Path, train: int, validation: int) -> None:
    """Write the first images of the training and of the test set, and their labels.

    Args:
        out: Directory to write, made if need be; a set that is there is left alone.
        train: Images of the training set.
        validation: Images of the test set, to validate on.

    Raises:
        UserError: Fashion-MNIST is neither here nor to be had.
    """
    if (out / "t10k-labels-idx1-ubyte.gz").exists():  # the last to be written
        return
    out.mkdir(parents=True, exist_ok=True)
    values = OmegaConf.to_container(OmegaConf.load(configuration_directory() / "dataset" / "fashion_mnist.yaml"))
    for name, whole, count in zip(("train", "t10k"), load(DatasetConfig(**values)), (train, validation), strict=True):
        write_idx(out / f"{name}-images-idx3-ubyte.gz", whole.images[:count, 0])
        write_idx(out / f"{name}-labels-idx1-ubyte.gz", whole.labels[:count])


def write_idx(path: Path, values: Tensor) -> None:
    """Write whole numbers below 256, of any shape, in Yann LeCun's idx format, whole or not at all."""
    head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(head + values.byte().numpy().tobytes(), compresslevel=1, mtime=0))
    partial.rename(path)
