"""Recognise which of ImageNet's layouts lies below ``dataset.root``: class folders, archives, shards or parquet."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import archives
from largebatch.data.folders import SOLUTION, Survey, kaggle_folder, some
from largebatch.data.listing import SPLITS

FOLDERS, OFFICIAL, SHARDS, PARQUET = "class folders", "the official archives", "shards", "parquet files"
KEYS = {"folders": FOLDERS, "archives": OFFICIAL, "shards": SHARDS, "parquet": PARQUET}  # of dataset.layout
KNOWN = (
    f"{FOLDERS} (train/ and val/, each with one folder of images a class, or Kaggle's ILSVRC/ with {SOLUTION}), "
    f"{OFFICIAL} ({archives.TRAIN}, {archives.VAL} and {archives.DEVKIT}.tar.gz), WebDataset's {SHARDS} (.tar with "
    f".jpg and .cls) and Hugging Face's {PARQUET}, both with train or val in their names"
)
_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test)(?![a-z])")
_OFFICIAL_FILE = re.compile(r"ILSVRC2012_(img|bbox|devkit)_.*")  # some of which are for other tasks
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# The number of a part: train-00000-of-00294-a9b7, imagenet1k-train-0001
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?:-of-(?P<total>\d+).*|(?P<after>\D*))")


@dataclass(frozen=True)
class Layout:
    """Layout that was recognised in a directory.

    Attributes:
        name: One of the names above.
        root: Where it lies: for class folders the directory of train/ and val/.
        files: The shards or parquet files of every split.
        beside: Other layouts in the same directory, which are not read.
    """

    name: str
    root: Path
    files: dict[str, list[Path]]
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} in {self.root}"


def given_root(config: DatasetConfig) -> Path | None:
    """Return ``dataset.root``, or $LARGEBATCH_DATA where it is not set."""
    root = config.root or os.environ.get("LARGEBATCH_DATA")
    return Path(root).expanduser() if root else None


def recognise(root: Path, config: DatasetConfig) -> Layout:
    """Find out by names alone which layout lies in a directory.

    Raises:
        UserError: none of them or not that of ``dataset.layout``, several, one without its train or val or with a gap
            in its numbers, or the directory cannot be read.
    """
    about = f"dataset={config.name}: "
    try:
        found = list(_candidates(root))
        if not found:
            raise UserError(f"{about}no images in {root}; {holds(root)}. dataset.root must hold {KNOWN}.")
        layout = _chosen(root, found, config.layout)
        if layout.name == FOLDERS:
            _check_folders(layout)
    except OSError as error:
        raise UserError(f"{about}{error.filename} cannot be read: {error.strerror}.") from None
    for split in SPLITS:
        if layout.name in (SHARDS, PARQUET):
            _check_files(layout, split)
    return layout


def _chosen(root: Path, found: list[Layout], key: str) -> Layout:
    names = [layout.name for layout in found]
    if key != "auto":
        if KEYS[key] not in names:
            raise UserError(f"dataset.layout={key}: {root} holds {' and '.join(names)}, but no {KEYS[key]}.")
        return found[names.index(KEYS[key])]
    if len(found) > 1 and names != [FOLDERS, OFFICIAL]:
        keys = " or ".join(f"dataset.layout={key}" for key, name in KEYS.items() if name in names)
        raise UserError(f"{root} holds {' and '.join(names)}, and which is meant is not known: choose it by {keys}.")
    return replace(found[0], beside=tuple(names[1:]))  # torchvision's ImageNet unpacks archives beside themselves


def _check_folders(layout: Layout) -> None:
    for split in SPLITS:
        if not (layout.root / split).is_dir():
            raise UserError(
                f"no directory {layout.root / split}. {layout.root} holds class folders: it must have train/ and val/, "
                f"each with one folder of images a class; {holds(layout.root)}."
            )


def _check_files(layout: Layout, split: str) -> None:
    """Refuse shards or parquet files that lack a split or some of its parts, or have a part twice."""
    files = layout.files[split]
    if not files:
        raise UserError(
            f"{layout.root} holds {layout.name}, but none of {split}: the split is read from the name of a file, such "
            f"as {split}-0000, or of its directory, {layout.root / split}."
        )
    for name, count in Counter(path.name for path in files).items():
        if count > 1:
            both = " and ".join(str(path.parent) for path in files if path.name == name)
            raise UserError(f"{name} is in {both}: its images would count twice. Remove one of them.")
    series = defaultdict[tuple[Path, str, str | None, str | None], dict[int, Path]](dict)
    for path in files:
        part = _NUMBERED.fullmatch(path.stem)
        if part:
            series[path.parent, part["before"], part["total"], part["after"]][int(part["number"])] = path
    for (_, _, total, _), numbered in series.items():
        _check_numbers(layout, numbered, None if total is None else int(total))


def _check_numbers(layout: Layout, numbered: dict[int, Path], total: int | None) -> None:
    """Refuse gaps: parts are numbered from 0 or 1, up to the total that their names may have."""
    if total is None and len(numbered) == 1:
        return  # a number that may mean anything
    first = 0 if min(numbered) != 1 else 1
    last = max(numbered) if total is None else total - 1 + first
    missing = [number for number in range(first, min(last + 1, first + 10**6)) if number not in numbered]
    if missing:
        one = next(iter(numbered.values()))
        raise UserError(
            f"{one.parent} holds {len(numbered):,} {layout.name} such as {one.name}, but of the numbers {first} … "
            f"{last} these are missing: {some([str(number) for number in missing])}. Complete the copy."
        )


def _candidates(root: Path) -> Iterator[Layout]:
    if not root.is_dir():
        return
    folders = root if _holds_classes(root) else kaggle_folder(root)
    if folders is not None:
        yield Layout(FOLDERS, folders, {})
    if (root / archives.TRAIN).exists() or (root / archives.VAL).exists():
        yield Layout(OFFICIAL, root, {})
    for name, suffix in ((SHARDS, ".tar"), (PARQUET, ".parquet")):
        files = _by_split(root, suffix)
        if any(files.values()):
            yield Layout(name, root, files)


def _holds_classes(root: Path) -> bool:
    survey = Survey(tolerant=False)
    splits = [root / split for split in SPLITS if (root / split).is_dir()]
    return any(entry.is_dir() for split in splits for entry in survey.entries(split))


def _by_split(root: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the files of every split, sorted: by the word in a file's name, else in its directory's.

    Raises:
        UserError: one of them is compressed, which would leave it out without a word.
    """
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    survey = Survey(tolerant=False)
    for folder in (root, *(root / name for name in ("data", "train", "val", "valid", "validation"))):
        if not folder.is_dir():
            continue
        for path in sorted(Path(entry.path) for entry in survey.entries(folder)):
            compressed = suffix == ".tar" and path.name.endswith(_COMPRESSED)
            if _OFFICIAL_FILE.fullmatch(path.name) or not (compressed or path.name.endswith(suffix)):
                continue
            words = _SPLIT.search(path.name.lower()) or (folder != root and _SPLIT.search(folder.name))
            if words and words[1] != "test":
                if compressed:
                    raise UserError(
                        f"{path} is compressed, and images are read from shards in place: unpack it to .tar."
                    )
                files["train" if words[1].startswith("train") else "val"].append(path)
    return files


def holds(root: Path) -> str:
    """Say what a directory holds."""
    if not root.is_dir():
        return f"{root} is no directory" if root.exists() else f"{root} does not exist"
    return f"{root} holds {some(sorted(entry.name for entry in root.iterdir()))}"
