"""Images as strangers have them: they are trained on, or one sentence names them."""

import io
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from images import photograph
from layouts import tar_of
from PIL import Image

from largebatch.base.errors import UserError
from largebatch.config.groups import LoaderConfig
from largebatch.data.decode import check_resized, decode
from largebatch.data.files import Archived, Container, Folders, Names
from largebatch.data.source import Target, open_source


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small():
    return photograph("chelsea").crop((0, 0, 60, 40))


def sixteen_bits():
    grey = np.asarray(small().convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257)


ODD = {
    "progressive": lambda: encoded(small(), progressive=True),
    "CMYK": lambda: encoded(small().convert("CMYK")),
    "greyscale": lambda: encoded(small().convert("L")),
    "16-bit PNG": lambda: encoded(sixteen_bits(), "PNG"),
    "PNG in disguise": lambda: encoded(small(), "PNG"),
    "palette with transparency": lambda: encoded(small().quantize(8), "PNG", transparency=b"\x00\x80"),
    "1×1": lambda: encoded(Image.new("RGB", (1, 1), (200, 100, 50))),
    "20,000 wide": lambda: encoded(small().resize((20_000, 40))),
}
BAD = {
    "truncated": lambda: encoded(small())[:600],
    "empty": lambda: b"",
    "no image": lambda: b"<html>not found</html>",
    "a pointer of git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "huge": lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
}


def source_of(data, compose, root, **changes):
    """Open a set of one image, in shards."""
    for split in ("train", "val"):
        tar_of({"odd.jpg": data, "odd.cls": b"0"}, root / f"{split}-0.tar")
    config = compose("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "dataset.resize=40").dataset
    config = replace(config, root=str(root), **changes)
    target = Target(torch.device("cpu"), torch.float32)
    return open_source(config, LoaderConfig(workers=0, prefetch=1), 0, target, cores=1)


@pytest.mark.parametrize("what", ODD)
def test_an_odd_image_trains_and_validates_alike_whoever_decodes(what, compose, tmp_path):
    seen = []
    for decoder in ("native", "pillow"):
        source = source_of(ODD[what](), compose, tmp_path, decoder=decoder)
        batches = [*source.train((epoch, torch.tensor([0])) for epoch in range(5)), *source.validation([range(1)])]
        assert source.decoder == decoder
        for batch in batches:
            assert (batch.corrupt, batch.images.shape) == (0, (1, 3, 32, 32))
            assert batch.images.isfinite().all()
        seen.append(torch.cat([batch.images for batch in batches]))
    assert seen[0].equal(seen[1])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", BAD)
def test_a_bad_image_is_named_with_archive_and_offset_or_counted(what, compose, tmp_path):
    data = BAD[what]()
    source = source_of(data, compose, tmp_path)
    named = rf"corrupt image odd.jpg in {tmp_path}/val-0.tar, at byte 512: .+\. Mend or remove the file, or use"
    with pytest.raises(UserError, match=named):
        next(iter(source.validation([range(1)])))
    for decoder in ("native", "pillow"):
        source = source_of(data, compose, tmp_path, on_error="skip", decoder=decoder)
        (batch,) = source.validation([range(1)])
        assert batch.corrupt == 1
        with pytest.raises(UserError, match="no image of this split can be read; the first problem: corrupt") as error:
            next(iter(source.train([(0, torch.tensor([0]))])))
        assert "object at 0x" not in str(error.value)


@pytest.mark.parametrize("what", ["CMYK", "greyscale", "16-bit PNG", "PNG in disguise", "progressive"])
def test_an_odd_image_looks_like_the_photograph(what):
    image = decode(ODD[what]())
    assert image.mode == "RGB"
    grey = np.asarray(small().convert("L"), dtype=float)
    assert np.abs(np.asarray(image.convert("L"), dtype=float) - grey).mean() < 5


def test_postscript_is_no_image_and_never_interpreted():
    with pytest.raises(ValueError, match="no image of a format that is read"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def test_an_image_that_would_fill_the_memory_when_resized_is_corrupt(compose, tmp_path):
    check_resized(20_000, 200, 256)
    with pytest.raises(ValueError, match=r"20000×1 pixels, too long to have its shorter side resized to 256"):
        check_resized(20_000, 1, 256)
    source = source_of(encoded(Image.new("RGB", (20_000, 1))), compose, tmp_path, resize=256)
    with pytest.raises(UserError, match=r"corrupt image odd.jpg .*20000×1 pixels, too long"):
        next(iter(source.validation([range(1)])))


def test_an_image_of_absurd_size_is_not_read(tmp_path):
    size = 2**28 + 1
    path = tmp_path / "odd.jpg"
    path.touch()
    os.truncate(path, size)  # takes no room on the disk
    labels, names = np.zeros(1, np.int32), Names.of([b"odd.jpg"])
    places = np.array([[0, size]], np.int64)
    archived = Archived(labels, names, ["0"], [Container.at(path)], labels, places, places[:, 1])
    for split in (Folders(labels, names, ["0"], str(tmp_path)), archived):
        with pytest.raises(OSError, match="268,435,457 bytes are more than the 268,435,456 that an image may have"):
            split.read(0)


def test_what_changed_under_a_loader_process_is_one_sentence(compose, tmp_path):
    """Even where corrupt images are skipped: no error of a loader process's own."""
    chance = random.Random(0)
    source = source_of(encoded(small()), compose, tmp_path, on_error="skip")
    archive = tmp_path / "train-0.tar"
    archive.write_bytes(chance.randbytes(archive.stat().st_size))
    os.utime(archive, ns=(0, 0))
    source._workers = 1
    with pytest.raises(UserError) as caught:
        next(iter(source.train([(0, torch.tensor([0]))])))
    assert str(caught.value).startswith(f"{archive} has changed since it was indexed")
    assert "Traceback" not in str(caught.value)
