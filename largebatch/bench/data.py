"""Images a second that one core turns from JPEG files into normalised crops: ours, and the usual pipelines."""

from __future__ import annotations

import importlib.util
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largebatch.base.errors import Fault, UserError
from largebatch.bench.compare import Side, Timings, take_turns
from largebatch.bench.loader import Loading
from largebatch.config.groups import DatasetConfig
from largebatch.data.layouts import open_splits
from largebatch.data.transforms import draw_resized_crop

BATCH = 32
MOST = 10_000  # images: every side reads all of them in every turn, and an archive is made of them
# What each peer takes, and how it is installed.
PEERS = {
    "torchvision": ("torchvision", "uv sync"),
    "timm": ("timm", "uv sync"),
    "opencv": ("cv2", "uv sync --group bench"),
    "dali": ("nvidia.dali", "uv sync --group dali"),
}


def installed() -> list[str]:
    """Return the peers that are here."""
    # A package such as nvidia may be there without the part that is asked for.
    return [name for name, (module, _) in PEERS.items() if _found(module)]


def _found(module: str) -> bool:
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Crops:
    """One side: batches of float32 (batch, 3, H, W), normalised, of every training image of ``files`` once."""

    files: DatasetConfig

    def ours(self) -> Iterator[Tensor]:
        """Yield them as a run does, in this process: a GPU would get uint8, and normalise it there."""
        return Loading(self.files, BATCH, workers=0, prefetch=1).ours()

    def torchvision(self) -> Iterator[Tensor]:
        """Yield them as torchvision's reference does: Pillow, RandomResizedCrop, flip, to float, normalise."""
        return Loading(self.files, BATCH, workers=0, prefetch=1).torchvision()

    def timm(self) -> Iterator[Tensor]:
        """Yield them as timm's default training transform makes them, which jitters colours too."""
        from timm.data.transforms_factory import create_transform
        from torchvision.datasets import ImageFolder

        shape = (3, self.files.height, self.files.width)
        folder = ImageFolder(str(Path(self.files.root or "") / "train"), create_transform(shape, is_training=True))
        for start in range(0, len(folder), BATCH):
            rows = range(start, min(start + BATCH, len(folder)))
            yield torch.stack([folder[row][0] for row in rows])

    def opencv(self) -> Iterator[Tensor]:
        """Yield the crops that ours are, decoded whole and resized without antialiasing, in numpy."""
        import cv2

        cv2.setNumThreads(0)
        files = self.files
        split = open_splits(files).train
        mean, std = (np.array(values, dtype=np.float32) * 255 for values in (files.mean, files.std))
        for start in range(0, len(split), BATCH):
            rows = range(start, min(start + BATCH, len(split)))
            batch = np.empty((len(rows), files.height, files.width, 3), dtype=np.float32)
            for slot, row in zip(batch, rows, strict=True):
                pixels = cv2.imdecode(np.frombuffer(split.read(row), dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
                if pixels is None:
                    raise Fault(f"OpenCV cannot decode {split.names[row]}: mend or remove it.")
                box, mirrored = draw_resized_crop(0, 0, row, pixels.shape[1], pixels.shape[0], True)
                top, left, height, width = box
                crop = pixels[top : top + height, left : left + width]
                crop = cv2.resize(crop, (files.width, files.height), interpolation=cv2.INTER_LINEAR)
                np.divide((cv2.flip(crop, 1) if mirrored else crop) - mean, std, out=slot)
            yield torch.from_numpy(batch).permute(0, 3, 1, 2)


def make_dali(files: DatasetConfig) -> Callable[[], None]:
    """Return what runs DALI's pipeline on the processor over as many images as there are, with one thread."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(
            file_root=str(Path(files.root or "") / "train"), random_shuffle=True, name="r"
        )
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[files.height, files.width], interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * value for value in values] for values in (files.mean, files.std))
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=fn.random.coin_flip()
        )
        return images, labels

    built = pipeline()
    built.build()
    batches = -(-built.epoch_size("r") // BATCH)

    def turn() -> None:
        for _ in range(batches):
            built.run()

    return turn


def time_data(files: DatasetConfig, repeats: int, peers: list[str], work: Path) -> Timings:
    """Time one pass over all training images of each side in turn.

    Seconds are the processor's, of all threads, so that images/s are those of one core on a busy machine too.

    Args:
        files: Class folders.
        repeats: Timed turns of each side.
        peers: Names of ``PEERS``.
        work: An empty directory, for the same images in an archive.

    Returns:
        Sides ``ours``, ``ours_tar`` (from an archive in place), ``ours_pillow`` (decoder=pillow) and the peers.

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
    crops = Crops(files)
    sides = {
        "ours": crops.ours,
        "ours_tar": Crops(replace(files, root=str(as_shards(files, work)))).ours,
        "ours_pillow": Crops(replace(files, decoder="pillow")).ours,
        **{name: getattr(crops, name) for name in peers if name != "dali"},
    }
    turns = {name: Side(_exhausting(batches), images) for name, batches in sides.items()}
    if "dali" in peers:
        turns["dali"] = Side(make_dali(files), BATCH * -(-images // BATCH))
    return take_turns(turns, repeats, "decoding", clock=time.process_time)


def _exhausting(batches: Callable[[], Iterator[Tensor]]) -> Callable[[], None]:
    def turn() -> None:
        for _ in batches():
            pass

    return turn


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
    """Return ratios, images/s, the peers that are missing and how to install them, and the mean size of a file."""
    here = installed()
    timings = time_data(files, repeats, here, work)
    train = open_splits(files).train
    ratios = {name: timings.ratio("ours", name) for name in here}
    ratios["pillow"] = timings.ratio("ours", "ours_pillow")
    ratios["tar_vs_folders"] = timings.ratio("ours_tar", "ours")
    return {
        "ratios": {name: vars(one) for name, one in ratios.items()},
        "images_per_second": {name: timings.speed(name) for name in timings.seconds},
        "missing": {name: how for name, (_, how) in PEERS.items() if name not in here},
        "file_bytes": sum(train.size(row) for row in range(len(train))) / len(train),
    }


def as_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the page for people, but for the ratios."""
    lines = [
        f"data: JPEGs of {facts['file_bytes'] / 1000:,.0f} KB to crops, in batches of {facts['setting']['batch']}; "
        "seconds are one core's",
        *(f"{name} is not installed: {how}" for name, how in facts["missing"].items()),
        "",
        f"{'images/s':<46} {'median':>8}",
    ]
    return lines + [
        f"{name.replace('_', ', '):<46} {speed:>8,.0f}" for name, speed in facts["images_per_second"].items()
    ]
