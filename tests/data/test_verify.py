"""``data verify``: every kind of damage that libjpeg warns of is a finding, and nothing else is."""

import hashlib
import io
import os
import random
import shutil
import socket
from dataclasses import replace

import pytest
import simplejpeg
from damage import END, closed, marked, scan_of, zeroed
from images import make_tree, photograph

from largebatch.cli.commands.data import run
from largebatch.data.check import verify
from largebatch.data.decode import DAMAGE, decode, examine
from largebatch.data.layouts import open_splits

KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colours": {"subsampling": 0, "quality": 95},
    "restart intervals": {"restart_marker_blocks": 5},
}


def jpeg(mode="RGB", name="coffee", **options):
    buffer = io.BytesIO()
    photograph(name).resize((250, 190)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def scans_end(data):
    return data[: scan_of(data) + (len(data) - scan_of(data)) // 2] + END


def warning(data):
    """Return libjpeg's first warning while it decodes all colours, exactly."""
    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_what_pillow_hides_is_a_warning(kind):
    """Cut and closed with an end marker, zeroed, or with bytes too many: Pillow raises for none of them."""
    data, chance = jpeg(**KINDS[kind]), random.Random(kind)
    assert examine(data) is None
    extra = data[:-2] + bytes(40) + END
    for number in range(50):
        ways = (closed(data, chance), zeroed(data, chance, 4096), zeroed(data, chance, 512), extra, scans_end(data))
        for way, damaged in enumerate(ways):
            try:
                decode(damaged)
            except DAMAGE:
                assert kind == "progressive"  # whose scans have headers between them
                continue
            assert (examine(damaged) is None) == (warning(damaged) is None)
            assert examine(damaged) is not None or kind == "progressive", (number, way)


def test_a_lost_restart_is_a_warning():
    data = jpeg(restart_marker_blocks=5)
    at = data.index(b"\xff\xd3", scan_of(data))
    damaged = data[:at] + data[at + 2 :]
    decode(damaged)
    assert examine(damaged) is not None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "motorcycle_left"])
def test_sound_photographs_are_no_findings(name, mode):
    for options in KINDS.values():
        assert examine(jpeg(mode, name, **options)) is None


def test_other_formats_are_decoded_whole():
    for kind in ("PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        photograph("coffee").resize((40, 30)).save(buffer, kind)
        assert examine(buffer.getvalue()) is None
        with pytest.raises(DAMAGE):
            examine(buffer.getvalue()[:300])


def test_a_file_that_is_cut_short_is_corrupt():
    with pytest.raises(DAMAGE):
        examine(jpeg()[:-700])
    chance = random.Random(0)
    for _ in range(200):  # either a warning, or what Pillow refuses too
        data = marked(jpeg(), chance)
        try:
            examine(data)
        except DAMAGE:
            with pytest.raises(DAMAGE):
                decode(data)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", train=3, val=2)


@pytest.fixture
def opened(compose, tree):
    return lambda: open_splits(replace(compose("dataset=imagefolder").dataset, root=str(tree)), tolerant=True)


def test_verify_never_stops_half_way(tree, opened, capsys, monkeypatch):
    folder = tree / "train" / "coffee"
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (folder / "text.jpg").write_text("<html>not found</html>")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # the path of a socket is short
        server.bind("socket.jpg")
        image = next((tree / "train" / "chelsea").glob("*"))
        shutil.copy(image, os.fsencode(folder) + b"/\xff\xfe.jpg")
        shutil.copy(image, folder / "two\nlines\x1b[31m.jpg")
        verdict = verify(opened(), False, 1)
    lines = dict(line.rpartition("/")[2].split(": ", 1) for line in verdict.corrupt)
    assert lines == {
        "pointer.jpg": "this is a pointer of git-lfs, not the image: fetch the images by git lfs pull",
        "text.jpg": lines["text.jpg"],
        "fifo.jpg": "this is no regular file",
        "link.jpg": "No such file or directory",
        "socket.jpg": "No such device or address",
    }
    assert lines["text.jpg"].startswith("this is no image of a format that is read (JPEG, PNG")
    assert [line.rpartition("/")[2] for line in verdict.suspect] == [
        "two?lines?[31m.jpg: its name has line breaks or control characters, shown as ?",
        "??.jpg: its name is not UTF-8, and shown with ? for each byte that is not",
    ]
    assert [line.count(" repeats ") for line in verdict.duplicates] == [1, 1]
    assert run(["verify", f"root={tree}", "processes=1"]) == 1
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_directories_that_cannot_be_read_are_findings(tree, opened, monkeypatch):
    locked = {str(tree / "train" / "coffee"), str(tree / "val" / "chelsea")}
    scandir = os.scandir

    def forbidden(path):
        if os.fspath(path) in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # root may read whatever it likes
    verdict = verify(opened(), False, 1)
    assert verdict.images == 20 - 3 - 2
    assert verdict.corrupt == [f"directory {path}: it cannot be read: Permission denied" for path in sorted(locked)]


def test_damage_is_suspect_and_apart_from_what_is_corrupt(tree, capsys):
    cut, closed_early = tree / "train" / "coffee" / "cut.jpg", tree / "val" / "coffee" / "closed.jpg"
    cut.write_bytes(jpeg()[:-700])
    closed_early.write_bytes(scans_end(jpeg()))
    assert run(["verify", f"root={tree}", "processes=1"]) == 1
    out = capsys.readouterr().out
    assert f"These are corrupt, cannot be decoded:\n  {cut}: " in out
    assert f"  {closed_early}: Corrupt JPEG data: premature end of data segment\n" in out
    assert out.endswith("22 images: 1 corrupt, 1 suspect, 0 wrong counts, 0 that repeat another.\n")


def test_official_archives_are_held_against_their_published_sums(tree, opened, monkeypatch):
    from torchvision.datasets import imagenet

    archives = [tree / name for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")]
    for archive in archives:
        archive.write_bytes(archive.name.encode())
    sums = [hashlib.md5(archive.name.encode()).hexdigest() for archive in archives]
    published = {"train": (archives[0].name, sums[0]), "val": (archives[1].name, "1" * 32)}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", published)
    verdict = verify(opened(), True, 1)
    assert verdict.archives == [f"{archives[1]}: its MD5 sum is {sums[1]}, and {'1' * 32} was published"]
    assert verify(opened(), False, 1).archives == []
