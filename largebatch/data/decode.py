"""Encoded images to pixels."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import native

# What Pillow's decoders raise on damaged files, and on absurd sizes.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# What images of data sets are. Pillow knows more, and hands PostScript to a program of its own, Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
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
    with Image.open(BytesIO(data), formats=FORMATS) as file:
        if file.mode.startswith("I;16"):  # which Pillow would clip at 255
            return file.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
        if file.mode == "P" and "transparency" in file.info:
            return file.convert("RGBA").convert("RGB")
        return file.convert("RGB")


def check_resized(width: int, height: int, shorter: int) -> None:
    """Raise ValueError where an image is so long that resizing its shorter side would fill the memory."""
    scale = shorter / min(width, height)
    if width * scale * height * scale > _LARGEST:
        raise ValueError(f"{width}×{height} pixels, too long to have its shorter side resized to {shorter}")
