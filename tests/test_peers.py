"""scripts/peers: every side handles the same images as ours, and the commands print its ratio."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from largebatch.base.errors import Fault
from largebatch.bench import data, int8, loader, offload, results
from largebatch.bench.compare import Side
from largebatch.cli.main import run

PEERS = Path(__file__).parents[1] / "scripts" / "peers"
SMALL = ("bench.repeats=1", "bench.files.height=32", "bench.files.width=32", "threads=1", "device=cpu")


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def files(compose, tmp_path_factory):
    config = compose("dataset=imagefolder", "dataset.height=32", "dataset.width=32").dataset
    return loader.make_photographs(tmp_path_factory.mktemp("photographs"), config, 40)


@pytest.mark.parametrize("name", ["torchvision", "timm", "libjpeg_turbo", "opencv", "ours"])
def test_every_side_makes_normalised_crops_of_all_photographs(name, files, monkeypatch):
    decoding = script("decoding", monkeypatch)
    if name == "opencv" and not decoding.found("cv2"):
        pytest.skip("opencv is not installed: uv sync --group bench")
    if name == "libjpeg_turbo" and not decoding.found("jpeglib.h"):
        pytest.skip("there is no libjpeg-dev")
    batches = list((data.crops if name == "ours" else getattr(decoding, name))(files))
    assert [tuple(batch.shape) for batch in batches] == [(32, 3, 32, 32), (8, 3, 32, 32)]
    whole = torch.cat(batches)
    assert whole.dtype == torch.float32
    assert whole.mean().abs() < 1
    assert 0.5 < whole.std() < 2


def test_an_image_that_opencv_cannot_decode_is_named(files, monkeypatch):
    fails = SimpleNamespace(setNumThreads=lambda _: None, imdecode=lambda *_: None, IMREAD_COLOR_RGB=256)
    monkeypatch.setitem(sys.modules, "cv2", fails)
    with pytest.raises(Fault, match=r"^OpenCV cannot decode \S+\.jpe?g: mend or remove it\.$"):
        next(script("decoding", monkeypatch).opencv(files))


def test_what_is_installed_is_added_and_what_is_missing_is_printed(monkeypatch, capsys):
    decoding = script("decoding", monkeypatch)
    monkeypatch.setattr(decoding, "found", lambda module: module != "nvidia.dali")
    for module, name in [(data, "PEERS"), (loader, "PEERS"), (results, "NAMES")]:
        monkeypatch.setattr(module, name, {})
    decoding.add_installed()
    assert set(data.PEERS) == {"torchvision", "timm", "libjpeg_turbo", "opencv"}
    assert set(results.NAMES) == {*data.PEERS, "loader_vs_libjpeg_turbo"}
    assert capsys.readouterr().err == "dali is not installed: uv sync --group dali\n"


def test_decoding_prints_a_ratio_for_a_peer(monkeypatch, capfd):
    side = script("decoding", monkeypatch).SIDES["torchvision"][2]
    monkeypatch.setattr(data, "PEERS", {"torchvision": side})
    assert run(["bench", "data", *SMALL, "bench.photographs=32", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert set(facts["ratios"]) == {"torchvision", "pillow", "tar_vs_folders"}


def test_offloading_prints_a_ratio_for_a_peer(monkeypatch, capfd):
    offloading = script("offloading", monkeypatch)
    assert [*map(callable, offloading.SIDES)] == [True] * 3

    def resident(model, device, stack):
        model.to(device)
        return lambda: None

    monkeypatch.setattr(offload, "PEERS", {"peer": resident})
    monkeypatch.setitem(offload.NAMES, "peer", "a peer")
    words = ("dataset=synthetic_small", "model=resnet8", "n=4", "bench.batches=[2]")
    assert run(["bench", "offload", *SMALL, *words, "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert {"peer_vs_resident", "leaf_vs_peer", "bytes_vs_peer"} <= set(facts["batches"]["2"]["ratios"])
    assert "a peer" in results.as_text(facts)


def test_integers_print_a_ratio_for_a_peer(monkeypatch, capfd):
    monkeypatch.setattr(int8, "PEERS", [lambda model, calibration: {"peer": model}])
    words = ("dataset=synthetic_small", "model=resnet8", "bench.batches=[2]", "bench.photographs=32")
    assert run(["bench", "quantize", *SMALL, *words, "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert "x86_vs_peer" in facts["batches"]["2"]["ratios"]


def test_onnxruntimes_own_integers_answer_as_the_floats_do(monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: uv sync --group bench")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    images = torch.randn(64, 3, 8, 8)
    sides = script("integers", monkeypatch).onnxruntime_sides(model.eval(), images)
    floats, integers = (torch.from_numpy(sides[f"onnxruntime_{name}"](images)[0]) for name in ("float32", "static"))
    torch.testing.assert_close(floats, model(images), rtol=1e-4, atol=1e-5)
    assert int8.decibels(floats, integers) > 20


def test_a_side_reads_all_images(files):
    seen = []
    side = data.reading(files, lambda: iter([seen.append(1), seen.append(2)]))
    assert isinstance(side, Side)
    side.turn()
    assert (side.images, seen) == (len(data.open_splits(files).train), [1, 2])
