"""Class folders, archives, shards and parquet made of the same images: the same pixels, weights and records."""

import json

import pytest
import torch
from images import make_tree
from layouts import LAYOUTS, make

from largebatch.config.groups import LoaderConfig
from largebatch.data.source import Target, open_source
from largebatch.records.provenance import Run
from largebatch.runtime.placement import Hardware, place
from largebatch.training.loop import fit

WORDS = (
    *("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "dataset.resize=32", "model=resnet8"),
    *("k=2", "n=4", "epochs=1", "threads=1", "device=cpu", "precision=fp32", "log_every=1"),
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    tree = make_tree(tmp_path_factory.mktemp("same") / "tree", train=6, val=3)
    classes = sorted((tree / "val").iterdir())
    for label, folder in enumerate(classes):  # as ImageNet's validation images are named, in every layout
        for number, image in enumerate(sorted(folder.iterdir())):
            image.rename(folder / f"ILSVRC2012_val_{number * len(classes) + label + 1:08d}.JPEG")
    return {layout: make(layout, tree, tree.parent / layout) for layout in LAYOUTS}


def test_every_layout_trains_and_validates_to_the_same_records_and_weights(roots, compose, tmp_path):
    """Three iterations; the layouts are read in loader processes in turn with none, and by both decoders."""
    records, weights, digests = {}, {}, {}
    decoders = dict.fromkeys(LAYOUTS, "native") | {"pillow": "pillow"}
    for number, (layout, decoder) in enumerate(decoders.items()):
        root = roots.get(layout, roots["folders"])
        config = compose(*WORDS, f"dataset.root={root}", f"loader.workers={number % 2}", f"dataset.decoder={decoder}")
        fit(Run.of(config, place(config, Hardware(cores=1, gpus=0, mps=False, bf16=False)), tmp_path / layout))
        origin = json.loads((tmp_path / layout / "provenance.json").read_text())
        assert origin["decoder"] == decoder
        digests[layout] = origin["data"]["digest"]
        lines = [json.loads(line) for line in (tmp_path / layout / "metrics.jsonl").read_text().splitlines()]
        timed = ("time", "seconds", "images_per_second")
        records[layout] = [{key: value for key, value in line.items() if key not in timed} for line in lines]
        weights[layout] = (tmp_path / layout / "model.safetensors").read_bytes()
    assert [line["kind"] for line in records["folders"]].count("epoch") == 1
    assert records["folders"][-1]["iteration"] == 3
    assert len({*digests.values()}) == 1
    for layout in decoders:
        assert records[layout] == records["folders"]
        assert weights[layout] == weights["folders"]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_loader_processes_read_archives_for_themselves(layout, roots, compose):
    """The parent has read from them before it forks, and goes on after."""

    def batch(workers):
        config = compose(*WORDS, f"dataset.root={roots[layout]}").dataset
        target = Target(torch.device("cpu"), torch.float32)
        source = open_source(config, LoaderConfig(workers=workers, prefetch=1), 3, target, cores=1)
        return [part.images for _ in range(2) for part in source.train((epoch, torch.arange(24)) for epoch in range(2))]

    alone, shared, again = batch(0), batch(2), batch(0)
    for mine, other, last in zip(alone, shared, again, strict=True):
        assert mine.equal(other)
        assert mine.equal(last)
