"""The decoder in C: Pillow's pixels, bit for bit, or a refusal."""

import io
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damaged
from images import photograph
from PIL import Image
from torchvision.transforms import functional

from largebatch.base.errors import UserError
from largebatch.data import native
from largebatch.data.decode import DAMAGE, choose_decoder, decode


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def picture(width=187, height=141):
    return photograph("coffee").resize((width, height))


CUSTOMARY = {
    "4:2:0": lambda: jpeg(picture()),
    "4:2:2": lambda: jpeg(picture(), subsampling=1),
    "4:4:4": lambda: jpeg(picture(), subsampling=0, quality=97),
    "greyscale": lambda: jpeg(picture().convert("L")),
    "coarse": lambda: jpeg(picture(), quality=5),
    "finest": lambda: jpeg(picture(), quality=100, optimize=True),
    "restart intervals": lambda: jpeg(picture(), restart_marker_blocks=5),
    "whole units": lambda: jpeg(picture(160, 128)),
    "one more than units": lambda: jpeg(picture(161, 129)),
    "narrow": lambda: jpeg(picture(9, 300)),
    "EXIF and a comment": lambda: jpeg(picture(), exif=b"Exif\0\0" + bytes(400), comment=b"\xff\xd9 a photograph"),
}


def pillow(data, box, size, mirrored):
    image = functional.resized_crop(decode(data), *box, list(size))
    return functional.pil_to_tensor(functional.hflip(image) if mirrored else image)


def boxes(width, height, chance):
    """Return the whole image, its corners' pixels, and windows of any size."""
    yield 0, 0, height, width
    for top, left in ((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)):
        yield top, left, 1, 1
    for _ in range(40):
        h, w = chance.randint(1, height), chance.randint(1, width)
        yield chance.randint(0, height - h), chance.randint(0, width - w), h, w


@pytest.mark.parametrize("kind", CUSTOMARY)
def test_a_crop_has_the_pixels_of_pillow_bit_for_bit(kind):
    data, chance = CUSTOMARY[kind](), random.Random(kind)
    width, height = native.size(data)
    assert (width, height) == Image.open(io.BytesIO(data)).size
    for number, box in enumerate(boxes(width, height, chance)):
        size = (32, 32) if number % 2 else (chance.randint(1, 70), chance.randint(1, 70))
        wanted = pillow(data, box, size, mirrored=number % 3 == 0)
        planar = torch.zeros(wanted.shape, dtype=torch.uint8)
        packed = torch.zeros((*size, 3), dtype=torch.uint8).permute(2, 0, 1)
        for out in (planar, packed):
            assert native.crop_into(out, data, box, mirrored=number % 3 == 0)
            assert out.equal(wanted), (box, size)


def patched(data, at, value):
    return data[:at] + bytes([value]) + data[at + 1 :]


def with_a_code_of_ones(data):
    """Add a code to the first Huffman table, the one that the format forbids."""
    at = data.index(b"\xff\xc4")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    longer = data[at:end] + b"\x0b"  # a symbol more, whose code has nine bits
    longer = patched(patched(longer, 3, longer[3] + 1), 13, longer[13] + 1)
    return data[:at] + longer + data[end:]


REFUSED = {
    "nothing": lambda: b"",
    "no image": lambda: b"<html>not found</html>",
    "PNG": lambda: (lambda buffer: (picture().save(buffer, "PNG"), buffer.getvalue())[1])(io.BytesIO()),
    "progressive": lambda: jpeg(picture(), progressive=True),
    "CMYK": lambda: jpeg(picture().convert("CMYK")),
    "RGB": lambda: jpeg(picture(), keep_rgb=True),
    "1×1": lambda: jpeg(Image.new("RGB", (1, 1))),
    "cut short": lambda: jpeg(picture())[:-700],
    "a header that is cut short": lambda: jpeg(picture())[:300] + b"\xff\xd9",
    "12 bits": lambda: (lambda data: patched(data, data.index(b"\xff\xc0") + 4, 12))(jpeg(picture())),
    "other sampling": lambda: (lambda data: patched(data, data.index(b"\xff\xc0") + 11, 0x41))(jpeg(picture())),
    "no sampling": lambda: (lambda data: patched(data, data.index(b"\xff\xc0") + 11, 0))(jpeg(picture().convert("L"))),
    "a code of ones alone": lambda: with_a_code_of_ones(jpeg(picture())),
}
# Else a damaged file would be an image here, and none where Pillow decodes.
REFUSED_BY_PILLOW = ("nothing", "no image", "cut short", "12 bits", "no sampling", "a code of ones alone")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_customary_is_left_to_pillow(kind):
    assert native.size(REFUSED[kind]()) is None


@pytest.mark.parametrize("kind", REFUSED_BY_PILLOW)
def test_pillow_refuses_damage_too(kind):
    with pytest.raises(DAMAGE):
        decode(REFUSED[kind]())


def test_what_is_damaged_where_it_is_read_is_refused_and_elsewhere_not_seen():
    data = jpeg(picture(), restart_marker_rows=1)
    second = data.index(b"\xff\xd1")  # two rows of units lie before it
    damaged = data[:second] + data[second + 2 :]
    out = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    assert not native.crop_into(out, damaged, (40, 0, 40, 40), mirrored=False)
    assert out.eq(7).all()
    assert native.crop_into(out, damaged, (0, 0, 20, 40), mirrored=False)
    assert out.equal(pillow(data, (0, 0, 20, 40), (16, 16), mirrored=False))


def natively(data, box, size=(24, 40)):
    """Return the crop, or None where it is left to Pillow."""
    out = torch.empty((3, *size), dtype=torch.uint8)
    return out if native.size(data) and native.crop_into(out, data, box, mirrored=False) else None


def test_a_marker_in_the_scan_is_left_to_pillow():
    """Behind the crop too: Pillow refuses a second frame anywhere. Restarts and the image's end stop nobody."""
    data, top = jpeg(picture(), restart_marker_blocks=5), (0, 0, 8, 20)
    at = data.rindex(b"\xff", 0, -2)
    for marker, read in ((0xC0, False), (0xC4, False), (0xDA, False), (0xFE, False), (0x02, False), (0xD5, True)):
        assert (natively(patched(data, at + 1, marker), top) is not None) is read
    with pytest.raises(DAMAGE):
        decode(patched(data, at + 1, 0xC0))
    assert natively(data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :], top).equal(
        pillow(data, top, (24, 40), False)
    )


def test_a_coefficient_whose_step_takes_it_beyond_16_bits_is_left_to_pillow():
    """A flat grey block has a DC coefficient of (value - 128)·8 / step: here the step is made 255 times as large."""
    data = jpeg(Image.new("L", (64, 64), 250), quality=100)  # steps of 1
    at = data.index(b"\xff\xdb") + 5
    assert data[at] == 1
    assert natively(data, (0, 0, 64, 64)).eq(250).all()
    assert natively(patched(data, at, 255), (0, 0, 64, 64)) is None  # 976 · 255 = 248,880


def test_thousands_of_damaged_files_have_the_pixels_of_pillow_or_are_left_to_it():
    chance = random.Random(0)
    kinds = ("4:2:0", "4:2:2", "4:4:4", "greyscale", "coarse", "finest", "restart intervals", "EXIF and a comment")
    whole = [CUSTOMARY[kind]() for kind in kinds]
    alike = 0
    for number in range(4000):
        data = damaged(chance.choice(whole), chance)
        width, height = native.size(data) or (1, 1)
        if width * height > 2**20:
            continue
        h, w = chance.randint(1, height), chance.randint(1, width)
        box = (chance.randint(0, height - h), chance.randint(0, width - w), h, w)
        pixels = natively(data, box)
        if pixels is not None:
            assert pixels.equal(pillow(data, box, (24, 40), mirrored=False)), number  # it decodes without an error
            alike += 1
    assert 500 < alike < 2500


@pytest.mark.parametrize("box", [(0, 0, 142, 10), (0, 0, 0, 10), (-1, 0, 5, 5), (0, 180, 5, 8), (2**31 - 1, 0, 9, 9)])
def test_a_crop_beyond_the_image_is_refused(box):
    assert not native.crop_into(torch.empty((3, 8, 8), dtype=torch.uint8), jpeg(picture()), box, mirrored=False)


def test_damage_of_any_kind_does_no_harm(tmp_path):
    """Checked by the compiler's sanitizers: no byte is read or written that is not there."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    program, here = tmp_path / "damaged", Path(__file__).parent
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi", f"-I{native.HERE}"]
    sources = [str(here / "damaged_jpegs.c"), *map(str, native.SOURCES)]
    subprocess.run([compiler, *flags, *sources, "-o", str(program), "-lm"], check=True)
    for number, kind in enumerate(("4:2:0", "4:2:2", "4:4:4", "greyscale", "restart intervals", "finest")):
        (tmp_path / f"{number}.jpg").write_bytes(CUSTOMARY[kind]())
    words = [str(program), "1", "1500", *map(str, sorted(tmp_path.glob("*.jpg")))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = int(done.stdout.split()[0])
    assert 300 < read < 1400  # some are read, some refused


@pytest.fixture
def files(compose):
    return lambda decoder: compose("dataset=imagefolder", f"dataset.decoder={decoder}").dataset


@pytest.fixture
def unloaded():
    """Forget the decoder before and after."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_without_a_compiler_pillow_decodes_and_the_line_says_why(files, unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    chosen, line = choose_decoder(files("auto"))
    assert (chosen, line.endswith("because there is no C compiler: install gcc or clang")) == ("pillow", True)
    with pytest.raises(UserError, match=r"native is not to be had: there is no C compiler: install gcc or clang\."):
        choose_decoder(files("native"))
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(native.Unavailable, match=r"/bin/false cannot compile it, as .* can: exit status 1"):
        native.load()
    monkeypatch.setenv("CC", "/no/compiler")
    with pytest.raises(native.Unavailable, match="the C compiler /no/compiler cannot be run: No such file"):
        native.load()


def test_of_what_a_compiler_says_the_error_is_told(monkeypatch, unloaded, tmp_path):
    compiler = tmp_path / "old"
    compiler.write_text("#!/bin/sh\necho \"$1: In function 'transpose'\njpeg.c:260: error: too old\" >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", f"{compiler} --fast")
    with pytest.raises(native.Unavailable, match=r"old cannot compile it, .*can: jpeg\.c:260: error: too old"):
        native.load()


def test_what_another_system_compiled_is_left_to_pillow(files, unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_compiled", lambda: tmp_path / "jpeg.so")
    (tmp_path / "jpeg.so").write_bytes(b"\x7fELF of another system")
    chosen, line = choose_decoder(files("auto"))
    assert chosen == "pillow"
    assert "it cannot be loaded" in line


def test_a_pillow_that_resizes_otherwise_is_noticed(files, unloaded, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *_: self.crop((0, 0, *size)))
    chosen, line = choose_decoder(files("auto"))
    assert chosen == "pillow"
    assert "decodes or resizes otherwise" in line


@pytest.mark.parametrize("compiler", ["gcc", "gcc-11", "clang"])
def test_every_compiler_that_clusters_have_makes_it(compiler, unloaded, monkeypatch, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    native.load()  # which compares pixels with Pillow's
    data = CUSTOMARY["4:2:0"]()
    assert natively(data, (20, 30, 100, 90)).equal(pillow(data, (20, 30, 100, 90), (24, 40), mirrored=False))


def test_a_library_that_changed_in_the_cache_is_compiled_anew(unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    path = native._compiled()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert native._compiled() == path
    assert path.read_bytes() == whole
    path.chmod(0o777)
    assert native._compiled() == path
    assert path.stat().st_mode & 0o022 == 0
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert not native._compiled().is_symlink()


def test_a_directory_of_the_cache_that_others_may_write_to_is_not_used(files, unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    directory = native._compiled().parent
    directory.chmod(0o777)
    chosen, line = choose_decoder(files("auto"))
    assert (chosen, f"{directory} is writable by others" in line) == ("pillow", True)
    directory.chmod(0o700)
    another = directory.stat().st_uid + 1
    directory.rename(directory.with_name(f"native-{another}"))  # made by somebody else for that user
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(native.Unavailable, match="is writable by others"):
        native.load()


def test_it_is_compiled_once_and_chosen_by_default(files, unloaded, monkeypatch, tmp_path):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    assert choose_decoder(files("auto"))[0] == "native"
    assert len([*tmp_path.glob("native-*/*")]) == 1
    native.load.cache_clear()
    monkeypatch.setattr(native, "_run", lambda command: pytest.fail("compiled again"))
    assert choose_decoder(files("native"))[0] == "native"
    assert choose_decoder(files("pillow"))[0] == "pillow"


def test_the_experiment_is_the_same_whoever_decodes(compose):
    hashes = {
        compose("dataset=imagenet", f"dataset.decoder={decoder}").experiment_hash("fp32")
        for decoder in ("auto", "native", "pillow")
    }
    assert len(hashes) == 1


def test_the_pixels_of_a_photograph_are_not_all_alike():
    """Else the comparisons above would hold whatever is decoded."""
    pixels = np.asarray(picture())
    assert all(pixels[..., channel].std() > 30 for channel in range(3))
