"""Encoded images to pixels."""

from __future__ import annotations

from io import BytesIO

import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import native

# What Pillow's decoders raise on damaged files, and on absurd sizes.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# What images of data sets are. Pillow knows more, and hands PostScript to a program of its own, Ghostscript.
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000"]
if features.check("avif"):
    FORMATS.append("AVIF")
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = 2**27  # pixels of an image, also after its shorter side was resized


def choose_decoder(config: DatasetConfig) -> tuple[str, str]:
    """Return the decoder of training crops, native or pillow, and a line about it for people.

    Raises:
        UserError: dataset.decoder=native was asked for, and there is none.
    """
    if config.decoder not in ("auto", "native"):
        return "pillow", f"dataset.decoder={config.decoder}: images are decoded by Pillow"
    try:
        native.load()
    except native.Unavailable as error:
        if config.decoder == "native":
            raise UserError(
                f"dataset.decoder=native is not to be had: {error}. dataset.decoder=auto takes Pillow then: the same "
                "pixels, in twice the time."
            ) from None
        return "pillow", f"dataset.decoder=auto: images are decoded by Pillow, at half the speed, because {error}"
    return "native", f"dataset.decoder={config.decoder}: training crops are decoded natively, to the pixels of Pillow"


def decode(data: bytes) -> Image.Image:
    """Decode an image as RGB; ImageNet holds greyscale, CMYK and PNG files among its .JPEGs.

    Raises:
        One of ``DAMAGE``: it cannot be decoded.
    """
    with opened(data) as file:
        if file.mode.startswith("I;16"):  # which Pillow would clip at 255
            return file.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
        if file.mode == "P" and "transparency" in file.info:
            return file.convert("RGBA").convert("RGB")
        return file.convert("RGB")


def opened(data: bytes) -> Image.Image:
    """Read an image's header.

    Raises:
        One of ``DAMAGE``: it has none of the formats that are read.
    """
    if data.startswith(_POINTER):
        raise ValueError("this is a pointer of git-lfs, not the image: fetch the images by git lfs pull")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose message has the address of BytesIO
        raise ValueError(f"this is no image of a format that is read ({', '.join(FORMATS)})") from None


def examine(data: bytes) -> str | None:
    """Decode an image whole, and return the first warning of libjpeg, which Pillow hides: broken files have pixels too.

    JPEGs of all kinds are decoded by simplejpeg's libjpeg-turbo, others by Pillow, which has no warnings to hide there.

    Raises:
        One of ``DAMAGE``: it cannot be decoded.
    """
    with opened(data) as file:
        if file.format not in ("JPEG", "MPO"):
            file.load()
            return None
    try:
        # Luminance alone: the scan is read as a whole, and nothing is wrong with pixels that follow from it.
        simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True, fastupsample=True, strict=True)
    except ValueError as error:
        decode(data)  # an error of libjpeg, rather than a warning, is one of Pillow too
        return str(error)
    return None


def check_resized(width: int, height: int, shorter: int) -> None:
    """Raise ValueError where an image is so long that resizing its shorter side would fill the memory."""
    scale = shorter / min(width, height)
    if width * scale * height * scale > _LARGEST:
        raise ValueError(f"{width}×{height} pixels, too long to have its shorter side resized to {shorter}")
