"""ImageNet in tar archives that stay packed: the official ones, and WebDataset's shards."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from largebatch.base.errors import UserError
from largebatch.data.files import Container
from largebatch.data.listing import IMAGE_SUFFIXES, SPLITS, Listing, Rows, scanned
from largebatch.data.tar import Member, Read, members, shown

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_LARGEST_DEVKIT = 2**28  # bytes when unpacked; ImageNet's has a few million
_LONGEST_LABEL = 32  # bytes of a .cls


class _Region(NamedTuple):
    """An archive within bytes of a container: what it is called, and its class or -1."""

    file: int
    start: int
    stop: int
    name: str
    label: int


@contextmanager
def _reading(path: str) -> Iterator[Read]:
    """Give a function that reads a file at a place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):  # else the kernel reads what lies between two headers too
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield lambda offset, size: os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def official_sources(root: Path) -> list[Path]:
    """Return the files that the official layout consists of: two archives, then one or two of the devkit.

    Raises:
        UserError: one is missing.
    """
    folders = (root, root / "data", root / DEVKIT, root / DEVKIT / "data")
    unpacked = next((folder for folder in folders if (folder / _TRUTH).is_file() and (folder / _META).is_file()), None)
    devkit = [unpacked / _TRUTH, unpacked / _META] if unpacked else [root / f"{DEVKIT}.tar.gz"]
    missing = [str(path) for path in (root / TRAIN, root / VAL, *devkit) if not path.is_file()]
    if missing:
        raise UserError(
            f"{root} holds ImageNet's official archives, but {' and '.join(missing)} is missing: training takes "
            f"{TRAIN}, validation {VAL} and, for its labels, {DEVKIT}.tar.gz (or {_TRUTH} and {_META} "
            "unpacked from it)."
        )
    return [root / TRAIN, root / VAL, *devkit]


def list_official(root: Path) -> Listing:
    """List the official archives: one tar of a tar a class, one tar of validation images, and their labels."""
    train, val, *devkit = official_sources(root)
    containers = [Container.at(path) for path in (train, val)]
    with _reading(str(train)) as read:
        inner = list(members(read, 0, containers[0].bytes, str(train)))
    for member in inner:
        if not member.name.endswith(".tar") or "/" in member.name:
            raise UserError(
                f"{train} holds '{shown(member.name)}' at byte {member.offset:,}: only a .tar a class is known."
            )
    inner.sort(key=lambda member: member.name.removesuffix(".tar"))  # as the names of folders are
    classes = [member.name.removesuffix(".tar") for member in inner]
    if twice := {name for name, following in pairwise(classes) if name == following}:
        raise UserError(f"{train} holds '{shown(twice.pop())}.tar' twice: fetch it again.")
    regions = [
        _Region(0, member.offset, member.offset + member.size, f"{train}, in {shown(member.name)},", label)
        for label, member in enumerate(inner)
    ]
    rows = {split: Rows() for split in SPLITS}
    for found in scanned(functools.partial(_scan_class, containers), regions, "indexing"):
        rows["train"].extend(found)
    labels = _val_labels(devkit, {name: label for label, name in enumerate(classes)})
    with _reading(str(val)) as read:
        images = [one for one in members(read, 0, containers[1].bytes, str(val)) if _is_image(one.name)]
    if len(images) != len(labels):
        raise UserError(f"{val} holds {len(images):,} images, and the devkit {len(labels):,} labels: fetch them again.")
    for image, label in zip(sorted(images), labels, strict=True):  # the labels follow the numbers in the names
        rows["val"].add(label, image.name, 1, (image.offset, image.size))
    return Listing(containers, classes, rows["train"].table(), rows["val"].table())


def _scan_class(containers: Sequence[Container], region: _Region) -> Rows:
    rows = Rows()
    with _reading(containers[region.file].path) as read:
        for member in members(read, region.start, region.stop, region.name):
            if _is_image(member.name):
                rows.add(region.label, member.name, region.file, (member.offset, member.size))
    return rows


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _val_labels(devkit: list[Path], label_of: dict[str, int]) -> list[int]:
    """Return the class of every validation image, from the devkit's numbers and the synsets that they stand for."""
    truth, meta = ([path.read_bytes() for path in devkit]) if len(devkit) == 2 else _unpacked(devkit[0])
    where = devkit[0].parent if len(devkit) == 2 else devkit[0]
    try:
        synset_of = _synsets(meta)
        synsets = [synset_of[int(number)] for number in truth.split()]
    except (ValueError, KeyError, TypeError, IndexError, OSError, NotImplementedError) as error:
        raise UserError(f"{where}: {_TRUTH} and {_META} cannot be read ({error!r}): fetch the devkit again.") from None
    unknown = sorted(set(synsets) - label_of.keys())
    if unknown:
        raise UserError(f"{where} speaks of the class {unknown[0]}, of which {TRAIN} has no images: fetch both again.")
    return [label_of[synset] for synset in synsets]


def _synsets(meta: bytes) -> dict[int, str]:
    """Read meta.mat: the synset of every number, for those at the bottom of the hierarchy."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        table = loadmat(BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
    except (MatReadError, zlib.error) as error:
        raise ValueError(str(error)) from None
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table.reshape(-1) if not row["num_children"]}


def _unpacked(devkit: Path) -> tuple[bytes, bytes]:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(devkit.read_bytes(), _LARGEST_DEVKIT)
    except zlib.error as error:
        raise UserError(f"{devkit} cannot be unpacked: {error}. Fetch it again.") from None
    if not unpacker.eof:
        raise UserError(f"{devkit} is cut short, or larger than {_LARGEST_DEVKIT:,} bytes when unpacked.")
    found = {
        Path(member.name).name: data[member.offset : member.offset + member.size]
        for member in members(lambda offset, size: data[offset : offset + size], 0, len(data), str(devkit))
    }
    if not found.keys() >= {_TRUTH, _META}:
        raise UserError(f"{devkit} lacks {_TRUTH} or {_META}: fetch it again.")
    return found[_TRUTH], found[_META]


def list_shards(shards: dict[str, list[Path]]) -> Listing:
    """List WebDataset's shards: an image and a .cls with its class for every key."""
    containers: list[Container] = []
    tables = {}
    for split in SPLITS:
        first = len(containers)
        containers += [Container.at(path) for path in shards[split]]
        parts = [(number, containers[number]) for number in range(first, len(containers))]
        rows = Rows()
        for found in scanned(_scan_shard, parts, f"indexing {split}"):
            rows.extend(found)
        tables[split] = rows.table()
    return Listing(containers, [], tables["train"], tables["val"])


def _scan_shard(part: tuple[int, Container]) -> Rows:
    number, shard = part
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with _reading(shard.path) as read:
        for member in members(read, 0, shard.bytes, shard.path):
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")  # as WebDataset cuts it: at the first dot
            key = folder + slash + key
            if _is_image(f".{suffix}") and "." not in suffix:
                if key in images:
                    raise UserError(
                        f"{shard.path} holds two images of the key '{shown(key)}', at byte {member.offset:,}."
                    )
                images[key] = member
            elif suffix == "cls":
                labels[key] = _class(read(member.offset, min(member.size, _LONGEST_LABEL)), member, shard.path)
    rows = Rows()
    for key, member in images.items():
        if key not in labels:
            raise UserError(
                f"{shard.path} holds '{shown(member.name)}' at byte {member.offset:,} without '{shown(key)}.cls', the "
                "number of its class: shards take an image and a .cls a key."
            )
        rows.add(labels[key], member.name, number, (member.offset, member.size))
    return rows


def _class(text: bytes, member: Member, shard: str) -> int:
    if not text.strip().isdigit():
        raise UserError(
            f"{shard}: '{shown(member.name)}' at byte {member.offset:,} does not hold the number of a class."
        )
    return int(text)
