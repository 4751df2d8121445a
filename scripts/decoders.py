"""Ways from a JPEG to a crop of 224×224: what each costs a core, and how far its pixels are from Pillow's.

scripts/decoders.py [COUNT]

Photographs and crops are those of `largebatch bench data`. What is not installed is left out: libjpeg-dev, OpenCV.
"""

import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from peers import partial_decoding
from PIL import Image
from torchvision.io import decode_jpeg

from largebatch.bench.compare import Side, take_turns
from largebatch.bench.loader import write_photographs
from largebatch.data import native
from largebatch.data.transforms import draw_resized_crop

SIZE = (224, 224)
Box = tuple[int, int, int, int]
Way = Callable[[bytes, Box], np.ndarray]  # to uint8 (224, 224, 3)


def resized_by_torch(pixels: torch.Tensor, box: Box) -> np.ndarray:
    top, left, height, width = box
    cut = pixels[None, :, top : top + height, left : left + width]
    return F.interpolate(cut, SIZE, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def by_pillow(data: bytes, box: Box) -> np.ndarray:
    top, left, height, width = box
    image = Image.open(BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR))


def natively(data: bytes, box: Box) -> np.ndarray:
    out = torch.empty((*SIZE, 3), dtype=torch.uint8)
    assert native.crop_into(out.permute(2, 0, 1), data, box, mirrored=False)
    return out.numpy()


def by_torchvision(data: bytes, box: Box) -> np.ndarray:
    return resized_by_torch(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)), box)


def by_simplejpeg(data: bytes, box: Box) -> np.ndarray:
    return resized_by_torch(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1), box)


def in_part(data: bytes, box: Box) -> np.ndarray:
    return np.asarray(partial_decoding.resized(data, box, SIZE))


def by_opencv(interpolation: str) -> Way:
    import cv2

    def way(data: bytes, box: Box) -> np.ndarray:
        top, left, height, width = box
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        cut = pixels[top : top + height, left : left + width]
        return cv2.resize(cut, SIZE, interpolation=getattr(cv2, interpolation))

    return way


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {
        "Pillow": by_pillow,
        "native": natively,
        "torchvision.io, torch's antialiased resize": by_torchvision,
    }
    found["simplejpeg, torch's antialiased resize"] = by_simplejpeg
    if partial_decoding.library() is not None:
        found["libjpeg-turbo in part, Pillow's resize"] = in_part
    if importlib.util.find_spec("cv2"):
        found["OpenCV, bilinear"] = by_opencv("INTER_LINEAR")
        found["OpenCV, area"] = by_opencv("INTER_AREA")
    return found


def main(count: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        write_photographs(Path(directory), count)
        files = [path.read_bytes() for path in sorted(Path(directory, "train").rglob("*.jpg"))]
    crops = []
    for number, data in enumerate(files):
        width, height = Image.open(BytesIO(data)).size
        crops.append((data, draw_resized_crop(0, 0, number, width, height, False)[0]))
    tried = ways()
    sides = {name: Side(lambda way=way: [way(*crop) for crop in crops], len(crops)) for name, way in tried.items()}
    timings = take_turns(sides, 7, "ways", clock=time.process_time)
    print("| way | ms of a core | times Pillow's speed | mean difference of 255 | PSNR, dB |\n|---|---|---|---|---|")
    for name, way in tried.items():
        apart = np.stack([way(*crop).astype(float) - by_pillow(*crop) for crop in crops])
        square = (apart**2).mean()
        quality = "∞" if square == 0 else f"{10 * math.log10(255**2 / square):.1f}"
        ratio = timings.ratio(name, "Pillow")
        print(
            f"| {name} | {1000 / timings.speed(name):.2f} | {ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f}) | "
            f"{np.abs(apart).mean():.2f} | {quality} |"
        )


if __name__ == "__main__":
    if len(sys.argv) > 2 or not all(map(str.isdecimal, sys.argv[1:])):
        sys.exit(__doc__)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
