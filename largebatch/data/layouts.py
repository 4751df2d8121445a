"""Which of ImageNet's layouts lies below ``dataset.root``, and its images: class folders, archives, shards, parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import archives
from largebatch.data.archives import list_official, list_shards, official_sources
from largebatch.data.files import Archived, Contained, Folders, Names, Split, Tabled
from largebatch.data.holdout import Part, hold_out
from largebatch.data.index import Indexed, indexed
from largebatch.data.listing import IMAGE_SUFFIXES, SPLITS, Listing, Table, order_key
from largebatch.data.parquet import list_parquet

FOLDERS, OFFICIAL, SHARDS, PARQUET = "class folders", "the official archives", "shards", "parquet files"
KNOWN = (
    f"{FOLDERS} (train/ and val/, each with one folder of images a class), {OFFICIAL} ({archives.TRAIN}, "
    f"{archives.VAL} and {archives.DEVKIT}.tar.gz), WebDataset's {SHARDS} (.tar with .jpg and .cls) and Hugging "
    f"Face's {PARQUET}, both with train or val in their names"
)
_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test)(?![a-z])")


@dataclass(frozen=True)
class Layout:
    """What lies below ``root``: its name, and the archives or tables of every split where these are its files."""

    name: str
    root: Path
    files: dict[str, list[Path]]

    def __str__(self) -> str:
        return f"{self.name} in {self.root}"


@dataclass(frozen=True)
class Opened:
    """Both splits, a line for people that says what they were found in, and what kept an index from being written."""

    train: Split
    val: Split
    line: str
    problem: str = ""


def given_root(config: DatasetConfig) -> Path | None:
    """Return ``dataset.root``, or $LARGEBATCH_DATA where it is not set."""
    root = config.root or os.environ.get("LARGEBATCH_DATA")
    return Path(root).expanduser() if root else None


def recognise(root: Path, dataset: str) -> Layout:
    """Find out by names alone which layout lies in a directory.

    Raises:
        UserError: none of them, several, one without its train or val, or the directory cannot be read.
    """
    try:
        found = list(_candidates(root))
    except OSError as error:
        raise UserError(f"dataset={dataset}: {error.filename} cannot be read: {error.strerror}.") from None
    if len(found) > 1:
        raise UserError(
            f"dataset={dataset}: {root} holds {' and '.join(layout.name for layout in found)}, and which is meant is "
            "not known: leave one there, or give dataset.root a directory of links to one."
        )
    if not found:
        raise UserError(f"dataset={dataset}: no images in {root}; {holds(root)}. dataset.root must hold {KNOWN}.")
    layout = found[0]
    for split in SPLITS:
        if layout.name == FOLDERS and not (root / split).is_dir():
            raise UserError(
                f"dataset={dataset}: no directory {root / split}. {root} holds class folders: it must have train/ and "
                f"val/, each with one folder of images a class; {holds(root)}."
            )
        if layout.name in (SHARDS, PARQUET) and not layout.files[split]:
            raise UserError(
                f"dataset={dataset}: {root} holds {layout.name}, but none of {split}: the split is read from the name "
                f"of a file, such as {split}-0000, or of its directory, {root / split}."
            )
    return layout


def _candidates(root: Path) -> Iterator[Layout]:
    if not root.is_dir():
        return
    if any(entry.is_dir() for split in SPLITS if (root / split).is_dir() for entry in _entries(root / split)):
        yield Layout(FOLDERS, root, {})
    if (root / archives.TRAIN).exists() or (root / archives.VAL).exists():
        yield Layout(OFFICIAL, root, {})
    for name, suffix in ((SHARDS, ".tar"), (PARQUET, ".parquet")):
        files = _by_split(root, suffix)
        if any(files.values()):
            yield Layout(name, root, files)


def _by_split(root: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the files of every split, sorted: by the word in a file's name, else in its directory's."""
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for folder in (root, *(root / name for name in ("data", "train", "val", "valid", "validation"))):
        if not folder.is_dir():
            continue
        for path in sorted(Path(entry.path) for entry in _entries(folder) if entry.name.endswith(suffix)):
            if path.name in (archives.TRAIN, archives.VAL):
                continue
            words = _SPLIT.search(path.name.lower()) or (folder != root and _SPLIT.search(folder.name))
            if words and words[1] != "test":
                files["train" if words[1].startswith("train") else "val"].append(path)
    return files


def open_splits(config: DatasetConfig, anew: bool = False) -> Opened:
    """Open the images of ``dataset=imagenet`` or ``imagefolder``, whatever layout they are in.

    Args:
        config: Which set, where, and how many images and classes it must have.
        anew: Whether to index archives again even where the index holds.

    Raises:
        UserError: no root; see :func:`recognise`; a class without images, classes that differ between the two
            splits, or (``imagenet``) other than its 1000 synsets; archives that are damaged.
    """
    root = given_root(config)
    if root is None:
        raise UserError(f"dataset={config.name} needs dataset.root (or $LARGEBATCH_DATA): a directory with {KNOWN}.")
    layout = recognise(root, config.name)
    try:
        if layout.name == FOLDERS:
            train: Split = _folders(root / "train")
            val: Split = _folders(root / "val")
            line = problem = ""
        else:
            train, val, index = _contained(config, layout, anew)
            line, problem = _about(index), index.problem
    except OSError as error:
        raise UserError(f"dataset={config.name}: {error.filename} cannot be read: {error.strerror}.") from None
    _check(config, layout, train, val)
    about = f"dataset={config.name}: {layout}, {len(train):,} + {len(val):,} images{line}"
    if config.holdout:
        kept, held = hold_out(len(train), config.holdout, config.holdout_seed)
        train, val = Part.of(train, kept), Part.of(train, held)
        about += f"; validated on {len(val):,} of the training images, which are not trained on"
    return Opened(train, val, about, problem)


def _folders(root: Path) -> Folders:
    classes = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    names, counts, empty = list[bytes](), [], []
    for name in classes:
        found = [os.fsencode(path)[len(os.fsencode(root)) + 1 :] for path in _images_below(str(root / name))]
        names += sorted(found, key=order_key)
        counts.append(len(found))
        if not found:
            empty.append(name)
    if empty:
        raise UserError(
            f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in {some(empty)}. Every class folder must hold at least "
            "one image."
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Folders(labels, Names.of(names), classes, str(root))


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _images_below(folder: str) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images_below(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield entry.path


def _contained(config: DatasetConfig, layout: Layout, anew: bool) -> tuple[Split, Split, Indexed]:
    sources = official_sources(layout.root) if layout.name == OFFICIAL else [*chain(*layout.files.values())]
    scan: dict[str, Callable[[], Listing]] = {
        OFFICIAL: lambda: list_official(layout.root),
        SHARDS: lambda: list_shards(layout.files),
        PARQUET: lambda: list_parquet(layout.files),
    }
    index = indexed(layout.root, layout.name, sources, scan[layout.name], anew)
    listing = index.listing
    classes = _class_names(config, layout, listing)
    kind: type[Archived] | type[Tabled] = Tabled if layout.name == PARQUET else Archived
    train, val = (_split(kind, table, classes, listing) for table in (listing.train, listing.val))
    return train, val, index


def _split(kind: type[Archived] | type[Tabled], table: Table, classes: list[str], listing: Listing) -> Contained:
    return kind(table.labels, table.names, classes, listing.containers, table.files, table.places)


def _about(index: Indexed) -> str:
    if index.path is None:
        return f"; the index could not be kept ({index.problem}), and is made again at every start"
    return f"; {'indexed in' if index.fresh else 'index'} {index.path}"


def _class_names(config: DatasetConfig, layout: Layout, listing: Listing) -> list[str]:
    """Return the classes by label. Shards and parquet files number them: ImageNet's by sorted synsets."""
    if layout.name == OFFICIAL:
        return listing.classes
    highest = max((int(table.labels.max()) for table in (listing.train, listing.val) if len(table)), default=-1)
    if config.name != "imagenet":
        return listing.classes if len(listing.classes) > highest else [str(label) for label in range(highest + 1)]
    synsets = _synsets()
    if highest >= len(synsets):
        raise UserError(f"dataset=imagenet: {layout} go up to class {highest}, and ImageNet-1k's are 0 … 999.")
    firsts = np.unique(listing.train.labels, return_index=True)[1]
    for label, name in ((int(listing.train.labels[at]), listing.train.names[at]) for at in firsts):
        synset = re.match(r"n\d{8}(?=_)", name)
        if synset and synset[0] != synsets[label]:
            raise UserError(
                f"dataset=imagenet: {layout} give {name} the class {label}, which is {synsets[label]} where classes "
                "are numbered in the order of their synsets: make them anew with that order."
            )
    return synsets


def _check(config: DatasetConfig, layout: Layout, train: Split, val: Split) -> None:
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise UserError(
            f"dataset={config.name}: {layout.root}/train and {layout.root}/val do not have the same class folders: "
            f"{some(only_train)} in train alone, {some(only_val)} in val alone."
        )
    if config.name == "imagenet":
        _check_synsets(layout, train.classes)
    if config.classes not in (None, len(train.classes)):
        raise UserError(f"dataset.classes={config.classes}, but {layout} have {len(train.classes)} classes.")
    for split, images, expected in (("train", train, config.train_images), ("val", val, config.val_images)):
        if expected not in (None, len(images)):
            raise UserError(
                f"dataset.{split}_images={expected}, but {layout} hold {len(images)} {split} images: complete the "
                f"copy, or use dataset.{split}_images=null to take what is there."
            )
        if not len(images):
            raise UserError(f"dataset={config.name}: {layout} hold no {split} images: fetch them again.")


def _synsets() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return sorted(ImageNetInfo("imagenet-1k").label_names())  # type: ignore[no-untyped-call]


def _check_synsets(layout: Layout, classes: list[str]) -> None:
    synsets = set(_synsets())
    if set(classes) != synsets:
        raise UserError(
            f"dataset=imagenet: {layout} do not have ImageNet-1k's 1000 synsets, n01440764 … n15075141, as classes: "
            f"{some(sorted(synsets - set(classes)))} lacking, {some(sorted(set(classes) - synsets))} unknown. For "
            "other images use dataset=imagefolder."
        )


def holds(root: Path) -> str:
    """Say what a directory holds."""
    if not root.is_dir():
        return f"{root} is no directory" if root.exists() else f"{root} does not exist"
    return f"{root} holds {some(sorted(entry.name for entry in root.iterdir()))}"


def some(names: list[str], most: int = 4) -> str:
    """Return the first of some names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
