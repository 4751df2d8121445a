"""The digest of a data set: what changes it, what doesn't, and the difference that is named."""

import os
import threading
from hashlib import sha256

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from largebatch.base.errors import UserError
from largebatch.data.files import Folders, Names
from largebatch.data.folders import Survey, class_folders
from largebatch.data.identity import BLOCKS, Identity, block_size, hashed_split, identity_in_memory, identity_of_files
from largebatch.records.provenance import Run
from largebatch.runtime.placement import Hardware, place
from largebatch.runtime.world import World
from largebatch.training import agreement
from largebatch.training.agreement import check_agreement

FILES = {"a": (3, 4), "b": (5, 6), "c": (7,)}  # bytes of the images 0.png, 1.png … of each class


def tree(root, files=FILES):
    for split in ("train", "val"):
        for name, sizes in files.items():
            (root / split / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                (root / split / name / f"{number}.png").write_bytes(b"x" * size)
    return root


def identity(root) -> Identity:
    train, val = (class_folders(root / split, Survey(tolerant=False)) for split in ("train", "val"))
    return identity_of_files(train, val, named=True)


def rename(root, before, after):
    for split in ("train", "val"):
        (root / split / before).rename(root / split / after)


def test_a_moved_root_and_a_copy_are_the_same_data(tmp_path):
    first = identity(tree(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = identity(tmp_path / "two")
    assert moved == first
    assert first.difference(moved) == ""
    assert first.classes == ("a", "b", "c")
    assert (first.train.images, first.val.images) == (5, 5)
    assert Identity.from_mapping(first.to_mapping()) == first


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda root: rename(root, "a", "z"), "class 0 is 'b' now and 'a' before"),
        (lambda root: tree(root, {"d": (1,)}), "4 classes now and 3 before"),
        (
            lambda root: (root / "train/b/0.png").rename(root / "train/b/2.png"),
            "train image 2 is 'b_1' (label 1, class 'b', 6 bytes) now, and the keys differ",
        ),
        (
            lambda root: (root / "train/a/1.png").rename(root / "train/b/2.png"),
            "train image 1 is 'b_0' (label 1, class 'b', 5 bytes) now, and the labels differ",
        ),
        (
            lambda root: (root / "val/c/0.png").write_bytes(b"longer than before"),
            "val image 4 is 'c_0' (label 2, class 'c', 18 bytes) now, and the sizes differ",
        ),
        (
            lambda root: (root / "val/b/1.png").write_bytes(b"y" * 6),
            "val image 3 is 'b_1' (label 1, class 'b', 6 bytes) now, and the contents differ",
        ),
        (
            lambda root: (root / "train/c/1.png").write_bytes(b"more"),
            "train image 5 is 'c_1' (label 2, class 'c', 4 bytes) now, and the labels differ; there are 6 train images "
            "now and were 5",
        ),
        (
            lambda root: (root / "train/b/1.png").unlink(),
            "train image 3 is 'c_0' (label 2, class 'c', 7 bytes) now, and the labels differ; there are 4 train images "
            "now and were 5",
        ),
    ],
    ids=["class", "another class", "key", "label", "size", "contents", "one more", "one less"],
)
def test_the_first_difference_is_named(tmp_path, change, difference):
    before = Identity.from_mapping(identity(tree(tmp_path)).to_mapping())
    change(tmp_path)
    now = identity(tmp_path)
    assert now.digest != before.digest
    assert before.difference(now) == difference


def test_of_a_large_split_the_block_is_named():
    count = 3 * BLOCKS
    assert block_size(count) == 3

    def made(changed):
        keys = [b"%d" % row if row != changed else b"other" for row in range(count)]
        names = Names.of(b"a/" + key + b".png" for key in keys)
        split = Folders(np.zeros(count, np.int32), names, ["a"], os.devnull)
        return identity_of_files(split, split, named=True)

    assert made(None).difference(made(7)) == (
        "the keys of the train images 6 … 8 differ, of which the first is 'a_6' (label 0, class 'a', -1 bytes) now"
    )


def test_sets_in_memory_are_known_by_their_pixels():
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    other = images.copy()
    other[2, 0, 1, 1] = 1
    first, second = (identity_in_memory((those, labels), (images, labels)) for those in (images, other))
    assert first.difference(second) == "train image 2 is one with label 0 now, and the keys differ"
    assert first == identity_in_memory((images.copy(), labels.copy()), (images, labels))


def test_labels_of_any_width_have_one_digest():
    nothing = sha256(b"").digest() * 2  # keys and sizes
    parts = b"".join(sha256(bytes([label, 0, 0, 0])).digest() + nothing for label in (0, 1, 2))
    for kind in (np.uint8, np.int32, np.int64):
        assert hashed_split(np.arange(3, dtype=kind), lambda rows: b"")[1] == sha256(b"3 images" + parts).hexdigest()


class Data:
    """A source as the comparison sees it."""

    def __init__(self, found, pixels=""):
        self.identity, self._pixels = found, pixels

    def pixels_digest(self):
        return self._pixels


def compared(runs, sources):
    """Return what each of several processes, which are threads here, says."""
    store, said = HashStore(), [None] * len(sources)

    def process(rank):
        world = World(rank, len(sources), torch.device("cpu"), rank, store)
        try:
            check_agreement(runs[rank], sources[rank], world)
        except UserError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return said


@pytest.fixture
def run(compose):
    def make(*words):
        config = compose("k=6", "device=cpu", *words)
        return Run.of(config, place(config, Hardware(cores=1, gpus=0, mps=False, bf16=False)))

    return make


def test_processes_with_the_same_data_agree_wherever_these_lie(tmp_path, run):
    one, other = Data(identity(tree(tmp_path / "one")), "p"), Data(identity(tree(tmp_path / "two")), "p")
    runs = [run("threads=1"), run("threads=2"), run(f"dataset.root={tmp_path}")]
    assert compared(runs, [one, other, one]) == [None] * 3


def test_all_processes_name_the_rank_and_its_first_difference(tmp_path, run):
    one = Data(identity(tree(tmp_path / "one")), "p")
    tree(tmp_path / "other", {**FILES, "b": (5, 9)})
    tree(tmp_path / "more", {**FILES, "c": (7, 7)})
    tree(tmp_path / "class", {"a": (3, 4), "b": (5, 6), "d": (7,)})
    other, more, renamed = (Data(identity(tmp_path / name), "p") for name in ("other", "more", "class"))
    usual = run()
    cases = {
        "its data differ: train image 3 is 'b_1' (label 1, class 'b', 9 bytes) there and 'b_1' (label 1, class 'b', 6 "
        "bytes) on rank 0, and the sizes differ": (usual, other),
        "its data differ: train image 5 is 'c_1' (label 2, class 'c', 7 bytes) there and none on rank 0, and the "
        "labels differ; 6 train images there and 5 on rank 0": (usual, more),
        "its data differ: class 2 is 'd' there and 'c' on rank 0": (usual, renamed),
        "configuration (rank 0 → rank 2) seed: 0 → 7": (run("seed=7"), one),
        "dataset.decoder gives other pixels there for the same images": (usual, Data(one.identity, "q")),
    }
    for words, (its_run, its_data) in cases.items():
        said = compared([usual, usual, its_run], [one, one, its_data])
        whole = f"rank 2 does not train what rank 0 trains: {words}. All processes of a run take the same code, "
        assert said == [whole + "configuration and data."] * 3


def test_processes_of_other_versions_are_refused(tmp_path, run, monkeypatch):
    one = Data(identity(tree(tmp_path)))
    found = iter([{"torch": "2.9.0", "python": "3.11"}, {"torch": "2.8.1", "python": "3.12"}])
    monkeypatch.setattr(agreement, "versions", lambda: next(found))  # whichever asks first
    said = compared([run(), run()], [one, one])
    assert said[0] == said[1]
    assert "versions (rank 0 → rank 1) torch: " in said[0]


def test_one_process_compares_nothing(tmp_path, run):
    check_agreement(run(), Data(None), World(0, 1, torch.device("cpu")))
