"""Images a second that one core turns from JPEG files into normalised crops, by our decoder and by Pillow."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.bench.compare import Side, Timings, take_turns
from largebatch.bench.loader import Loading
from largebatch.config.groups import DatasetConfig
from largebatch.data.layouts import open_splits

BATCH = 32
MOST = 10_000  # images: every side reads all of them in every turn, and an archive is made of them
# Others that turn the same JPEGs into crops, by name: scripts/peers/decoding.py fills it, the package has none.
PEERS: dict[str, Callable[[DatasetConfig], Side]] = {}


def reading(files: DatasetConfig, batches: Callable[[], Iterator[Tensor]]) -> Side:
    """Return turns that read all training images of ``files`` once, in batches that ``batches`` makes."""

    def turn() -> None:
        for _ in batches():
            pass

    return Side(turn, len(open_splits(files).train))


def crops(files: DatasetConfig) -> Iterator[Tensor]:
    """Yield float32 (batch, 3, H, W), normalised, as a run does, in this process.

    A GPU would get uint8, and normalise it there.
    """
    return Loading(files, BATCH, workers=0, prefetch=1).ours()


def time_data(files: DatasetConfig, repeats: int, work: Path) -> Timings:
    """Time one pass over all training images of each side in turn.

    Seconds are the processor's, of all threads, so that images/s are those of one core on a busy machine too.

    Args:
        files: Class folders.
        repeats: Timed turns of each side.
        work: An empty directory, for the same images in an archive.

    Returns:
        Sides ``ours``, ``ours_tar`` (from an archive in place), ``ours_pillow`` (decoder=pillow) and those of
        ``PEERS``.

    Raises:
        UserError: dataset.decoder is neither auto nor native, or there are more images than ``MOST``.
    """
    if files.decoder not in ("auto", "native"):
        raise UserError(
            f"bench.files.decoder={files.decoder}: bench data measures the native decoder and has Pillow beside it. "
            "Leave it out."
        )
    torch.set_num_threads(1)
    images = len(open_splits(files).train)
    if images > MOST:
        raise UserError(
            f"bench data reads all training images in every turn, and {files.root} has {images:,}: name a directory "
            f"with {MOST:,} of them at most, or none for photographs that are made here."
        )
    ours = {
        "ours": files,
        "ours_tar": replace(files, root=str(as_shards(files, work))),
        "ours_pillow": replace(files, decoder="pillow"),
    }
    sides = {name: reading(files, partial(crops, one)) for name, one in ours.items()}
    sides |= {name: peer(files) for name, peer in PEERS.items()}
    return take_turns(sides, repeats, "decoding", clock=time.process_time)


def as_shards(files: DatasetConfig, work: Path) -> Path:
    """Put the images of class folders into WebDataset's shards, one a split, and return their directory."""
    opened = open_splits(files)
    for split, part in (("train", opened.train), ("val", opened.val)):
        with tarfile.open(work / f"{split}-0.tar", "w") as archive:
            for row in range(len(part)):
                label = work / "label"
                label.write_text(str(part.labels[row]))
                archive.add(part.where(row), f"{row:08d}.jpg")
                archive.add(label, f"{row:08d}.cls")
    (work / "label").unlink()
    return work


def data_facts(files: DatasetConfig, repeats: int, work: Path) -> dict[str, Any]:
    """Return ratios, images/s and the mean size of a file."""
    timings = time_data(files, repeats, work)
    train = open_splits(files).train
    ratios = {name: timings.ratio("ours", name) for name in PEERS}
    ratios["pillow"] = timings.ratio("ours", "ours_pillow")
    ratios["tar_vs_folders"] = timings.ratio("ours_tar", "ours")
    return {
        "ratios": {name: vars(one) for name, one in ratios.items()},
        "images_per_second": {name: timings.speed(name) for name in timings.seconds},
        "file_bytes": float(train.sizes().mean()),
    }


def as_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the page for people, but for the ratios."""
    lines = [
        f"data: JPEGs of {facts['file_bytes'] / 1000:,.0f} KB to crops, in batches of {facts['setting']['batch']}; "
        "seconds are one core's",
        "",
        f"{'images/s':<46} {'median':>8}",
    ]
    return lines + [
        f"{name.replace('_', ', '):<46} {speed:>8,.0f}" for name, speed in facts["images_per_second"].items()
    ]
