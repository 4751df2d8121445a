"""Headers of tar archives from strangers: where every file's bytes lie. Nothing is unpacked, no path is followed.

ustar with the extensions that are in use: GNU's long names, pax records, sizes in base 256. Python's tarfile believes
sizes that lead backwards, and takes several times as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from largebatch.base.errors import UserError
from largebatch.base.outcome import printable

BLOCK = 512
_LONGEST_EXTENSION = 2**20  # bytes of a long name or of pax records
_MOST_EXTENSIONS = 8  # headers that may stand before a file's own
_FILE, _GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = (b"0", b"\0", b"7"), b"L", b"K", b"x", b"g"
_OTHERS = (b"1", b"2", b"3", b"4", b"6")  # links, devices, pipes
_WITHOUT_DATA = (*_OTHERS, b"5")  # and directories
_CHUNK = 2**20  # bytes that are read at once behind an archive's end

Read = Callable[[int, int], bytes]  # (offset, size) → that many bytes, fewer at the end


class Member(NamedTuple):
    """A file in an archive: its bytes are ``[offset, offset + size)`` of the outermost file."""

    name: str
    offset: int
    size: int
    regular: bool = True  # else a link, a device or a pipe


def _check_end(read: Read, at: int, stop: int, archive: str) -> None:
    """Refuse an archive that goes on behind its end marker: what was put behind it would be left out silently."""
    for start in range(at, stop, _CHUNK):
        if read(start, min(_CHUNK, stop - start)).strip(b"\0"):
            raise UserError(
                f"{archive} continues after its end marker at byte {at:,}, as archives joined by cat do: keep "
                "them apart, or join them by tar --concatenate."
            )


def members(read: Read, start: int, stop: int, archive: str) -> Iterator[Member]:
    """Yield the files of the archive that lies in bytes ``[start, stop)``, in their order.

    Directories are left out; links, devices and pipes are no ``regular`` members. Every header lies behind the one
    before, and every file within the archive.

    Args:
        read: Reads the outermost file.
        start: Where the archive begins.
        stop: Where it ends.
        archive: What errors call it.

    Raises:
        UserError: a header is damaged or absurd, the archive ends before its end marker, or more follows behind that:
            names the place.
    """
    at, extensions = start, _Extensions()
    while True:
        header = read(at, BLOCK) if at + BLOCK <= stop else b""
        if len(header) < BLOCK:
            raise _wrong(archive, at, "the archive ends here without its end marker: it is cut short")
        if not header.rstrip(b"\0"):
            if extensions.headers:
                raise _wrong(archive, at, "the archive ends between a name and its file")
            _check_end(read, at, stop, archive)
            return
        _check_sum(header, archive, at)
        kind, name = header[156:157], _name(header)
        size = _number(header[124:136], archive, at, name)
        if kind in _FILE and extensions.size is not None:
            size = extensions.size
        name = extensions.name or name
        data = at + BLOCK
        if kind in _WITHOUT_DATA:
            size = 0
        if size > stop - data:
            raise _wrong(archive, at, f"'{shown(name)}' claims {size:,} bytes, where the archive has {stop - data:,}")
        if kind in (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL):
            if size > _LONGEST_EXTENSION:
                raise _wrong(archive, at, f"a name or its records claim {size:,} bytes")
            if extensions.headers == _MOST_EXTENSIONS:
                raise _wrong(archive, at, f"more than {_MOST_EXTENSIONS} extended headers stand before one file")
            extensions = extensions.with_header(kind, read(data, size), archive, at)
        else:
            if kind in _FILE and not name.endswith("/"):  # a directory, as the oldest archives write it
                yield Member(name, data, size)
            elif kind in _OTHERS:
                yield Member(name, data, 0, regular=False)
            elif kind not in (*_FILE, *_WITHOUT_DATA):
                raise _wrong(archive, at, f"'{shown(name)}' is of the kind {kind!r}, which is not read")
            extensions = _Extensions()
        at = data + -(-size // BLOCK) * BLOCK


class _Extensions(NamedTuple):
    """Values of extended headers for the file that follows them."""

    headers: int = 0
    name: str | None = None
    size: int | None = None

    def with_header(self, kind: bytes, data: bytes, archive: str, at: int) -> _Extensions:
        if kind == _GNU_NAME:
            return self._replace(headers=self.headers + 1, name=os.fsdecode(data.partition(b"\0")[0]))
        if kind == _GNU_LINK:
            return self._replace(headers=self.headers + 1)
        records = _pax(data, archive, at)
        if kind == _PAX_GLOBAL:
            if records.keys() & {b"path", b"size"}:
                raise _wrong(archive, at, "a global header gives all files one name or size")
            return self._replace(headers=self.headers + 1)
        if any(key.startswith(b"GNU.sparse") for key in records):
            raise _wrong(archive, at, "a sparse file, which is not read")
        name, size = self.name, self.size
        if b"path" in records:
            name = os.fsdecode(records[b"path"].partition(b"\0")[0])
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > 20:
                raise _wrong(archive, at, "a size that is not a number")
            size = int(records[b"size"])
        return _Extensions(self.headers + 1, name, size)


def _pax(data: bytes, archive: str, at: int) -> dict[bytes, bytes]:
    """Read records, each of them a length, a space, key=value and the end of a line."""
    records, place = {}, 0
    while place < len(data):
        space = data.find(b" ", place, place + 21)
        digits = data[place:space] if space > 0 else b""
        end = place + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise _wrong(archive, at, "its pax records are damaged")
        records[key] = value
        place = end
    return records


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _number(field: bytes, archive: str, at: int, name: str) -> int:
    if field[0] == 0x80:  # base 256; negative numbers begin with 0xff
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise _wrong(archive, at, f"the size of '{shown(name)}' is not a number")
    return int(digits or b"0", 8)


def _check_sum(header: bytes, archive: str, at: int) -> None:
    said = header[148:156].partition(b"\0")[0].strip(b" ")
    if said.strip(b"01234567") or not said or int(said, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _wrong(archive, at, "this is no header of a tar archive")


def shown(name: str) -> str:
    """Return a stranger's name as it may stand in a sentence: :func:`printable`, and not too long."""
    name = printable(name)
    return name if len(name) <= 100 else f"{name[:60]}…{name[-30:]}"


def _wrong(archive: str, at: int, what: str) -> UserError:
    return UserError(f"{archive} is damaged at byte {at:,}: {what}. Fetch it again.")
