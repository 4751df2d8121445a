"""Try to break what reads strangers' bytes: make fuzz, or PYTHONPATH=tests python tests/data/fuzz.py SECONDS [SEED].

A third of the time for the decoder in C under the address and undefined-behaviour sanitizers of Clang or GCC, a third
for its pixels against Pillow's, and a third for the readers of archives, shards, parquet files and tables, which may
raise a sentence for people and nothing else. What breaks is kept as fuzz-found-* in the current directory.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import torch
from damage import damaged
from images import make_tree, photograph
from layouts import make, pack_devkit
from torchvision.transforms import functional

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import native
from largebatch.data.decode import DAMAGE, decode
from largebatch.data.layouts import open_splits

JPEGS = ({}, {"subsampling": 1}, {"subsampling": 0}, {"quality": 5}, {"quality": 100}, {"restart_marker_blocks": 5})


class Found(Exception):
    """What broke, and the bytes that did it."""

    def __init__(self, what: str, data: bytes) -> None:
        super().__init__(what)
        self.data = data


def until(seconds: float) -> Iterator[int]:
    """Count up for some seconds, once at least."""
    end, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < end:
        yield number
        number += 1


def jpegs() -> list[bytes]:
    found = []
    for mode in ("RGB", "L"):
        for options in JPEGS:
            buffer = BytesIO()
            photograph("coffee").resize((187, 141)).convert(mode).save(buffer, "JPEG", **options)
            found.append(buffer.getvalue())
    return found


def compiled(work: Path) -> Path:
    """Compile the decoder and a program that feeds it damaged files, with sanitizers."""
    compiler = shutil.which("clang") or shutil.which("gcc")
    if compiler is None:
        sys.exit("fuzzing needs clang or gcc")
    program, source = work / "damaged", Path(__file__).with_name("damaged_jpegs.c")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]
    sources = [str(source), *map(str, native.SOURCES)]
    subprocess.run([compiler, *flags, f"-I{native.HERE}", *sources, "-o", str(program), "-lm"], check=True)
    return program


def sanitized(seconds: float, seed: int, work: Path) -> int:
    """Feed damaged files to the sanitized decoder, and return how many."""
    program, paths = compiled(work), []
    for number, data in enumerate(jpegs()):
        paths.append(work / f"{number}.jpg")
        paths[-1].write_bytes(data)
    tried = 0
    for number in until(seconds):
        words = [str(program), str(seed + number), "1000", *map(str, paths)]
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode:
            raise Found(f"the decoder, with the seed {seed + number}", done.stderr)
        tried += 1000
    return tried


def against_pillow(seconds: float, seed: int, work: Path) -> int:
    """Compare the decoder's pixels with Pillow's on damaged files, and return how many it read."""
    chance, whole, read = random.Random(seed), jpegs(), 0
    for _ in until(seconds):
        data = damaged(chance.choice(whole), chance)
        width, height = native.size(data) or (0, 0)
        if not 0 < width * height < 2**21:
            continue
        h, w = chance.randint(1, height), chance.randint(1, width)
        box = (chance.randint(0, height - h), chance.randint(0, width - w), h, w)
        pixels = torch.empty((3, 24, 40), dtype=torch.uint8)
        if not native.crop_into(pixels, data, box, mirrored=False):
            continue
        read += 1
        try:
            wanted = functional.pil_to_tensor(functional.resized_crop(decode(data), *box, [24, 40]))
        except DAMAGE as error:
            raise Found(f"the decoder reads what Pillow refuses ({error}), box {box}", data) from None
        if not pixels.equal(wanted):
            raise Found(f"the decoder's pixels differ from Pillow's, box {box}", data)
    return read


def changed(data: bytes, chance: random.Random) -> bytes:
    """Change, cut, repeat or zero some bytes, more often near the start or the end, where headers lie."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        near = chance.choice((64, 2048, len(found)))
        at = chance.randrange(min(near, len(found)))
        at = at if chance.random() < 0.6 else len(found) - 1 - at
        kind = chance.randrange(6)
        if kind < 3:
            found[at] = chance.choice((0, 255, ord("9"), found[at] ^ 1 << chance.randrange(8), chance.randrange(256)))
        elif kind == 3:
            found[at : at + chance.choice((1, 512))] = b""
        elif kind == 4:
            found[at:at] = found[at : at + 512]
        else:
            found[at : at + 16] = bytes(len(found[at : at + 16]))
        if not found:
            break
    return bytes(found)


def config_of(root: Path) -> DatasetConfig:
    sizes = {"train_images": None, "val_images": None, "classes": None, "channels": 3, "height": 1, "width": 1}
    augmentation = {"crop": "none", "pad": 0, "flip": False, "resize": None, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    others = {"decoder": "pillow", "on_error": "stop", "holdout": None, "holdout_seed": 0}
    return DatasetConfig(name="imagefolder", root=str(root), **sizes, **augmentation, **others)


def readers(seconds: float, seed: int, work: Path) -> int:
    """Damage archives, shards, parquet files and kept indexes, open what is left, and return how many were tried."""
    chance, tree = random.Random(seed), make_tree(work / "tree", train=1, val=1)
    targets = []
    for layout in ("official", "shards", "parquet"):
        root = make(layout, tree, work / layout)
        open_splits(config_of(root))
        if layout == "official":
            pack_devkit(root)
        targets += [(root, path) for path in sorted(root.rglob("*.*")) if path.is_file()]
    tried = 0
    for number in until(seconds):
        root, path = targets[number % len(targets)]
        whole = path.read_bytes()
        path.write_bytes(changed(whole, chance))
        try:
            opened = open_splits(config_of(root), anew=path.suffix != ".safetensors")
            for split in (opened.train, opened.val):
                for row in range(len(split)):
                    try:
                        split.read(row)
                    except (UserError, *DAMAGE):
                        continue
        except UserError as error:
            if "\n" in str(error):
                raise Found(f"{path.name}: lines in a sentence: {error}", path.read_bytes()) from None
        except Exception as error:  # whatever is no sentence is what is looked for
            raise Found(f"{path.name}: {error!r}", path.read_bytes()) from error
        path.write_bytes(whole)
        tried += 1
    return tried


PARTS: dict[str, Callable[[float, int, Path], int]] = {
    "damaged JPEGs through the sanitized decoder": sanitized,
    "damaged JPEGs read to the pixels of Pillow": against_pillow,
    "damaged archives, shards, parquet files and indexes opened": readers,
}


def main(seconds: float, seed: int) -> int:
    """Spend a third of the time on each part; return 1 where something broke."""
    warnings.simplefilter("ignore")  # of Pillow, about odd files
    for what, part in PARTS.items():
        with tempfile.TemporaryDirectory() as work:
            try:
                print(f"{part(seconds / len(PARTS), seed, Path(work)):,} {what}", flush=True)
            except Found as found:
                kept = Path(f"fuzz-found-{part.__name__}")
                kept.write_bytes(found.data)
                print(f"{found} (seed={seed}; kept as {kept})", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 3 or not all(map(str.isdecimal, sys.argv[1:])):
        sys.exit(__doc__)
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(given[0] if given else 60, given[1] if len(given) > 1 else time.time_ns() % 2**31))
