import importlib.util
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from images import make_tree
from layouts import LAYOUTS, make, pack_devkit, tar_of
from timm.data.imagenet_info import ImageNetInfo

from largebatch.base.errors import UserError
from largebatch.data import index
from largebatch.data.files import Names
from largebatch.data.layouts import open_splits
from largebatch.data.listing import Rows
from largebatch.data.recognise import recognise


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Look in no folder of this machine's, and fill none of its caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LARGEBATCH_DATA", raising=False)
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tree_of_all(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("layouts") / "tree", train=3, val=2)


@pytest.fixture(scope="module")
def roots(tree_of_all):
    return {layout: make(layout, tree_of_all, tree_of_all.parent / layout) for layout in LAYOUTS}


@pytest.fixture
def tree(tree_of_all, tmp_path):
    """Class folders of this test's own."""
    return shutil.copytree(tree_of_all, tmp_path / "tree")


@pytest.fixture
def copy(roots, tmp_path):
    """Return a function that copies a layout without its index: (layout) → root."""
    return lambda layout: shutil.copytree(roots[layout], tmp_path / layout, ignore=shutil.ignore_patterns(index.NAME))


@pytest.fixture
def at(compose):
    """Return a function from a root to the configuration of the images there."""
    return lambda root: replace(compose("dataset=imagefolder").dataset, root=str(root))


def refused(words, config):
    with pytest.raises(UserError, match=words) as caught:
        open_splits(config)
    assert "\n" not in str(caught.value)


def contents(opened):
    return [
        [(int(split.labels[at]), split.read(at), int(split.sizes([at])[0])) for at in range(len(split))]
        for split in (opened.train, opened.val)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_images_in_the_same_order(layout, roots, at, tree_of_all):
    opened = open_splits(at(roots[layout]))
    assert contents(opened) == contents(open_splits(at(tree_of_all)))
    assert opened.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert opened.val.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(opened.train.classes) == 4
    name = {"folders": "class folders", "official": "the official archives", "parquet": "parquet files"}
    assert re.match(rf"dataset=imagefolder: {name.get(layout, layout)} in .*, 12 \+ 8 images", opened.line)


def test_classes_have_their_names_where_the_layout_says_them(roots, at):
    named = ["astronaut", "chelsea", "coffee", "motorcycle_left"]
    classes = {layout: open_splits(at(root)).train.classes for layout, root in roots.items()}
    assert classes == {"folders": named, "official": named, "shards": ["0", "1", "2", "3"], "parquet": named}


def test_where_an_image_lies_is_said_in_the_words_of_its_layout(roots, at):
    said = {layout: open_splits(at(root)).train.where(7) for layout, root in roots.items()}
    assert said["folders"] == str(roots["folders"] / "train" / "coffee" / "00000001.JPEG")
    found = re.fullmatch(r"coffee_00000001.JPEG in (\S+img_train.tar), at byte ([\d,]+)", said["official"])
    offset = int(found[2].replace(",", ""))
    assert Path(found[1]).read_bytes()[offset : offset + 2] == b"\xff\xd8"
    assert re.fullmatch(r"coffee_00000001.jpg in \S+-train-000\d.tar, at byte [\d,]+", said["shards"])
    assert re.fullmatch(r"\S+ in \S+/train-\S+.parquet, row \d of row group \d", said["parquet"])


def test_the_devkit_may_stay_packed(copy, at, roots):
    root = copy("official")
    pack_devkit(root)
    assert contents(open_splits(at(root))) == contents(open_splits(at(roots["official"])))


def test_splits_are_told_by_the_names_of_files_or_of_their_directory(copy, at, roots):
    root = copy("shards")
    for number in range(2):
        for split, word in (("train", "train"), ("validation", "val")):
            (root / word).mkdir(exist_ok=True)
            (root / f"imagenet1k-{split}-000{number}.tar").rename(root / word / f"{number}.tar")
    tar_of({}, root / "imagenet1k-test-0000.tar")
    assert contents(open_splits(at(root))) == contents(open_splits(at(roots["shards"])))


def test_images_of_one_class_are_ordered_by_name_then_by_container_and_place():
    """Shards may number their images anew; a copy of ImageNet may repeat the synset in the names."""
    rows = Rows()
    for label, name, file, place in (
        (1, "n01440764_10_n01440764.JPEG", 0, 0),
        (1, "some/folder/n01440764_1_n01440764.JPEG", 1, 0),
        (0, "000001.jpg", 1, 512),
        (0, "000001.jpg", 0, 2048),
        (0, "000001.jpg", 0, 512),
        (0, "000000.jpg", 1, 0),
    ):
        rows.add(label, name, file, (place, 1), 1)
    table = rows.table()
    assert [table.names[at] for at in range(6)][:1] == ["000000.jpg"]
    assert table.files.tolist() == [1, 0, 0, 1, 1, 0]
    assert table.places[:, 0].tolist() == [0, 512, 2048, 512, 0, 0]
    assert table.names[4] == "n01440764_1_n01440764.JPEG"  # as n01440764_1.JPEG stands before n01440764_10.JPEG


def test_names_of_any_bytes_come_back():
    names = [b"", b"plain.jpg", "Straße.jpg".encode(), b"\xff\xfe.jpg"]
    kept = Names.of(names)
    assert [os.fsencode(kept[number]) for number in range(4)] == names


def test_rows_that_no_set_of_images_has_are_refused():
    for label, name, words in ((-1, "a.jpg", "class -1"), (2**20, "a.jpg", "class 1048576"), (0, "a" * 256, "256 byt")):
        with pytest.raises(UserError, match=words):
            Rows().add(label, name, 0, (0, 1), 1)


# Class folders


def test_folders_are_listed_by_class(at, tree):
    (tree / "train" / "coffee" / "notes.txt").write_text("no image")
    (tree / "train" / "coffee" / "more").mkdir()
    (tree / "train" / "coffee" / "00000000.JPEG").rename(tree / "train" / "coffee" / "more" / "1.jpg")
    (tree / "train" / "list.txt").write_text("no class")
    train = open_splits(at(tree)).train
    assert train.classes == ["astronaut", "chelsea", "coffee", "motorcycle_left"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert train.where(8) == str(tree / "train" / "coffee" / "more" / "1.jpg")


def test_folders_that_cannot_be_a_set_are_refused(at, tree, monkeypatch):
    folder = at(tree)
    refused("needs dataset.root", replace(folder, root=None))
    refused(r"no images in elsewhere; elsewhere does not exist", replace(folder, root="elsewhere"))
    image = str(next(tree.rglob("*.*")))
    refused(r"no images in (.*); \1 is no directory", replace(folder, root=image))
    refused(r"dataset.train_images=13, but class folders in .*tree hold 12 train", replace(folder, train_images=13))
    refused(r"dataset.classes=5, but class folders in .*tree have 4 classes", replace(folder, classes=5))
    refused(
        r"do not have ImageNet-1k's 1000 synsets.*n01440764, .* and 996 more lacking",
        replace(folder, name="imagenet"),
    )
    (tree / "train" / "empty").mkdir()
    refused(r"tree/train: no images .* in empty. Every class folder must hold at least one image", folder)
    shutil.rmtree(tree / "train" / "empty")
    (tree / "val" / "coffee").rename(tree / "val" / "tea")
    refused("do not have the same class folders: coffee only in train, tea only in val", folder)
    shutil.rmtree(tree / "val")
    refused(r"no directory .*tree/val\..*tree holds train\.", folder)
    monkeypatch.setenv("LARGEBATCH_DATA", str(tree))
    refused(r"no directory .*tree/val\.", replace(folder, root=None))


def test_imagenet_is_known_by_its_synsets(compose, tree, tmp_path):
    image = tree / "val" / "coffee" / "00000000.JPEG"
    for split in ("train", "val"):
        for synset in ImageNetInfo("imagenet-1k").label_names():
            (tmp_path / "imagenet" / split / synset).mkdir(parents=True)
            os.link(image, tmp_path / "imagenet" / split / synset / "1.JPEG")
    given = ("dataset=imagenet", f"dataset.root={tmp_path / 'imagenet'}")
    small = compose(*given, "dataset.train_images=null", "dataset.val_images=null").dataset
    opened = open_splits(small)
    assert len(opened.train) == len(opened.val) == 1000
    assert (opened.train.classes[0], opened.train.classes[-1]) == ("n01440764", "n15075141")
    with pytest.raises(UserError, match=r"train_images=1281167, but .* hold 1000 train images: complete the copy"):
        open_splits(compose(*given).dataset)
    for split in ("train", "val"):  # a synset that ImageNet-1k does not have, though ImageNet does
        (tmp_path / "imagenet" / split / "n01440764").rename(tmp_path / "imagenet" / split / "n00007846")
    with pytest.raises(UserError, match="n01440764 lacking, n00007846 unknown"):
        open_splits(small)


def test_imagenet_in_shards_is_numbered_by_sorted_synsets(compose, tmp_path):
    synsets = sorted(ImageNetInfo("imagenet-1k").label_names())

    def shards(label_of, named=True):
        for split in ("train", "val"):
            files = {}
            for number, synset in enumerate(synsets):
                key = f"{synset}_7" if named else f"{number:07d}"
                files |= {f"{key}.jpg": b"JPEG", f"{key}.cls": str(label_of(number)).encode()}
            tar_of(files, tmp_path / f"{split}-0.tar")

    words = ("dataset=imagenet", "dataset.train_images=null", "dataset.val_images=null", f"dataset.root={tmp_path}")
    config = compose(*words).dataset
    shards(lambda number: number)
    opened = open_splits(config)
    assert (opened.train.classes, opened.train.labels.tolist()) == (synsets, [*range(1000)])
    shards(lambda number: number ^ 1)
    refused(r"give n01443537_7.jpg the class 0, which is n01440764 where", config)
    shards(lambda number: number + 1)
    refused(r"go up to class 1000, and ImageNet-1k's are 0 … 999, counted from 0", config)
    shards(lambda number: number, named=False)
    refused(r"name neither classes nor images after ImageNet's synsets.*dataset=imagefolder", config)


# Which layout it is


def test_a_directory_that_holds_none_or_several_layouts_is_refused(copy, at, tmp_path, tree):
    (tmp_path / "empty").mkdir()
    refused(r"no images in .*empty; .*empty holds none\. dataset.root must hold class folders .*parquet", at("empty"))
    tar_of({"a.jpg": b"", "a.cls": b"0"}, tmp_path / "empty" / "unnamed.tar")
    refused(r"empty holds unnamed.tar\. .*with train or val in their names", at("empty"))
    shutil.copytree(copy("shards"), tree, dirs_exist_ok=True)
    refused(
        "tree holds class folders and shards, and which is meant is not known: .*=folders or dataset.layout=shards",
        at(tree),
    )
    (tmp_path / "shards" / "imagenet1k-validation-0000.tar").unlink()
    (tmp_path / "shards" / "imagenet1k-validation-0001.tar").unlink()
    refused(r"shards holds shards, but none of val: .*val-0000", at("shards"))


def test_a_directory_that_cannot_be_read_is_named(at, tmp_path, tree, monkeypatch):
    locked = tree / "train" / "coffee"

    def forbidden(path):
        if os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", forbidden)  # root may read whatever it likes
    refused(rf"{locked} cannot be read: Permission denied\.", at(tree))
    locked = tree / "train"
    refused(rf"{locked} cannot be read: Permission denied\.", at(tree))


def test_parquet_files_need_pyarrow(roots, at, monkeypatch, copy):
    root = copy("parquet")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    refused(r"holds parquet files, which pyarrow reads: .*pip install .*pyarrow$", at(root))


def test_parquet_files_of_other_columns_or_cut_short_are_refused(copy, at):
    import pyarrow
    import pyarrow.parquet

    root = copy("parquet")
    path = root / "data" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(rf"{path} cannot be read as parquet: .*Fetch it again", at(root))
    for columns in ({"pixels": [1], "label": [1]}, {"image": [1], "label": [1]}):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        refused(rf"{path} has the columns .*: what is read is one 'image', a struct of 'bytes'", at(root))
    rows = pyarrow.table({"image": [{"bytes": b"", "path": "a"}, None], "label": [0, 1]})
    pyarrow.parquet.write_table(rows, path)
    refused(rf"{path}: row 1 of row group 0 has no image or no label", at(root))


def test_recognising_reads_no_archive(copy, at):
    root = copy("official")
    (root / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert str(recognise(root, at(root))) == f"the official archives in {root}"


def test_classes_of_archives_are_sorted_as_folders_are(at, tmp_path):
    """'a' stands before 'a-b', though 'a.tar' stands behind 'a-b.tar'."""
    tree = tmp_path / "tree"
    for split in ("train", "val"):
        for name in ("a", "a-b"):
            (tree / split / name).mkdir(parents=True)
            (tree / split / name / "1.JPEG").write_bytes(f"{split} {name}".encode())
    folders, official = (open_splits(at(make(layout, tree, tmp_path / layout))) for layout in ("folders", "official"))
    assert official.train.classes == folders.train.classes == ["a", "a-b"]
    assert contents(official) == contents(folders)
