"""Images in class folders, and validation images in one folder whose classes a table gives, as Kaggle has them."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable
from largebatch.data.files import Folders, Names
from largebatch.data.listing import IMAGE_SUFFIXES, is_hidden, is_image, kind_left_out, order_key
from largebatch.data.tar import shown

SOLUTION = "LOC_val_solution.csv"
_KAGGLE = "imagenet-object-localization-challenge"
_ABOVE = 4  # folders from Kaggle's images up to its own: CLS-LOC, Data, ILSVRC and what holds them


@dataclass
class Survey:
    """Lists directories, and counts what is left out.

    Attributes:
        tolerant: Whether a directory that cannot be read is only noted; else it is an error.
        left_out: How many files of each kind are not read.
        unreadable: A line for each directory that cannot be read.
    """

    tolerant: bool
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def entries(self, folder: Path | str) -> list[os.DirEntry[str]]:
        """Return what a directory holds, but for what systems leave behind."""
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            if not self.tolerant:
                raise
            self.unreadable.append(f"directory {printable(os.fspath(folder))}: it cannot be read: {error.strerror}")
            return []
        kept = [entry for entry in entries if not is_hidden(entry.name)]
        self.left_out.update(kind_left_out(entry.name) for entry in entries if is_hidden(entry.name))
        return kept

    def images_below(self, folder: str) -> Iterator[str]:
        """Yield the paths of all images below a directory."""
        for entry in self.entries(folder):
            if entry.is_dir():
                yield from self.images_below(entry.path)
            elif is_image(entry.name):
                yield entry.path
            else:
                self.left_out[kind_left_out(entry.name)] += 1


def kaggle_folder(root: Path) -> Path | None:
    """Return the folder of Kaggle's train/ and val/ at or below a directory, if there is one."""
    below = Path("ILSVRC", "Data", "CLS-LOC")
    tries = (below, Path(_KAGGLE, below), Path(*below.parts[1:]), Path(*below.parts[2:]))
    return next((root / path for path in tries if (root / path / "train").is_dir()), None)


def is_flat(val: Path) -> bool:
    """Whether a directory holds images and no folders of classes."""
    entries = Survey(tolerant=False).entries(val)
    return any(is_image(entry.name) for entry in entries) and not any(entry.is_dir() for entry in entries)


def class_folders(root: Path, survey: Survey) -> Folders:
    """List one folder of images a class.

    Raises:
        UserError: a folder without images.
    """
    found = sorted(survey.entries(root), key=lambda entry: entry.name)
    classes = [entry.name for entry in found if entry.is_dir()]
    survey.left_out.update(kind_left_out(entry.name) for entry in found if not entry.is_dir())
    names, counts = list[bytes](), []
    for name in classes:
        images = [os.fsencode(path)[len(os.fsencode(root)) + 1 :] for path in survey.images_below(str(root / name))]
        names += sorted(images, key=order_key)
        counts.append(len(images))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and not survey.unreadable:
        raise UserError(
            f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in {some(empty)}. Every class folder must hold at least "
            "one image."
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Folders(labels, Names.of(names), classes, str(root))


def flat_folder(val: Path, classes: list[str], survey: Survey) -> Folders:
    """List Kaggle's validation images, which lie in one folder, with the classes of ``LOC_val_solution.csv``.

    Raises:
        UserError: there is no such table, it cannot be read, or it does not belong to these images.
    """
    table = next(
        (above / SOLUTION for above in [val, *val.parents][: _ABOVE + 2] if (above / SOLUTION).is_file()), None
    )
    if table is None:
        raise UserError(
            f"{val} holds images without folders of classes, and {SOLUTION}, which has their classes, was not found: "
            "it comes with Kaggle's ImageNet Object Localization Challenge. Put it into the directory of "
            f"ILSVRC/ or of {val.name}/, or sort the images into one folder per class."
        )
    synsets = _solution(table)
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(synsets.values()) - label_of.keys())
    if unknown:
        raise UserError(f"{table} has the class '{shown(unknown[0])}', of which there are no training images.")
    images = [os.path.relpath(path, val) for path in survey.images_below(str(val))]
    without = sorted(path for path in images if Path(path).stem not in synsets)
    missing = sorted(synsets.keys() - {Path(path).stem for path in images})
    if without or missing:
        raise UserError(
            f"{table} does not belong to the images in {val}: {some(without)} are not in it, and {some(missing)} of it "
            "are not there. Complete the copy."
        )
    rows = sorted(
        (label_of[synsets[Path(path).stem]], order_key(os.fsencode(path)), os.fsencode(path)) for path in images
    )
    labels = np.array([label for label, _, _ in rows], dtype=np.int32)
    return Folders(labels, Names.of(path for _, _, path in rows), classes, str(val))


def _solution(table: Path) -> dict[str, str]:
    """Return the class of every image by its name without ending: a prediction begins with it, and boxes follow."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{table} cannot be read ({error!r}): it has the columns ImageId and PredictionString, which begins with "
            "the class. Fetch it again."
        ) from None


def some(names: list[str], most: int = 4) -> str:
    """Return the first of some names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
