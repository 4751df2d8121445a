"""The decoder in C that lies beside this file: crops of JPEGs as Pillow makes them, in half the time.

It is compiled once, by the machine's C compiler, into the directory of caches, and called without Python's lock. Before
it is used it must agree with the Pillow that is installed, bit for bit, on photographs' kinds of JPEG. What it refuses
(progressive, CMYK, damaged and other odd files) is left to Pillow, so the pixels of a run do not depend on who decoded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from largebatch.data.index import cache_directory

HERE = Path(__file__).parent
SOURCES = [HERE / "jpeg.c", HERE / "crop.c"]
Box = tuple[int, int, int, int]  # top, left, height, width


class Unavailable(RuntimeError):
    """Why there is no such decoder on this machine, in a few words."""


@functools.cache  # a process loads it once
def load() -> ctypes.CDLL:
    """Return the compiled decoder, compiling it where that has not been done.

    Raises:
        Unavailable: there is no C compiler, its output cannot be kept where others cannot change it, or Pillow decodes
            otherwise.
    """
    path = _compiled()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # a directory of caches that may not be run from, or that other systems share
        raise Unavailable(
            f"it cannot be loaded ({error}): set LARGEBATCH_CACHE to a directory of this machine"
        ) from None
    library.jpeg_size.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)]
    library.jpeg_crop.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_ssize_t)),
    ]
    _check_agreement(library)
    return library


def size(data: bytes) -> tuple[int, int] | None:
    """Return an image's width and height from its header, or None where it is not for this decoder."""
    found = (ctypes.c_int * 2)()
    return (found[0], found[1]) if load().jpeg_size(data, len(data), found) else None


def crop_into(out: Tensor, data: bytes, box: Box, mirrored: bool) -> bool:
    """Decode a crop, resize it and write it to ``out``.

    Args:
        out: uint8 (3, H, W) of any strides.
        data: A whole JPEG.
        box: In pixels of the image.
        mirrored: Whether to turn left and right.

    Returns:
        Whether it was for this decoder; else ``out`` is as it was.
    """
    return _crop_into(load(), out, data, box, mirrored)


def _crop_into(library: ctypes.CDLL, out: Tensor, data: bytes, box: Box, mirrored: bool) -> bool:
    channel, down, right = out.stride()
    height, width = out.shape[1:]
    start = out.data_ptr() + (right * (width - 1) if mirrored else 0)
    strides = (ctypes.c_ssize_t * 3)(-right if mirrored else right, down, channel)
    return bool(library.jpeg_crop(data, len(data), (ctypes.c_int * 4)(*box), height, width, start, strides))


def _compiled() -> Path:
    """Return the library, whose name ends with the digest of its bytes: another file is compiled anew, not loaded."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    compiler = shlex.split(os.environ.get("CC") or found)  # CC may be "ccache gcc"
    if not compiler:
        raise Unavailable("there is no C compiler: install gcc or clang")
    # Pillow's weights are computed without fused multiply-add.
    command = [*compiler, "-std=gnu11", "-O3", "-ffp-contract=off", "-shared", "-fPIC", *_instructions()]
    words = [*command, platform.machine()]
    content = b"\0".join([*(path.read_bytes() for path in sorted(HERE.glob("*.[ch]"))), *map(os.fsencode, words)])
    name = f"jpeg-{_digest(content)}"
    directory = cache_directory() / f"native-{os.getuid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _ours_alone(directory):
            raise Unavailable(f"{directory} is writable by others: set LARGEBATCH_CACHE to a directory of your own")
        for path in directory.glob(f"{name}-*.so"):
            if _ours_alone(path) and path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary, "jpeg.so")
            _run([*command, "-o", str(made), *map(str, SOURCES), "-lm"])
            made.chmod(0o700)
            # Another process may have put one there meanwhile: each is a whole file.
            return made.replace(directory / f"{name}-{_digest(made.read_bytes())}.so")
    except OSError as error:
        raise Unavailable(f"it cannot be compiled into {directory} ({error}): set LARGEBATCH_CACHE") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _ours_alone(path: Path) -> bool:
    """Whether a file or directory, no link to one, is this user's, and no other user may write to it."""
    status = path.lstat()
    return status.st_uid == os.getuid() and not stat.S_ISLNK(status.st_mode) and not status.st_mode & 0o022


def _instructions() -> Sequence[str]:
    """Return the compiler's options for what this processor has; a cache may be shared with older ones."""
    capability = torch.backends.cpu.get_cpu_capability()
    return ["-mavx2", "-mbmi2"] if capability in ("AVX2", "AVX512") else []


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"the C compiler {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        first = lines[0] if lines else f"exit status {done.returncode}"
        raise Unavailable(f"{command[0]} cannot compile it, as GCC 11 and Clang can: {first}")


def _check_agreement(library: ctypes.CDLL) -> None:
    """Hold the decoder against the Pillow that is here, over each kind of JPEG that it reads."""
    down, right = np.mgrid[:97, :131]
    waves = [np.sin(right * right / 300 + down / 7), np.cos(down * right / 500), np.sin(down * down / 200 - right / 9)]
    image = Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))
    for kind, options in (("RGB", {"subsampling": 0}), ("RGB", {"subsampling": 1}), ("RGB", {}), ("L", {})):
        encoded = BytesIO()
        image.convert(kind).save(encoded, "JPEG", quality=90, **options)
        for box in ((5, 9, 61, 90), (1, 30, 95, 28)):
            got = torch.empty((3, 32, 40), dtype=torch.uint8)
            top, left, height, width = box
            with Image.open(BytesIO(encoded.getvalue())) as file:
                cut = file.convert("RGB").crop((left, top, left + width, top + height))
            wanted = np.asarray(cut.resize((40, 32), Image.Resampling.BILINEAR))
            good = _crop_into(library, got, encoded.getvalue(), box, mirrored=False)
            if not good or not np.array_equal(got.permute(1, 2, 0).numpy(), wanted):
                raise Unavailable(f"Pillow {PIL.__version__} decodes or resizes otherwise")
