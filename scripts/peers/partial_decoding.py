"""Training crops by libjpeg-turbo's own partial decoding, a peer of the native decoder.

Wheels carry it, though none offers it to Python: Pillow's libjpeg-turbo has the functions, and a few lines of C call
them. Rows above the crop are skipped, columns are cut to whole units, and nothing below is read.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from largebatch.base.errors import Fault
from largebatch.config.groups import DatasetConfig
from largebatch.data.layouts import open_splits
from largebatch.data.transforms import draw_resized_crop

SOURCE = Path(__file__).with_name("partial.c")
Box = tuple[int, int, int, int]
INSTALL = "apt-get install gcc libjpeg-dev, and Pillow from its wheel"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile the calls against libjpeg's header and load them with Pillow's libjpeg-turbo; None: one is missing."""
    found = sorted(Path(PIL.__file__).parent.with_name("pillow.libs").glob("libjpeg-*.so.62*"))
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not found or compiler is None:
        return None
    ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, "partial.so")
        command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        loaded = ctypes.CDLL(str(made))
    loaded.decode_part.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t),
        *(ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)),
    ]
    loaded.decode_part.restype = ctypes.POINTER(ctypes.c_ubyte)
    loaded.free_part.argtypes = [ctypes.POINTER(ctypes.c_ubyte)]
    return loaded


def decode_part(data: bytes, box: Box) -> tuple[NDArray[np.uint8], int]:
    """Decode the rows of ``box`` (top, left, height, width), and of columns all units that it touches.

    Returns:
        RGB (height, columns, 3) and the first column.

    Raises:
        ValueError: it is no JPEG, or libjpeg refuses it.
    """
    loaded = library()
    assert loaded is not None
    columns = (ctypes.c_int * 2)()
    samples = loaded.decode_part(data, len(data), (ctypes.c_int * 4)(*box), columns)
    if not samples:
        raise ValueError("libjpeg refuses it")
    try:
        return np.ctypeslib.as_array(samples, (box[2], columns[1], 3)).copy(), columns[0]
    finally:
        loaded.free_part(samples)


class Crops(Dataset[tuple[Tensor, int]]):
    """The training images of ``files``, cut, resized by Pillow, flipped and normalised: float32 (3, H, W)."""

    def __init__(self, files: DatasetConfig) -> None:
        self.files, self.split = files, open_splits(files).train
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (files.mean, files.std))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        data = self.split.read(row)
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
        box, mirrored = draw_resized_crop(0, 0, row, width, height, self.files.flip)
        try:
            crop = resized(data, box, (self.files.width, self.files.height))
        except ValueError as error:
            raise Fault(f"{self.split.where(row)}: {error}: mend or remove it.") from None
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
        return ((pixels.flip(2) if mirrored else pixels) - self.mean) / self.std, 0


def batches(files: DatasetConfig, batch: int) -> Iterator[Tensor]:
    """Yield the images of :class:`Crops` in order: float32 (batch, 3, H, W)."""
    for images, _ in DataLoader(Crops(files), batch):
        yield images


def resized(data: bytes, box: Box, size: tuple[int, int]) -> Image.Image:
    """Cut ``box`` (top, left, height, width) out of a JPEG and resize it to ``size`` (width, height) as Pillow does."""
    part, first = decode_part(data, box)
    left = box[1] - first
    within = (left, 0, left + box[3], box[2])
    return Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, within)
