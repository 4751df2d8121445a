"""Open the images below ``dataset.root``, whatever layout they are in: class folders, archives, shards, parquet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.config.groups import KNOWN_BY_DIGEST, DatasetConfig
from largebatch.data import archives
from largebatch.data.archives import list_official, official_sources
from largebatch.data.classes import check_sets, class_names
from largebatch.data.files import Archived, Contained, Split, Tabled
from largebatch.data.folders import Survey, class_folders, flat_folder, is_flat
from largebatch.data.holdout import Part, hold_out
from largebatch.data.huggingface import open_huggingface
from largebatch.data.identity import Identity, identity_of_files
from largebatch.data.index import Indexed, indexed
from largebatch.data.listing import Listing, Table, about_left_out
from largebatch.data.parquet import list_parquet
from largebatch.data.recognise import FOLDERS, KEYS, KNOWN, OFFICIAL, PARQUET, SHARDS, Layout, given_root, recognise
from largebatch.data.shards import list_shards


@dataclass(frozen=True)
class Opened:
    """Both splits.

    Attributes:
        train: Training images.
        val: Validation images.
        line: For people: what they were found in, and what was left out.
        whole: Both splits before any image is held out.
        named: Whether the classes have names, and are not only numbered.
        problem: What kept an index from being written.
        unreadable: Directories that were left out because they cannot be read, a line each.
        archives: The official archives in ``dataset.root``.
    """

    train: Split
    val: Split
    line: str
    whole: tuple[Split, Split]
    named: bool
    problem: str = ""
    unreadable: tuple[str, ...] = ()
    archives: tuple[Path, ...] = ()

    def identity(self) -> Identity:
        """Return what the data are, before any image is held out."""
        return identity_of_files(*self.whole, self.named)


def open_splits(config: DatasetConfig, anew: bool = False, tolerant: bool = False) -> Opened:
    """Open the images of ``dataset=imagenet`` or ``imagefolder``, whatever layout they are in.

    Args:
        config: Which set, where, and how many images and classes it must have.
        anew: Whether to index archives again even where the index holds.
        tolerant: Whether directories that cannot be read are left out and named in ``unreadable``.

    Raises:
        UserError: no root; see :func:`recognise`; a class without images, classes that differ between the two
            splits, or (``imagenet``) other than its 1000 synsets; archives that are damaged.
    """
    if config.source == "huggingface":
        return _of_huggingface(config)
    root = given_root(config)
    if root is None:
        raise UserError(f"dataset={config.name} needs dataset.root (or $LARGEBATCH_DATA): a directory with {KNOWN}.")
    layout = recognise(root, config)
    survey = Survey(tolerant)
    try:
        if layout.name == FOLDERS:
            named = True
            train: Split = class_folders(layout.root / "train", survey)
            val: Split = _validation_folder(layout, train.classes, survey)
            line = problem = ""
        else:
            train, val, index = _contained(config, layout, anew)
            named = bool(index.listing.classes) or config.name == "imagenet"
            line, problem = _about(index), index.problem
            survey.left_out.update(index.listing.left_out)
    except OSError as error:
        raise UserError(f"dataset={config.name}: {error.filename} cannot be read: {error.strerror}.") from None
    line += about_left_out(survey.left_out) + _about_beside(layout)
    check_sets(config, str(layout), train, val, bool(survey.unreadable))
    line, whole = f"dataset={config.name}: {layout}, {len(train):,} + {len(val):,} images{line}", (train, val)
    train, val, held = _held_out(config, train, val)
    line += held
    official = [root / name for name in (archives.TRAIN, archives.VAL, f"{archives.DEVKIT}.tar.gz")]
    present = tuple(path for path in official if path.is_file())
    return Opened(train, val, line, whole, named, problem, tuple(survey.unreadable), present)


def _held_out(config: DatasetConfig, train: Split, val: Split) -> tuple[Split, Split, str]:
    """Return both splits with the images that are held out in place of the validation images, and words for it."""
    if not config.holdout:
        return train, val, ""
    kept, held = hold_out(len(train), config.holdout, config.holdout_seed)
    words = f"; validated on {len(held):,} of the training images, which are not trained on"
    return Part.of(train, kept), Part.of(train, held), words


def _of_huggingface(config: DatasetConfig) -> Opened:
    first, second, named = open_huggingface(config)
    train, val, held = _held_out(config, first, second)
    where = config.root or f"{config.name} at the hub"
    line = f"dataset=huggingface: {where}, {len(first):,} + {len(second):,} images{held}"
    return Opened(train, val, line, (first, second), named)


def with_digest(config: DatasetConfig) -> DatasetConfig:
    """Return the configuration with the digest of its images, where that is part of the experiment and not given yet.

    Raises:
        UserError: see :func:`open_splits`.
    """
    if config.name not in KNOWN_BY_DIGEST or config.digest is not None:
        return config
    return replace(config, digest=open_splits(config).identity().digest)


def _validation_folder(layout: Layout, classes: list[str], survey: Survey) -> Split:
    val = layout.root / "val"
    return flat_folder(val, classes, survey) if is_flat(val) else class_folders(val, survey)


def _about_beside(layout: Layout) -> str:
    keys = [f"dataset.layout={key}" for key, name in KEYS.items() if name in layout.beside]
    return f"; {' and '.join(layout.beside)} in the same place are not read ({' or '.join(keys)} does)" if keys else ""


def _contained(config: DatasetConfig, layout: Layout, anew: bool) -> tuple[Split, Split, Indexed]:
    sources = official_sources(layout.root) if layout.name == OFFICIAL else [*chain(*layout.files.values())]
    scan: dict[str, Callable[[], Listing]] = {
        OFFICIAL: lambda: list_official(layout.root),
        SHARDS: lambda: list_shards(layout.files),
        PARQUET: lambda: list_parquet(layout.files),
    }
    index = indexed(layout.root, layout.name, sources, scan[layout.name], anew)
    listing = index.listing
    classes = listing.classes if layout.name == OFFICIAL else class_names(config, str(layout), listing)
    kind: type[Archived] | type[Tabled] = Tabled if layout.name == PARQUET else Archived
    train, val = (_split(kind, table, classes, listing) for table in (listing.train, listing.val))
    return train, val, index


def _split(kind: type[Archived] | type[Tabled], table: Table, classes: list[str], listing: Listing) -> Contained:
    return kind(table.labels, table.names, classes, listing.containers, table.files, table.places, table.sizes)


def _about(index: Indexed) -> str:
    if index.path is None:
        return f"; the index could not be kept ({index.problem}), and is made again at every start"
    return f"; {'indexed in' if index.fresh else 'index'} {index.path}"
