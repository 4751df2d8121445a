"""A part of Fashion-MNIST, as a data set of its own in the same format."""

from __future__ import annotations

import gzip
from pathlib import Path

FILES = (("images-idx3", 16), ("labels-idx1", 8))  # name, bytes of its head


def take_first(source: Path, out: Path, train: int, validation: int) -> None:
    """Write the first images of a set, and their labels; files that are there are left alone.

    Args:
        source: Directory of the four ``-ubyte.gz`` files.
        out: Directory to write, made if need be.
        train: Images of the training set.
        validation: Images of the test set, which studies validate on.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", validation)):
        for kind, head in FILES:
            name = f"{split}-{kind}-ubyte.gz"
            if (out / name).exists():
                continue
            values = bytearray(gzip.decompress((source / name).read_bytes()))
            size = (len(values) - head) // int.from_bytes(values[4:8], "big")  # of one image, or label
            values[4:8] = count.to_bytes(4, "big")
            partial = out / f"{name}.partial"
            partial.write_bytes(gzip.compress(values[: head + count * size], compresslevel=1, mtime=0))
            partial.rename(out / name)
