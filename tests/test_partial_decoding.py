"""libjpeg-turbo's partial decoding, which scripts/peers compares with the native decoder."""

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
from images import photograph
from PIL import Image

PEERS = Path(__file__).parents[1] / "scripts" / "peers"


@pytest.fixture
def partial(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    module = importlib.import_module("partial_decoding")
    if module.library() is None:
        pytest.skip(f"it is not here: {module.INSTALL}")
    return module


def test_a_part_has_the_pixels_of_the_whole(partial):
    """But for the columns at its sides, where colours are interpolated without their neighbours."""
    buffer = io.BytesIO()
    photograph("coffee").resize((187, 141)).save(buffer, "JPEG")
    whole = np.asarray(Image.open(buffer))
    top, left, height, width = box = (20, 40, 70, 90)
    part, first = partial.decode_part(buffer.getvalue(), box)
    assert first <= left < left + width <= first + part.shape[1]
    assert part.shape[0] == height
    inner = slice(left - first + 1, left - first + width - 1)
    apart = part[1:-1, inner].astype(int) - whole[top + 1 : top + height - 1, left + 1 : left + width - 1]
    assert np.abs(apart).mean() < 0.1


def test_what_is_no_jpeg_is_refused(partial):
    with pytest.raises(ValueError, match="libjpeg refuses it"):
        partial.decode_part(b"no JPEG", (0, 0, 8, 8))


def test_it_joins_the_table_of_bench_loader(partial, monkeypatch, compose, tmp_path):
    decoding = importlib.import_module("decoding")
    # What is added stays in this test.
    monkeypatch.setattr(decoding.data, "PEERS", {})
    monkeypatch.setattr(decoding.results, "NAMES", {})
    monkeypatch.setattr(decoding.loader, "PEERS", {})
    decoding.add_installed()
    config = compose("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "loader.workers=0")
    what = decoding.loader.loading(
        decoding.loader.make_photographs(tmp_path, config.dataset, 8), config.loader, batch=8, cores=1
    )
    (images,), (ours,) = (list(side(what)) for side in (decoding.loader.PEERS["libjpeg_turbo"], type(what).torchvision))
    assert images.shape == ours.shape == (8, 3, 32, 32)
    # Other crops of the same photographs, normalised alike.
    assert abs(images.mean() - ours.mean()) < 0.5
    assert "loader_vs_libjpeg_turbo" in decoding.results.NAMES
