"""Encoded images to pixels."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

# What Pillow's decoders raise on damaged files, and on absurd sizes.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_LARGEST = 2**27  # pixels of an image, also after its shorter side was resized


def decode(data: bytes) -> Image.Image:
    """Decode an image as RGB; ImageNet holds greyscale, CMYK and PNG files among its .JPEGs.

    Raises:
        One of ``DAMAGE``: it cannot be decoded.
    """
    with Image.open(BytesIO(data)) as file:
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
