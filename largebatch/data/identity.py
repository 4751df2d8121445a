"""The identity of a data set: a digest of classes, labels, keys and sizes, and the first difference between two sets.

Two sets with one digest give the same samples in the same order. A key is the image's name as all layouts have it:
without folders and ending, without the synset that some copies of ImageNet repeat, and with the class before it where
the classes have names. So the digest is the same for one set in class folders, archives, shards and parquet files, and
wherever its root is.

Each split is also hashed in blocks, up to 1024, so that a difference can be located in what a checkpoint keeps of it. A
set of up to 1024 images has a block for each of them. Of files, the contents of eight images of each split are part of
the digest: two folders may agree in all names and sizes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable
from largebatch.data.files import Names, Split
from largebatch.data.listing import SPLITS, order_key

BLOCKS = 1024
SAMPLES = 8
_SHORT = 8  # hexadecimal digits of a block's hash; the digest takes the whole hash
_PARTS = ("labels", "keys", "sizes")


@dataclass(frozen=True)
class SplitIdentity:
    """One split: the number of its images, and short hashes.

    ``labels``, ``keys`` and ``sizes`` have a hash for each block, ``contents`` one for each of the images at
    :func:`sampled`.
    """

    images: int
    labels: str
    keys: str
    sizes: str
    contents: str

    def block(self, number: int, part: str) -> str:
        """Return the hash of one part of a block; empty where there is no such block."""
        text: str = getattr(self, part)
        return text[number * _SHORT : (number + 1) * _SHORT]


@dataclass(frozen=True)
class Place:
    """First difference of two sets: the split, the part (labels, keys, sizes), and the images first … last."""

    split: str
    part: str
    first: int
    last: int

    def words(self, here: str, counts: str) -> str:
        """Return the difference in words.

        Args:
            here: What the first of the images is.
            counts: The numbers of images, where these differ, after a semicolon.
        """
        if self.first == self.last:
            return f"{self.split} image {self.first:,} is {here}, and the {self.part} differ{counts}"
        images = f"{self.split} images {self.first:,} … {self.last:,}"
        return f"the {self.part} of the {images} differ, of which the first is {here}{counts}"


@dataclass(frozen=True)
class Identity:
    """Identity of a data set.

    Attributes:
        digest: 32 hexadecimal digits; equal for equal sets.
        classes: Their names by label; empty where the data only number them.
        train: Of the training images.
        val: Of the validation images.
        describe: Returns what is known of one image, by split and index, for people; empty where nothing is.
    """

    digest: str
    classes: tuple[str, ...]
    train: SplitIdentity
    val: SplitIdentity
    describe: Callable[[str, int], str] = field(default=lambda split, index: "", compare=False, repr=False)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, as :meth:`from_mapping` takes them."""
        values = {"digest": self.digest, "classes": list(self.classes)}
        return values | {split: asdict(getattr(self, split)) for split in SPLITS}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Identity:
        """Build one from what a checkpoint or a record has kept.

        Raises:
            KeyError, TypeError: they are not what :meth:`to_mapping` returns.
        """
        train, val = (SplitIdentity(**values[split]) for split in SPLITS)
        return cls(str(values["digest"]), tuple(values["classes"]), train, val)

    def class_difference(self, now: Identity, before: str = "before", after: str = "now") -> str:
        """Return the first class in which another set differs, in words; empty where none does.

        Args:
            now: The other set.
            before: What words call this set.
            after: What they call the other one.
        """
        if not (self.classes and now.classes) or self.classes == now.classes:
            return ""
        for label, (old, new) in enumerate(zip(self.classes, now.classes, strict=False)):
            if old != new:
                return f"class {label} is '{printable(new)}' {after} and '{printable(old)}' {before}"
        return f"{len(now.classes)} classes {after} and {len(self.classes)} {before}"

    def place_of_difference(self, now: Identity) -> Place | None:
        """Return where another set differs first, None where their images are the same."""
        for split in SPLITS:
            old, new = getattr(self, split), getattr(now, split)
            step = max(block_size(old.images), block_size(new.images))
            if block_size(old.images) != block_size(new.images):
                return Place(split, "keys", 0, max(old.images, new.images) - 1)
            for number in range(-(-max(old.images, new.images) // step)):
                for part in _PARTS:
                    if old.block(number, part) != new.block(number, part):
                        start = number * step
                        return Place(split, part, start, min(start + step, max(old.images, new.images)) - 1)
            for number, row in enumerate(sampled(new.images)):
                if old.block(number, "contents") != new.block(number, "contents"):
                    return Place(split, "contents", row, row)
        return None

    def difference(self, now: Identity) -> str:
        """Return the first difference of the set as it is ``now`` from this one, in words; empty where there is none.

        The first class, label or key that differs is named, as far as the blocks allow, and the numbers of images where
        these differ.
        """
        if self.digest == now.digest:
            return ""
        if names := self.class_difference(now):
            return names
        place = self.place_of_difference(now)
        if place is None:
            return "their digests differ"
        old, new = (getattr(one, place.split).images for one in (self, now))
        counts = f"; there are {new:,} {place.split} images now and were {old:,}" if old != new else ""
        known = now.describe(place.split, place.first) if place.first < new else "no longer there"
        return place.words(f"{known or 'another one'} now", counts)


def block_size(images: int) -> int:
    """Return how many images a block has."""
    return max(1, -(-images // BLOCKS))


def sampled(images: int) -> list[int]:
    """Return the indices of the images whose contents are part of the digest, far apart."""
    return sorted({at * (images - 1) // (SAMPLES - 1) for at in range(SAMPLES)}) if images else []


def identity_of(
    classes: Sequence[str],
    train: tuple[SplitIdentity, str],
    val: tuple[SplitIdentity, str],
    describe: Callable[[str, int], str] | None = None,
) -> Identity:
    """Put a set's identity together.

    Args:
        classes: Their names by label; empty where they have none.
        train: Of the training images, from :func:`hashed_split`.
        val: Of the validation images.
        describe: Describes an image by split and index.
    """
    digest = hashlib.sha256(f"{train[1]} {val[1]}".encode()).hexdigest()[:32]
    identity = Identity(digest, tuple(classes), train[0], val[0])
    return identity if describe is None else Identity(digest, tuple(classes), train[0], val[0], describe)


def hashed_split(
    labels: NDArray[Any],
    content: Callable[[slice], bytes],
    sizes: NDArray[np.int64] | None = None,
    read: Callable[[int], bytes] | None = None,
) -> tuple[SplitIdentity, str]:
    """Hash a split block by block.

    Args:
        labels: Whole numbers (N,), in the order of the samples.
        content: Returns what tells the images of a slice from others: their keys, or their pixels.
        sizes: Bytes of each image (N,), where these are known without reading it.
        read: Returns the bytes of one image, of which a few are read.

    Returns:
        The short hashes, and the digest of the split.
    """
    count, step = len(labels), block_size(len(labels))
    numbers = np.ascontiguousarray(labels, dtype="<i4")
    lengths = None if sizes is None else np.ascontiguousarray(sizes, dtype="<i8")
    whole, short = hashlib.sha256(f"{count} images".encode()), dict[str, list[str]]((part, []) for part in _PARTS)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        parts = (numbers[rows].tobytes(), content(rows), b"" if lengths is None else lengths[rows].tobytes())
        for name, part in zip(_PARTS, parts, strict=True):
            found = hashlib.sha256(part)
            whole.update(found.digest())
            short[name].append(found.hexdigest()[:_SHORT])
    if lengths is None:
        short["sizes"] = []
    some = [hashlib.sha256(read(row)) for row in sampled(count)] if read else []
    whole.update(b"".join(one.digest() for one in some))
    contents = "".join(one.hexdigest()[:_SHORT] for one in some)
    labels_of, keys, lengths_of = ("".join(short[name]) for name in _PARTS)
    return SplitIdentity(count, labels_of, keys, lengths_of, contents), whole.hexdigest()


def keys_of(names: Names, labels: NDArray[np.int32], classes: Sequence[str]) -> list[bytes]:
    """Return the key of every image: its name without folders, ending and repeated synset, after its class's name.

    Args:
        names: File names.
        labels: int32 (N,).
        classes: Names of the classes; empty where the data only number them, and no class is put before a key.
    """
    text, ends = names.text.tobytes(), names.ends.tolist()
    before = [os.fsencode(name) + b"_" for name in classes]
    keys, start = list[bytes](), 0
    for end, label in zip(ends, labels.tolist(), strict=True):
        name = text[start:end].rpartition(b"/")[2]
        start = end
        stem = order_key(name) if b"_n" in name else name
        stem = stem.rpartition(b".")[0] or stem
        if before and not stem.startswith(before[label]):
            stem = before[label] + stem
        keys.append(stem)
    return keys


def identity_of_files(train: Split, val: Split, named: bool) -> Identity:
    """Return the identity of a set of encoded images, from names, sizes and the contents of a few of them.

    Args:
        train: Training images.
        val: Validation images.
        named: Whether the classes have names, and are not only numbered.
    """
    classes = train.classes if named else []
    splits = {"train": train, "val": val}

    def hashed(split: Split) -> tuple[SplitIdentity, str]:
        keys = keys_of(split.names, split.labels, classes)

        def read(row: int) -> bytes:
            try:
                return split.read(row)
            except (OSError, UserError):  # whoever decodes it says what is wrong
                return b""

        return hashed_split(split.labels, lambda rows: b"\0".join(keys[rows]), split.sizes(), read)

    def describe(name: str, index: int) -> str:
        split = splits[name]
        label = int(split.labels[index])
        key = keys_of(Names.of([os.fsencode(split.names[index])]), split.labels[[index]], classes)
        size = int(split.sizes([index])[0])
        shown = printable(os.fsdecode(key[0]))
        return f"'{shown}' (label {label}, class '{printable(split.classes[label])}', {size:,} bytes)"

    return identity_of(classes, hashed(train), hashed(val), describe)


def identity_in_memory(train: tuple[NDArray[Any], NDArray[Any]], val: tuple[NDArray[Any], NDArray[Any]]) -> Identity:
    """Return the identity of a set held in memory, from its pixels.

    Args:
        train: Images uint8 (N, C, H, W) and labels (N,).
        val: Likewise.
    """
    labels_of = {"train": train[1], "val": val[1]}

    def hashed(images: NDArray[Any], labels: NDArray[Any]) -> tuple[SplitIdentity, str]:
        whole = np.ascontiguousarray(images)
        return hashed_split(labels, lambda rows: whole[rows].tobytes())

    def describe(name: str, index: int) -> str:
        return f"one with label {int(labels_of[name][index])}"

    first = hashed(*train)
    return identity_of((), first, first if val is train else hashed(*val), describe)
