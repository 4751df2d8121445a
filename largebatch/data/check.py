"""Looking at every image of a data set, or at some, by several processes: what is corrupt, what is there twice."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from largebatch.base.errors import Fault, UserError
from largebatch.base.outcome import printable
from largebatch.data.decode import DAMAGE, examine
from largebatch.data.decode import opened as opened_image
from largebatch.data.files import Split
from largebatch.data.layouts import Opened

R = TypeVar("R")

_PART = 64  # images that a process takes at a time
_DIGEST = 16  # bytes: of images by accident alike there are none
# Images a class of ImageNet-1k: 732 to 1300 to train on, 50 to validate with.
IMAGENET = {"train": (1_281_167, 732, 1300), "val": (50_000, 50, 50)}


@dataclass(frozen=True)
class Verdict:
    """Result of ``data verify``: one line per finding.

    Attributes:
        images: How many were read.
        corrupt: Images that cannot be decoded, and directories that cannot be read.
        suspect: Images of whose damage libjpeg warns, though they have pixels; and names that are not text.
        duplicates: Images that repeat an earlier one.
        counts: Classes and splits of the wrong size.
        archives: Official archives that are not what was published.
    """

    images: int
    corrupt: list[str]
    suspect: list[str]
    duplicates: list[str]
    counts: list[str]
    archives: list[str]


class _Finding(NamedTuple):
    """Result for one image: a digest of its bytes, empty if they cannot be read."""

    digest: bytes
    corrupt: str | None = None
    suspect: str | None = None


@dataclass(frozen=True)
class Look:
    """One image as its header describes it: format and mode, width and height in pixels, bytes."""

    kind: str
    width: int
    height: int
    size: int


def verify(opened: Opened, imagenet: bool, processes: int) -> Verdict:
    """Read and decode every image.

    Args:
        opened: Both splits.
        imagenet: Whether classes must have ImageNet-1k's sizes, and its archives their published MD5 sums.
        processes: How many decode at once.

    Raises:
        Fault: a process that decodes was killed.
        UserError: an archive changed meanwhile.
    """
    corrupt, suspect, digests = [*opened.unreadable], list[str](), list[bytes]()
    splits = (opened.train, opened.val)
    everyone = [range(len(split)) for split in splits]
    for which, start, found in _looked(_verify, splits, everyone, processes, "verifying"):
        for place, finding in enumerate(found):
            digests.append(finding.digest)
            for problem, findings in ((finding.corrupt, corrupt), (finding.suspect, suspect)):
                if problem is not None:
                    findings.append(f"{splits[which].where(start + place)}: {problem}")
    bar = tqdm(opened.archives if imagenet else (), "MD5 sums of archives", unit="archive", disable=None, leave=False)
    archives = [line for line in map(_wrong_sum, bar) if line is not None]
    counts = [*_wrong_counts("train", opened.train), *_wrong_counts("val", opened.val)] if imagenet else []
    return Verdict(len(digests), corrupt, suspect, list(_duplicates(splits, digests)), counts, archives)


def _verify(split: Split, index: int) -> _Finding:
    suspect = _odd_name(split.names[index])
    try:
        data = split.read(index)
    except UserError:
        raise
    except DAMAGE as error:
        return _Finding(b"", _said(error), suspect)
    digest = hashlib.blake2b(data, digest_size=_DIGEST).digest()
    try:
        return _Finding(digest, suspect=examine(data) or suspect)
    except DAMAGE as error:
        return _Finding(digest, _said(error), suspect)


def _said(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _odd_name(name: str) -> str | None:
    if printable(name) == name:
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, and shown with ? for each byte that is not"
    return "its name has line breaks or control characters, shown as ?"


def _wrong_sum(path: Path) -> str | None:
    """Compare an official archive with the MD5 sum that was published with it."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    published = dict(ARCHIVE_META.values())[path.name]
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if found == published else f"{path}: its MD5 sum is {found}, and {published} was published"


def _duplicates(splits: tuple[Split, Split], digests: list[bytes]) -> Iterator[str]:
    first, seen = len(splits[0]), dict[bytes, int]()
    for place, digest in enumerate(digests):
        earlier = seen.setdefault(digest, place) if digest else place
        if earlier != place:
            one, other = (splits[0].where(at) if at < first else splits[1].where(at - first) for at in (place, earlier))
            yield f"{one} repeats {other}"


def _wrong_counts(name: str, split: Split) -> Iterator[str]:
    total, least, most = IMAGENET[name]
    if len(split) != total:
        yield f"{name}: {len(split):,} images, where ImageNet-1k has {total:,}"
    for label, count in enumerate(np.bincount(split.labels, minlength=len(split.classes))):
        if not least <= count <= most:
            allowed = f"{least}" if least == most else f"{least} to {most}"
            yield f"{name}: {count:,} images of {split.classes[label]}, where ImageNet-1k's classes have {allowed}"


def look(split: Split, images: int, processes: int) -> list[Look]:
    """Read the headers of up to ``images`` of a split, evenly spread over it; what cannot be read is left out."""
    chosen = range(0, len(split), max(1, -(-len(split) // images)))
    parts = _looked(_look, (split,), [chosen], processes, "reading headers")
    return [one for _, _, found in parts for one in found if one is not None]


def _look(split: Split, index: int) -> Look | None:
    try:
        data = split.read(index)
        with opened_image(data) as image:
            return Look(f"{image.format} {image.mode}", image.width, image.height, len(data))
    except UserError:
        raise
    except DAMAGE:
        return None


def most_common(looks: list[Look]) -> list[tuple[str, int]]:
    """Return formats and modes with their numbers, the most frequent first."""
    return Counter(one.kind for one in looks).most_common()


def _looked(
    work: Callable[[Split, int], R],
    splits: tuple[Split, ...],
    chosen: list[range],
    processes: int,
    what: str,
) -> Iterator[tuple[int, int, list[R]]]:
    """Yield (split, place of the first, results) of part after part, in order."""
    parts = [
        (which, start, images[start : start + _PART])
        for which, images in enumerate(chosen)
        for start in range(0, len(images), _PART)
    ]
    bar = tqdm(total=sum(map(len, chosen)), desc=what, unit="image", disable=None, leave=False)
    # Spawned: a process that was forked beside threads of this one could wait for a lock that none of them frees.
    context = multiprocessing.get_context("spawn")
    results: Iterable[list[R]]
    with bar, ProcessPoolExecutor(processes, context, _begin, (splits,)) as pool:
        try:
            results = pool.map(partial(_part, work), [(which, images) for which, _, images in parts])
            for (which, start, images), found in zip(parts, results, strict=True):
                yield which, start, found
                bar.update(len(images))
        except BrokenProcessPool:
            raise Fault(
                f"a process that decodes images was killed while {what}: memory ran out, or an image made its decoder "
                "crash. Try processes=1."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_splits: tuple[Split, ...] = ()  # of this process


def _begin(splits: tuple[Split, ...]) -> None:
    global _splits
    _splits = splits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one


def _part(work: Callable[[Split, int], R], part: tuple[int, range]) -> list[R]:
    which, images = part
    return [work(_splits[which], index) for index in images]
