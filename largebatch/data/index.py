"""The index of archives, kept beside them or in a cache, so that their headers are read once.

It is keyed by size and time of change of every file that it was made of: where one differs, it is made anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from largebatch.base.errors import UserError
from largebatch.base.files import write_atomically
from largebatch.data.files import Container, Names
from largebatch.data.listing import SPLITS, Listing, Table

NAME = "largebatch-index.safetensors"
_VERSION = 3
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Indexed:
    """A listing; the index file that holds it, or None with the ``problem`` that kept it from being written."""

    listing: Listing
    path: Path | None
    fresh: bool
    problem: str = ""


def cache_directory() -> Path:
    """Return where what can be made again is kept: $LARGEBATCH_CACHE, or a directory in XDG's cache."""
    cache = os.environ.get("LARGEBATCH_CACHE")
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(cache).expanduser() if cache else xdg / "largebatch"


def places(root: Path) -> list[Path]:
    """Return where the index of ``root`` may be: beside the archives, else in the directory of caches."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [root / NAME, cache_directory() / f"index-{name}.safetensors"]


def indexed(root: Path, layout: str, sources: Sequence[Path], scan: Callable[[], Listing], anew: bool) -> Indexed:
    """Return the kept index if it still holds, else make and keep a new one.

    Args:
        root: The directory of the data set.
        layout: Its layout's name.
        sources: All files that the index depends on.
        scan: Makes the listing.
        anew: Whether to make it in any case.

    Raises:
        UserError: what ``scan`` finds wrong, or a file that changes meanwhile.
    """
    key = _key(root, layout, sources)
    if not anew:
        for path in places(root):
            listing = _load(path, root, key)
            if listing is not None:
                return Indexed(listing, path, fresh=False)
    listing = scan()
    if _key(root, layout, sources) != key:
        raise UserError(f"the archives in {root} changed while they were indexed: start again when they are complete.")
    data = _packed(listing, root, key)
    problem = ""
    for path in places(root):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
            return Indexed(listing, path, fresh=True)
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            if error.errno not in _READ_ONLY:
                break
    return Indexed(listing, None, fresh=True, problem=problem)


def _key(root: Path, layout: str, sources: Sequence[Path]) -> dict[str, object]:
    looks = [Container.at(path) for path in sources]
    files = [[os.path.relpath(look.path, root), look.bytes, look.changed] for look in looks]
    return {"version": _VERSION, "layout": layout, "files": files}


def _packed(listing: Listing, root: Path, key: dict[str, object]) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for split, table in zip(SPLITS, (listing.train, listing.val), strict=True):
        arrays[f"{split}.labels"] = table.labels
        arrays[f"{split}.files"] = table.files
        arrays[f"{split}.places"] = np.ascontiguousarray(table.places)
        arrays[f"{split}.sizes"] = table.sizes
        arrays[f"{split}.names"] = table.names.text
        arrays[f"{split}.ends"] = table.names.ends
    containers = [os.path.relpath(container.path, root) for container in listing.containers]
    about = {"key": key, "containers": containers, "classes": listing.classes, "left_out": listing.left_out}
    return save(arrays, {"index": json.dumps(about)})


def _load(path: Path, root: Path, key: dict[str, object]) -> Listing | None:
    """Return the index in a file, or None if there is none that holds."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})["index"])
            if about["key"] != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        containers = [Container.at(root / name) for name in about["containers"]]
        tables = [_table(arrays, split) for split in SPLITS]
        left_out = Counter({str(kind): int(count) for kind, count in about["left_out"].items()})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
    if not all(_sound(table, containers, str(key["layout"])) for table in tables):
        return None
    return Listing(containers, about["classes"], tables[0], tables[1], left_out)


def _table(arrays: dict[str, np.ndarray], split: str) -> Table:
    names = Names(arrays[f"{split}.names"], arrays[f"{split}.ends"])
    labels, files, places, sizes = (arrays[f"{split}.{name}"] for name in ("labels", "files", "places", "sizes"))
    return Table(labels, files, places, sizes, names)


def _sound(table: Table, containers: Sequence[Container], layout: str) -> bool:
    """Whether every image lies within its container; a file in a shared directory may have been tampered with."""
    count = len(table.labels)
    ends = table.names.ends
    arrays = (table.labels, table.files, table.sizes, ends, table.places, table.names.text)
    kinds = [array.dtype.name for array in arrays]
    shapes = [array.shape for array in arrays[:-1]]
    if kinds != ["int32", "int32", "int64", "int64", "int64", "uint8"] or shapes != [(count,)] * 4 + [(count, 2)]:
        return False
    if not count:
        return True
    if (
        table.labels.min() < 0
        or table.places.min() < 0
        or not 0 <= table.files.min() <= table.files.max() < len(containers)
    ):
        return False
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(table.names.text):
        return False
    sizes = np.array([container.bytes for container in containers])[table.files]
    # Row groups and rows of parquet files are checked by their reader.
    return layout == "parquet files" or bool((table.places[:, 0] <= sizes - table.places[:, 1]).all())
