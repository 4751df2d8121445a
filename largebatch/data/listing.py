"""List the images of both splits, in one order for every layout."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from largebatch.base.errors import UserError
from largebatch.data.files import Container, Names
from largebatch.data.tar import shown

T = TypeVar("T")
R = TypeVar("R")

SPLITS = ("train", "val")
# Of the formats that are decoded (decode.FORMATS), in any case.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".avif", ".jp2"),
)
HIDDEN = "hidden files and system folders"
# What macOS, Windows, file systems and network drives leave behind, besides names that begin with a dot.
_SYSTEM = {"lost+found", "@eadir", "#recycle", "$recycle.bin", "__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}
_LONGEST_NAME = 255  # bytes, as in a directory
_LARGEST_LABEL = 2**20
_SCANS = 16  # at once: over a network a scan mostly waits
# Some copies of ImageNet repeat the synset, as in n01440764_10026_n01440764.JPEG.
_REPEATED_SYNSET = re.compile(rb"_n\d{8}(?=\.[^.]*$)")


def is_image(name: str) -> bool:
    """Whether a name has the ending of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(path: str) -> bool:
    """Whether a path's last name, or that of one of its folders, is what systems leave behind: never an image."""
    names = path.rstrip("/").split("/")
    return any((name[:1] == "." and name.strip(".") != "") or name.lower() in _SYSTEM for name in names)


def kind_left_out(path: str) -> str:
    """Return what a file that is not read is counted as: its ending, such as .txt, or ``HIDDEN``."""
    if is_hidden(path):
        return HIDDEN
    _, dot, ending = path.rpartition("/")[2].rpartition(".")
    return shown(dot + ending.lower()) if dot and ending else "without an ending"


def about_left_out(counts: Counter[str]) -> str:
    """Return a clause on the files that were left out, for the line about a data set; empty where there are none."""
    others = Counter({kind: count for kind, count in counts.items() if kind != HIDDEN})
    parts = [f"{counts[HIDDEN]:,} {HIDDEN}"] if counts[HIDDEN] else []
    if others:
        most = [f"{count:,} {kind}" for kind, count in others.most_common(5)]
        more = others.total() - sum(count for _, count in others.most_common(5))
        parts.append(
            f"{others.total():,} files that are no images ({', '.join(most + [f'{more:,} others'] * (more > 0))})"
        )
    return f"; left out: {' and '.join(parts)}" if parts else ""


def order_key(name: bytes) -> bytes:
    """Return what an image is sorted by within its class."""
    return _REPEATED_SYNSET.sub(b"", name)


class Rows:
    """Images as they are found, in any order."""

    def __init__(self) -> None:
        self.labels, self.files, self.places, self.sizes = array("i"), array("i"), array("q"), array("q")
        self.names: list[bytes] = []
        self.left_out = Counter[str]()

    def leave_out(self, path: str) -> None:
        """Count a file that is not read."""
        self.left_out[kind_left_out(path)] += 1

    def add(self, label: int, name: str, file: int, place: tuple[int, int], size: int) -> None:
        """Add an image: class, file name, number of its container, where in it, and its bytes."""
        encoded = name.rpartition("/")[2].encode(errors="surrogateescape")
        if len(encoded) > _LONGEST_NAME:
            raise UserError(f"'{shown(name)}' has a name of {len(encoded)} bytes: {_LONGEST_NAME} are allowed.")
        if not 0 <= label < _LARGEST_LABEL:
            raise UserError(f"'{shown(name)}' is of class {label}: classes are 0 … {_LARGEST_LABEL - 1:,}.")
        self.labels.append(label)
        self.files.append(file)
        self.places.extend(place)
        self.sizes.append(size)
        self.names.append(encoded)

    def extend(self, other: Rows) -> None:
        """Add all of another's images."""
        self.labels.extend(other.labels)
        self.files.extend(other.files)
        self.places.extend(other.places)
        self.sizes.extend(other.sizes)
        self.names += other.names
        self.left_out += other.left_out

    def table(self) -> Table:
        """Put the images into their order."""
        labels, files = (np.frombuffer(values, dtype=np.int32) for values in (self.labels, self.files))
        places = np.frombuffer(self.places, dtype=np.int64).reshape(-1, 2)
        sizes = np.frombuffer(self.sizes, dtype=np.int64)
        keys = np.array([order_key(name) for name in self.names], dtype=np.bytes_)
        order = np.lexsort((places[:, 1], places[:, 0], files, keys, labels))
        names = Names.of(self.names[at] for at in order)
        return Table(labels[order], files[order], places[order], sizes[order], names)


@dataclass(frozen=True)
class Table:
    """The images of a split by (class, file name, container, place).

    int32 (N,), int32 (N,), int64 (N, 2), int64 (N,) of bytes, N names.
    """

    labels: NDArray[np.int32]
    files: NDArray[np.int32]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: Names

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Listing:
    """Both splits of containers, as an index keeps them.

    Attributes:
        containers: What the ``files`` of both tables count.
        classes: Names by label, where the data have them.
        train: Training images.
        val: Validation images.
        left_out: How many files of each kind are not read, see :func:`kind_left_out`.
    """

    containers: Sequence[Container]
    classes: list[str]
    train: Table
    val: Table
    left_out: Counter[str]


def scanned(scan: Callable[[T], R], parts: Sequence[T], what: str) -> Iterable[R]:
    """Yield ``scan`` of every part in order, several at once, behind a progress bar on a terminal.

    The first error ends it.
    """
    with ThreadPoolExecutor(_SCANS) as pool:
        try:
            yield from tqdm(pool.map(scan, parts), desc=what, total=len(parts), unit="file", disable=None, leave=False)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
