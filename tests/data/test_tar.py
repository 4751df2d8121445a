"""Headers of archives: what ordinary ones say, and what damaged and malicious ones are answered."""

import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import tar_of

from largebatch.base.errors import UserError
from largebatch.data.tar import BLOCK, Member, members

LONG = "folder/" * 30 + "image.jpg"  # 219 characters: beyond ustar's name of 100
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walk(data, start=0, stop=None, archive="a.tar"):
    return list(members(lambda at, size: data[at : at + size], start, len(data) if stop is None else stop, archive))


def header(name="a.jpg", size=0, kind=b"0", **fields):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def with_field(block, start, field):
    """Write into a header, and make its checksum right again."""
    block = block[:start] + field + block[start + len(field) :]
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def pax(records, kind=b"x"):
    return header("pax", len(records), kind) + padded(records)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize("form", FORMATS)
def test_every_file_is_found_where_python_finds_it(form, tmp_path):
    names = ["a.jpg", "Straße.jpg", "/etc/passwd", "../../up.jpg", "empty.jpg"]
    names += [LONG] if form != "ustar" else ["f/" * 60 + "prefix.jpg"]
    files = {name: bytes([number]) * (700 * number) for number, name in enumerate(names)}
    data = tar_of(files, tmp_path / "a.tar", FORMATS[form])
    found = walk(data)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert found == [Member(one.name, one.offset_data, one.size) for one in archive]
    assert [data[one.offset : one.offset + one.size] for one in found] == list(files.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]  # nothing was unpacked


def test_links_devices_and_directories_are_left_out():
    kinds = {b"1": "link", b"2": "symlink", b"3": "tty", b"4": "disk", b"5": "folder", b"6": "pipe"}
    others = b"".join(header(name, size=4096, kind=kind) for kind, name in kinds.items())  # sizes without data
    old_folder = header("old/", kind=b"\0")
    assert [one for one in walk(others + old_folder + header("a.jpg", 3) + padded(b"abc") + END) if one.regular] == [
        Member("a.jpg", 8 * BLOCK, 3)
    ]


def test_an_archive_in_an_archive_is_read_in_place():
    inner = tar_of({"x.jpg": b"abc", "y.jpg": b"defg"})
    outer = tar_of({"first": b"1", "inner.tar": inner, "last": b"2"})
    place = walk(outer)[1]
    found = walk(outer, place.offset, place.offset + place.size)
    assert [(one.name, outer[one.offset : one.offset + one.size]) for one in found] == [
        ("x.jpg", b"abc"),
        ("y.jpg", b"defg"),
    ]


def test_sizes_beyond_eight_gigabytes_are_read():
    size = 2**40
    block = header("big.jpg", size)
    assert block[124] == 0x80  # base 256
    sparse = {0: block, BLOCK + size: END[:BLOCK]}
    found = list(members(lambda at, _: sparse[at], 0, 2 * BLOCK + size, "a.tar"))
    assert found == [Member("big.jpg", BLOCK, size)]


FILE = header("a.jpg", 3) + padded(b"abc")
MALICIOUS = {
    "size beyond the end": (header("a.jpg", 10**9) + END, 0, "'a.jpg' claims 1,000,000,000 bytes, where .* has 1,024"),
    "size of 2^88": (with_field(header(), 124, b"\x80" + b"\xff" * 11) + END, 0, "'a.jpg' claims 30"),
    "negative size, base 256": (with_field(header(), 124, b"\xff" * 12) + END, 0, "size of 'a.jpg' is not a number"),
    "negative size, octal": (with_field(header(), 124, b"-0000000777\0") + END, 0, "size of 'a.jpg' is not a number"),
    "size in words": (with_field(header(), 124, b"0o777_777\0") + END, 0, "size of 'a.jpg' is not a number"),
    "checksum": (FILE + b"b" + FILE[1:] + END, 1024, "no header of a tar archive"),
    "no archive": (b"\x89PNG\r\n" + bytes(2000), 0, "no header of a tar archive"),
    "cut in a header": (FILE + FILE[:100], 1024, "ends here without its end marker"),
    "cut in a file": ((FILE + header("b.jpg", 2000) + bytes(1000)), 1024, "'b.jpg' claims 2,000 bytes"),
    "cut between files": (FILE + FILE, 2048, "ends here without its end marker: it is cut short"),
    "empty": (b"", 0, "ends here without its end marker"),
    "pax size beyond the end": (pax(b"17 size=99999999\n") + FILE + END, 1024, "'a.jpg' claims 99,999,999 bytes"),
    "negative pax size": (pax(b"11 size=-5\n") + FILE + END, 0, "a size that is not a number"),
    "pax size of many digits": (pax(b"110 size=" + b"9" * 100 + b"\n") + FILE, 0, "a size that is not a number"),
    "pax record of length 0": (pax(b"0 size=5\n") + FILE + END, 0, "pax records are damaged"),
    "pax record beyond the end": (pax(b"99 size=5\n") + FILE + END, 0, "pax records are damaged"),
    "pax record without =": (pax(b"7 size\n") + FILE + END, 0, "pax records are damaged"),
    "pax record of no number": (pax(b"-1 size=5\n") + FILE + END, 0, "pax records are damaged"),
    "global size": (pax(b"10 size=5\n", b"g") + FILE + END, 0, "one name or size"),
    "thousands of pax headers": (pax(b"9 a=bcde\n") * 5000 + FILE + END, 8 * 1024, "more than 8 extended headers"),
    "thousands of long names": (header("l", 2, b"L") + padded(b"x") + END, 1024, "ends between a name and its file"),
    "a name of gigabytes": (header("l", 2**21, b"L") + bytes(2**21) + FILE + END, 0, "a name .* claim 2,097,152 byt"),
    "sparse": (pax(b"22 GNU.sparse.major=1\n") + FILE + END, 0, "a sparse file"),
    "old sparse": (header("a.jpg", 0, b"S") + END, 0, "'a.jpg' is of the kind b'S'"),
    "control characters": (header("a\n\x1b[31m", 10**9) + END, 0, r"'a\?\?\[31m' claims"),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_a_malicious_archive_is_one_sentence_with_the_place(what):
    data, at, words = MALICIOUS[what]
    with pytest.raises(UserError, match=rf"^a.tar is damaged at byte {at:,}: .*{words}.*Fetch it again\.$"):
        walk(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 4096), st.integers(0, 8192))
def test_whatever_is_written_into_an_archive_it_ends_and_stays_within(garbage, at, length):
    """Every step leads forward: there are no cycles, and no file lies outside."""
    data = tar_of({"a.jpg": b"abc" * 300, LONG: b"d", "b.jpg": b"e" * 600}, form=tarfile.PAX_FORMAT)
    data = (data[:at] + garbage + data[at + len(garbage) :])[:length]
    try:
        found = walk(data)
    except UserError:
        return
    assert all(0 < one.offset <= one.offset + one.size <= len(data) for one in found)
    assert [one.offset for one in found] == sorted({one.offset for one in found})


def test_a_name_that_is_no_text_can_be_shown():
    (found,) = walk(with_field(header("a.jpg"), 0, b"\xff\xfe.jpg") + END)
    assert os.fsencode(found.name) == b"\xff\xfe.jpg"
