"""Splits of encoded images, as arrays: class folders, and images that lie in archives or parquet files.

ImageNet's 1.28 million images take about 60 MB, which loader processes share. A list of as many paths would be copied
into each of them, page by page, as soon as Python counts references.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable

_MOST_OPEN = 128  # archives that a process keeps open: there may be thousands
_ASKED, _ASKING = 1024, 16  # files whose sizes a thread asks for at a time, and threads
_CACHED_BYTES = 256 * 2**20  # of row groups in a process
_LARGEST_GROUP = 2**31  # bytes of an unpacked row group, which a process holds whole. Hugging Face's have 12 million
_LARGEST_IMAGE = 2**28  # bytes; what a stranger's file claims is otherwise allocated. ImageNet's have up to 15 million


@dataclass(frozen=True)
class Names:
    """A list of names in two arrays: their bytes one after another, and where each ends (N,)."""

    text: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        """Make them of a list."""
        kept = list(names)
        return cls(
            np.frombuffer(b"".join(kept), dtype=np.uint8),
            np.cumsum(np.fromiter(map(len, kept), dtype=np.int64, count=len(kept)), dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())


@dataclass(frozen=True)
class Split(ABC):
    """The images of one split, in the order (class, file name).

    Attributes:
        labels: int32 (N,).
        names: N file names.
        classes: Names of the classes, in the order of the labels.
    """

    labels: NDArray[np.int32]
    names: Names
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return an image's encoded bytes.

        Raises:
            OSError: it cannot be read.
            UserError: what it lies in is not what was indexed.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Say where an image lies, for people."""

    @abstractmethod
    def sizes(self, rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Return the bytes of every image, or of those at ``rows``: int64 (N,), -1 where nobody knows."""


def _check_size(size: int) -> None:
    if size > _LARGEST_IMAGE:
        raise OSError(f"{size:,} bytes are more than the {_LARGEST_IMAGE:,} that an image may have")


@dataclass(frozen=True)
class Folders(Split):
    """Class folders below ``root``; a name is the path from there."""

    root: str

    def path(self, index: int) -> Path:
        """Return an image's path."""
        return Path(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        """Read the file."""
        # O_NONBLOCK: opening a FIFO would wait for someone who writes to it.
        descriptor = os.open(self.path(index), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("this is no regular file")
            _check_size(status.st_size)
            return file.read()

    def where(self, index: int) -> str:
        """Return the path."""
        return printable(str(self.path(index)))

    def sizes(self, rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Ask the file system, several files at once: over a network it mostly waits."""
        chosen = range(len(self)) if rows is None else rows
        found = np.empty(len(chosen), dtype=np.int64)
        root, text = os.fsencode(self.root) + b"/", self.names.text.tobytes()
        ends = self.names.ends

        def ask(part: range) -> None:
            for at in part:
                row = chosen[at]
                start = int(ends[row - 1]) if row else 0
                try:
                    found[at] = os.stat(root + text[start : int(ends[row])]).st_size  # noqa: PTH116  (a Path takes longer)
                except OSError:  # reading it says what is wrong
                    found[at] = -1

        parts = [range(start, min(start + _ASKED, len(chosen))) for start in range(0, len(chosen), _ASKED)]
        with ThreadPoolExecutor(_ASKING) as pool:
            list(pool.map(ask, parts))
        return found


@dataclass(frozen=True)
class Container:
    """A file that holds images, as it was when it was indexed: path, bytes, and time of its last change in ns."""

    path: str
    bytes: int
    changed: int

    @classmethod
    def at(cls, path: Path) -> Container:
        """Look at a file."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)

    def check(self, status: os.stat_result) -> None:
        """Raise :class:`UserError` unless the file still is what it was."""
        if (status.st_size, status.st_mtime_ns) != (self.bytes, self.changed):
            raise UserError(
                f"{self.path} has changed since it was indexed ({self.bytes:,} bytes then, {status.st_size:,} now): "
                "don't change archives while they are read; start again, which makes a new index."
            )


@dataclass(frozen=True)
class Contained(Split):
    """Images inside of ``containers``: in which one (N,), where in it (N, 2), and how many bytes (N,)."""

    containers: Sequence[Container]
    files: NDArray[np.int32]
    places: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def sizes(self, rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Look into the index."""
        return self.lengths if rows is None else self.lengths[list(rows)]

    def _container(self, index: int) -> Container:
        return self.containers[int(self.files[index])]

    def __post_init__(self) -> None:
        count = len(self.labels)
        assert len(self.names) == len(self.files) == count
        assert self.places.shape == (count, 2)
        assert self.lengths.shape == (count,)


@dataclass(frozen=True)
class Archived(Contained):
    """Images in tar archives, read in place; ``places`` are (offset, size) in bytes."""

    _opened: _Opened = field(default_factory=lambda: _Opened(), repr=False, compare=False)

    def read(self, index: int) -> bytes:
        """Read the bytes at their place; every process opens the archives for itself."""
        offset, size = map(int, self.places[index])
        _check_size(size)
        descriptor = self._opened.descriptor(self._container(index))
        data = os.pread(descriptor, size, offset)
        while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
        if len(data) < size:
            self._container(index).check(os.fstat(descriptor))
            raise OSError(f"{len(data):,} of {size:,} bytes could be read")
        return data

    def where(self, index: int) -> str:
        """Return archive, member and offset."""
        offset = int(self.places[index, 0])
        return f"{printable(self.names[index])} in {self._container(index).path}, at byte {offset:,}"


class _Opened:
    """Descriptors of this process: a forked one would share its parent's, a spawned one would have none."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def descriptor(self, container: Container) -> int:
        if self._process != os.getpid():
            self._begin()
        if container.path not in self._descriptors:
            if len(self._descriptors) == _MOST_OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = os.open(container.path, os.O_RDONLY | os.O_CLOEXEC)
            container.check(os.fstat(descriptor))
            self._descriptors[container.path] = descriptor
        self._descriptors.move_to_end(container.path)
        return self._descriptors[container.path]


@dataclass(frozen=True)
class Tabled(Contained):
    """Images in parquet files; ``places`` are (row group, row in it).

    Parquet gives a row group as a whole, so an image costs as much reading as about a hundred.
    """

    _cache: _RowGroups = field(default_factory=lambda: _RowGroups(), repr=False, compare=False)

    def read(self, index: int) -> bytes:
        """Read the row group, unless it is at hand."""
        group, row = map(int, self.places[index])
        value = self._cache.column(self._container(index), group)[row].as_py()
        if not value:
            raise OSError("there are no bytes in this row")
        return bytes(value)

    def where(self, index: int) -> str:
        """Return file, row group and row."""
        group, row = self.places[index]
        return f"{printable(self.names[index])} in {self._container(index).path}, row {row} of row group {group}"


def check_row_group(metadata: Any, group: int) -> None:
    """Raise OSError where a row group of a parquet file (pyarrow's metadata of it) is too large to be read at once."""
    claimed = metadata.row_group(group)
    size = sum(claimed.column(column).total_uncompressed_size for column in range(claimed.num_columns))
    if not 0 <= size <= _LARGEST_GROUP:
        raise OSError(
            f"row group {group} has {size:,} bytes, more than the {_LARGEST_GROUP:,} that are read at once: write the "
            "file anew with fewer rows a group, such as row_group_size=100"
        )


class _RowGroups:
    """The row groups that were used last, up to some bytes."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[_RowGroups], tuple[()]]:
        return _RowGroups, ()  # another process fills its own

    def column(self, container: Container, group: int) -> Any:
        if self._process != os.getpid():
            self._begin()
        key = (container.path, group)
        if key not in self._held:
            self._held[key] = self._read(container, group)
            self._bytes += self._held[key].nbytes
            while self._bytes > _CACHED_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(key)
        return self._held[key]

    def _read(self, container: Container, group: int) -> Any:
        from pyarrow import ArrowException

        try:
            file = self._file(container)
            check_row_group(file.metadata, group)
            # Without threads of its own, which a forked process would not have.
            table = file.read_row_group(group, columns=["image.bytes"], use_threads=False)
        except ArrowException as error:  # some of which are neither OSError nor ValueError
            raise OSError(" ".join(str(error).split())) from None
        return table.column("image").combine_chunks().field("bytes")

    def _file(self, container: Container) -> Any:
        from pyarrow.parquet import ParquetFile

        if container.path not in self._opened:
            container.check(Path(container.path).stat())
            if len(self._opened) == _MOST_OPEN:
                self._opened.popitem(last=False)[1].close()
            self._opened[container.path] = ParquetFile(container.path, pre_buffer=False)
        self._opened.move_to_end(container.path)
        return self._opened[container.path]
