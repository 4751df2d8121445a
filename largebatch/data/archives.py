"""ImageNet in its official tar archives, which stay packed."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from largebatch.base.errors import UserError
from largebatch.data.files import Container
from largebatch.data.listing import SPLITS, Listing, Rows, is_hidden, is_image, scanned
from largebatch.data.tar import Member, Read, members, shown

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_LARGEST_DEVKIT = 2**28  # bytes when unpacked; ImageNet's has a few million


class _Region(NamedTuple):
    """An archive within bytes of a container: what it is called, and its class or -1."""

    file: int
    start: int
    stop: int
    name: str
    label: int


@contextmanager
def reading(path: str) -> Iterator[Read]:
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
            f"{root} has ImageNet's official archives, but {' and '.join(missing)} is missing: training takes "
            f"{TRAIN}, validation {VAL} and, for its labels, {DEVKIT}.tar.gz (or {_TRUTH} and {_META} "
            "unpacked from it)."
        )
    return [root / TRAIN, root / VAL, *devkit]


def list_official(root: Path) -> Listing:
    """List the official archives: one tar of a tar a class, one tar of validation images, and their labels."""
    train, val, *devkit = official_sources(root)
    containers = [Container.at(path) for path in (train, val)]
    rows = {split: Rows() for split in SPLITS}
    with reading(str(train)) as read:
        inner = _used(
            members(read, 0, containers[0].bytes, str(train)), rows["train"], lambda name: not is_hidden(name)
        )
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
    for found in scanned(functools.partial(_scan_class, containers), regions, "indexing"):
        rows["train"].extend(found)
    labels = _val_labels(devkit, {name: label for label, name in enumerate(classes)})
    with reading(str(val)) as read:
        images = _used(members(read, 0, containers[1].bytes, str(val)), rows["val"], is_image)
    if len(images) != len(labels):
        raise UserError(f"{val} holds {len(images):,} images, and the devkit {len(labels):,} labels: fetch them again.")
    for image, label in zip(sorted(images), labels, strict=True):  # the labels follow the numbers in the names
        rows["val"].add(label, image.name, 1, (image.offset, image.size), image.size)
    left_out = rows["train"].left_out + rows["val"].left_out
    return Listing(containers, classes, rows["train"].table(), rows["val"].table(), left_out)


def _scan_class(containers: Sequence[Container], region: _Region) -> Rows:
    rows = Rows()
    with reading(containers[region.file].path) as read:
        for member in _used(members(read, region.start, region.stop, region.name), rows, is_image):
            rows.add(region.label, member.name, region.file, (member.offset, member.size), member.size)
    return rows


def _used(found: Iterable[Member], rows: Rows, wanted: Callable[[str], bool]) -> list[Member]:
    """Return the regular files whose names are wanted; what else there is, is counted in ``rows``."""
    used = []
    for member in found:
        if member.regular and wanted(member.name) and not is_hidden(member.name):
            used.append(member)
        else:
            rows.leave_out(member.name)
    return used


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
