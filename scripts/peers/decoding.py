"""Time `largebatch bench data` beside torchvision's reference, timm, libjpeg-turbo in part, OpenCV and DALI.

    python scripts/peers/decoding.py [key=value ...]
    python scripts/peers/decoding.py loader [key=value ...]

Takes what `largebatch bench data` takes; what is not installed is left out. With `loader`, times
`largebatch bench loader` instead, with libjpeg-turbo in part as one more peer in PyTorch's DataLoader.
`uv sync --group bench` installs OpenCV, `uv sync --group dali` DALI (0.4 GB).
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import partial_decoding
import torch
from torch import Tensor

from largebatch.base.errors import Fault
from largebatch.bench import data, loader, results
from largebatch.bench.compare import Side
from largebatch.bench.data import BATCH, reading
from largebatch.bench.loader import Loading
from largebatch.cli.main import main
from largebatch.config.groups import DatasetConfig
from largebatch.data.layouts import open_splits
from largebatch.data.transforms import draw_resized_crop


def torchvision(files: DatasetConfig) -> Iterator[Tensor]:
    """Yield crops as torchvision's reference does: Pillow, RandomResizedCrop, flip, to float, normalise."""
    return Loading(files, BATCH, workers=0, prefetch=1).torchvision()


def timm(files: DatasetConfig) -> Iterator[Tensor]:
    """Yield crops as timm's default training transform makes them, which jitters colours too."""
    from timm.data.transforms_factory import create_transform
    from torchvision.datasets import ImageFolder

    shape = (3, files.height, files.width)
    folder = ImageFolder(str(Path(files.root or "") / "train"), create_transform(shape, is_training=True))
    for start in range(0, len(folder), BATCH):
        rows = range(start, min(start + BATCH, len(folder)))
        yield torch.stack([folder[row][0] for row in rows])


def libjpeg_turbo(files: DatasetConfig) -> Iterator[Tensor]:
    """Yield the crops that ours are: libjpeg-turbo decodes the part, and Pillow resizes it."""
    return partial_decoding.batches(files, BATCH)


def opencv(files: DatasetConfig) -> Iterator[Tensor]:
    """Yield the crops that ours are, decoded whole and resized without antialiasing, in numpy."""
    import cv2

    cv2.setNumThreads(0)
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


def dali(files: DatasetConfig) -> Side:
    """Return turns of DALI's pipeline on the processor over as many images as there are, with one thread."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def pipeline():
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

    return Side(turn, BATCH * batches)


def side_of(batches: Callable[[DatasetConfig], Iterator[Tensor]]) -> Callable[[DatasetConfig], Side]:
    """Return what makes the side of a data set from what yields its batches."""
    return lambda files: reading(files, partial(batches, files))


# By name: the module it takes, how that is installed, the side, and its line in the table.
SIDES = {
    "torchvision": ("torchvision", "uv sync", side_of(torchvision), "crops ÷ torchvision's reference"),
    "timm": ("timm", "uv sync", side_of(timm), "crops ÷ timm's default transform"),
    "libjpeg_turbo": (
        "jpeglib.h",
        partial_decoding.INSTALL,
        side_of(libjpeg_turbo),
        "crops ÷ libjpeg-turbo's partial decoding",
    ),
    "opencv": ("cv2", "uv sync --group bench", side_of(opencv), "crops ÷ OpenCV, whole and not antialiased"),
    "dali": ("nvidia.dali", "uv sync --group dali", dali, "crops ÷ DALI on the processor"),
}


def found(module: str) -> bool:
    """Whether a module is here; a package such as nvidia may be there without the part that is wanted."""
    if module == "jpeglib.h":
        return partial_decoding.library() is not None
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def add_installed() -> None:
    """Give `bench data` the peers that are here, and print how the others are installed."""
    for name, (module, how, side, line) in SIDES.items():
        if found(module):
            data.PEERS[name] = side
            results.NAMES[name] = line
        else:
            print(f"{name} is not installed: {how}", file=sys.stderr)
    if "libjpeg_turbo" in data.PEERS:
        loader.PEERS["libjpeg_turbo"] = lambda what: what.plain(partial_decoding.Crops(what.files))
        results.NAMES["loader_vs_libjpeg_turbo"] = "loader ÷ libjpeg-turbo's partial decoding"


if __name__ == "__main__":
    add_installed()
    sys.argv[1:1] = ["bench"] if sys.argv[1:2] == ["loader"] else ["bench", "data"]
    main()
