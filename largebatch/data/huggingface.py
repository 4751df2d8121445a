"""Data sets of images by Hugging Face's library datasets, from the hub or from a directory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.base.errors import UserError, nearest
from largebatch.config.groups import DatasetConfig
from largebatch.data.files import Names, Split

VALIDATION = ("validation", "val", "test")  # the first that there is


@dataclass(frozen=True)
class Rows(Split):
    """Images in a column of a data set: ``table`` is a datasets.Dataset that does not decode them."""

    table: Any
    column: str

    def read(self, index: int) -> bytes:
        """Read the row, or the file that it names."""
        image = self.table[index][self.column]
        found: bytes | None = image["bytes"]
        return Path(image["path"]).read_bytes() if found is None else found

    def where(self, index: int) -> str:
        """Return the number of the row."""
        return f"{self.names[index]}, row {index}"

    def sizes(self, rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Return -1: nobody knows without reading all images."""
        return np.full(len(self) if rows is None else len(rows), -1, dtype=np.int64)


def open_huggingface(config: DatasetConfig) -> tuple[Rows, Rows, bool]:
    """Open the training and the validation images, and return whether their classes have names.

    Raises:
        UserError: the library is not installed, the set cannot be had, or has no such split or column.
    """
    about = f"dataset=huggingface dataset.name={config.name}"
    if not importlib.util.find_spec("datasets"):
        raise UserError(f"{about} needs the library datasets: pip install 'largebatch[huggingface]'.")
    if config.name in ("", "null"):
        raise UserError("dataset=huggingface needs dataset.name: the set's name at the hub, or any for dataset.root.")
    import datasets

    try:
        if config.root and (Path(config.root) / "dataset_dict.json").exists():  # of save_to_disk
            found = datasets.load_from_disk(config.root)
        else:
            found = datasets.load_dataset(config.root or config.name, config.config, **(config.kwargs or {}))
    except Exception as error:  # the library, its file systems and the hub have exceptions of every kind
        raise UserError(f"{about} cannot be opened: {' '.join(str(error).split()).rstrip('.')}.") from None
    val = next((name for name in VALIDATION if name in found), None)
    if "train" not in found or val is None:
        raise UserError(
            f"{about} has the splits {', '.join(found)}: it needs train, and one of {', '.join(VALIDATION)}."
        )
    features = found["train"].features
    image = _column(about, "image_column", config.image_column, features, datasets.Image)
    label = _column(about, "label_column", config.label_column, features, datasets.ClassLabel)
    names = getattr(features[label], "names", None)
    labels = [np.asarray(found[split][label][:], dtype=np.int32) for split in ("train", val)]
    if min(map(np.min, labels)) < 0:
        raise UserError(f"{about}: column {label} has a label below 0, which a set without labels has for a split.")
    classes = list(names or map(str, range(1 + int(max(map(np.max, labels))))))
    splits = []
    for split, numbers in zip(("train", val), labels, strict=True):
        table = found[split].cast_column(image, datasets.Image(decode=False))
        keys = Names.of(os.fsencode(f"{split}-{row:08d}") for row in range(len(table)))
        splits.append(Rows(numbers, keys, classes, table, image))
    return splits[0], splits[1], names is not None


def _column(about: str, key: str, given: str | None, features: Any, kind: type) -> str:
    """Return the column that was given, or the only one of its kind."""
    if given is not None:
        if given not in features:
            raise UserError(
                f"{about}: dataset.{key}={given} is none of {', '.join(features)}.{nearest(given, features)}"
            )
        return given
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise UserError(
            f"{about} has {len(found) or 'no'} columns of type {kind.__name__} among {', '.join(features)}: name one "
            f"with dataset.{key}."
        )
    return found[0]
