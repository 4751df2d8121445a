"""Images that dataset.on_error=skip leaves out are named in the record of their run."""

import json

from images import make_tree, spoil

from largebatch.records.provenance import Run
from largebatch.records.write import SKIPPED, Skipped
from largebatch.runtime.placement import Hardware, place
from largebatch.training.loop import fit

WORDS = (
    *("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "dataset.resize=32", "dataset.on_error=skip"),
    *("model=resnet8", "k=2", "n=4", "epochs=2", "threads=1", "device=cpu", "precision=fp32", "loader.workers=1"),
)


def test_a_run_names_each_image_that_it_left_out(compose, tmp_path):
    tree = make_tree(tmp_path / "tree", train=6, val=3)
    train = spoil(tree / "train" / "coffee" / "00000003.JPEG")
    val = spoil(tree / "val" / "chelsea" / "00000001.JPEG")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SKIPPED).write_text("of a run that was here before\n")
    config = compose(*WORDS, f"dataset.root={tree}")
    fit(Run.of(config, place(config, Hardware(cores=1, gpus=0, mps=False, bf16=False)), tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["replaced"], line["val_unreadable"]) for line in epochs] == [(1, 1), (1, 1)]
    named = (tmp_path / "run" / SKIPPED).read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in named) == [f"corrupt image {train}", f"corrupt image {val}"]


def test_processes_name_an_image_once_on_one_line(tmp_path):
    first, second = Skipped(tmp_path), Skipped(tmp_path)
    for skipped in (first, second, first):
        skipped("corrupt image a.jpg: broken\nheader")
    second("corrupt image \udcff.jpg: broken")
    assert (tmp_path / SKIPPED).read_text().splitlines() == [
        "corrupt image a.jpg: broken header",
        "corrupt image \\udcff.jpg: broken",
    ]
