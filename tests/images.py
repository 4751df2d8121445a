"""Class folders of real photographs, in ImageNet's layout and with its oddities."""

from pathlib import Path

import skimage.data
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "motorcycle_left")  # those that come with scikit-image's wheel


def photograph(name: str) -> Image.Image:
    with Image.open(Path(skimage.data.__file__).with_name(f"{name}.png")) as file:
        return file.convert("RGB")


def make_tree(root: Path, train: int = 6, val: int = 3) -> Path:
    """Write train/ and val/ with one class a photograph: parts of it in many sizes, named .JPEG as ImageNet's are.

    The first images of training are a greyscale, a CMYK and a PNG that is named .JPEG.
    """
    for split, images in (("train", train), ("val", val)):
        for name in PHOTOGRAPHS:
            folder = root / split / name
            folder.mkdir(parents=True)
            whole = photograph(name)
            for number in range(images):
                side = 80 + 17 * number
                part = whole.crop((5 * number, 3 * number, 5 * number + 2 * side, 3 * number + side + 40))
                mode = {0: "L", 1: "CMYK"}.get(number, "RGB") if split == "train" else "RGB"
                kind = "PNG" if split == "train" and number == 2 else "JPEG"
                part.convert(mode).save(folder / f"{number:08d}.JPEG", kind)
    return root


def spoil(path: Path) -> Path:
    """Cut a file short, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[:300])
    return path
