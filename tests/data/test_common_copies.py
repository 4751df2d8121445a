"""Copies of data sets as people have them: read as they are meant, or refused with what is missing."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from images import make_tree
from layouts import add, classes_of, images, make, tar_of
from timm.data.imagenet_info import ImageNetInfo

from largebatch.base.errors import UserError
from largebatch.data.layouts import open_splits
from largebatch.data.listing import HIDDEN, is_hidden, kind_left_out


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tree_of_all(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("copies") / "tree", train=3, val=2)


@pytest.fixture
def tree(tree_of_all, tmp_path):
    """Class folders of this test's own."""
    return shutil.copytree(tree_of_all, tmp_path / "tree")


@pytest.fixture
def at(compose):
    return lambda root, **changes: replace(compose("dataset=imagefolder").dataset, root=str(root), **changes)


def refused(words, config):
    with pytest.raises(UserError, match=words) as caught:
        open_splits(config)
    assert "\n" not in str(caught.value)


def contents(opened):
    return [
        [(int(split.labels[row]), split.read(row)) for row in range(len(split))] for split in (opened.train, opened.val)
    ]


# Kaggle's and torchvision's


def make_kaggle(tree, root):
    """Unpack class folders as Kaggle's archive does: validation images in one folder, their classes in a table."""
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(tree / "train", folder / "train")
    (folder / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for number, (label, path) in enumerate(reversed(images(tree, "val"))):
        name = f"ILSVRC2012_val_{1000 - number:08d}"
        shutil.copy(path, folder / "val" / f"{name}.JPEG")
        synset = classes_of(tree)[label]
        lines.append(f"{name},{synset} 1 2 30 40 {synset} 5 6 70 80 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_kaggles_copy_is_read_from_any_of_its_folders(at, tree, tmp_path):
    root = tmp_path / "imagenet-object-localization-challenge"
    folder = make_kaggle(tree, root)
    whole = contents(open_splits(at(tree)))
    for given in (tmp_path, root, root / "ILSVRC", root / "ILSVRC" / "Data", folder):
        opened = open_splits(at(given))
        assert contents(opened) == whole
        assert opened.line.startswith(f"dataset=imagefolder: class folders in {folder}, 12 + 8 images")


def test_flat_validation_images_without_their_classes_are_refused_with_where_these_come_from(at, tree, tmp_path):
    folder = make_kaggle(tree, tmp_path / "kaggle")
    table = tmp_path / "kaggle" / "LOC_val_solution.csv"
    lines = table.read_text().splitlines()
    table.unlink()
    refused(r"val holds images without folders of classes, and LOC_val_solution.csv, .* Kaggle's", at(folder))
    table.write_text("\n".join(lines[:-1]))
    refused(
        r"LOC_val_solution.csv does not belong to .*ILSVRC2012_val_00000993.JPEG are not in it, and none", at(folder)
    )
    table.write_text("\n".join([*lines, "ILSVRC2012_val_00000001,coffee 1 2 3 4"]))
    refused(r"none are not in it, and ILSVRC2012_val_00000001 of it are not there", at(folder))
    table.write_text("\n".join([*lines[:-1], lines[-1].replace("astronaut", "tea")]))
    refused(r"has the class 'tea', of which there are no training images", at(folder))
    for broken in ("Id,Class\n1,2\n", "ImageId,PredictionString\na,\n", "ImageId,PredictionString\na\n"):
        table.write_text(broken)
        refused(r"LOC_val_solution.csv cannot be read .*: it has the columns ImageId and PredictionString", at(folder))
    table.write_bytes(b"ImageId,PredictionString\n\xff,\xff\n")
    refused(r"LOC_val_solution.csv cannot be read", at(folder))


def test_archives_beside_their_own_folders_are_left_alone_unless_they_are_chosen(at, tree, tmp_path):
    """torchvision.datasets.ImageNet unpacks them there, and writes meta.bin."""
    root = make("official", tree, tmp_path / "official")
    whole = contents(open_splits(at(root)))
    for split in ("train", "val"):
        shutil.copytree(tree / split, root / split)
    (root / "meta.bin").write_bytes(b"a zip of torch")
    opened = open_splits(at(root))
    assert opened.line.startswith(f"dataset=imagefolder: class folders in {root}, 12 + 8 images")
    assert "the official archives in the same place are not read (dataset.layout=archives does)" in opened.line
    chosen = open_splits(at(root, layout="archives"))
    assert chosen.line.startswith(f"dataset=imagefolder: the official archives in {root}")
    assert contents(chosen) == contents(opened) == whole
    refused(
        r"dataset.layout=parquet: .* holds class folders and the official archives, but no parquet",
        at(root, layout="parquet"),
    )


def test_archives_of_other_tasks_are_no_shards(at, tree, tmp_path):
    root = make("official", tree, tmp_path / "official")
    for name in ("ILSVRC2012_img_train_t3.tar", "ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_bbox_train_v2.tar.gz"):
        (root / name).write_bytes(b"not read")
    assert open_splits(at(root)).line.startswith("dataset=imagefolder: the official archives")


def test_the_layout_is_no_part_of_the_experiment(compose):
    hashes = {
        compose("dataset=imagenet", f"dataset.layout={layout}").experiment_hash("fp32")
        for layout in ("auto", "folders", "archives", "shards", "parquet")
    }
    assert len(hashes) == 1


# Shards


@pytest.fixture
def shards(tree, tmp_path):
    return make("shards", tree, tmp_path / "shards")


def test_links_in_shards_are_refused(at, shards):
    path = shards / "imagenet1k-train-0000.tar"
    whole = path.read_bytes()
    for kind, there in ((tarfile.SYMTYPE, "a.cls"), (tarfile.LNKTYPE, "a.cls"), (tarfile.SYMTYPE, "other.txt")):
        path.write_bytes(whole)
        with tarfile.open(path, "a") as archive:
            add(archive, there, b"0")
            link = tarfile.TarInfo("a.jpg")
            link.type, link.linkname = kind, "coffee_00000000.jpg"
            archive.addfile(link)
        refused(
            r"holds no image of the key 'a', but 'a.jpg', which is no part that is read: .*links are not followed",
            at(shards),
        )


def test_what_shards_hold_besides_is_counted(at, shards, tmp_path):
    whole = contents(open_splits(at(shards)))
    with tarfile.open(shards / "imagenet1k-train-0000.tar", "a") as archive:
        for name in ("._a.jpg", "__MACOSX/a.cls", "README", "notes.TXT"):
            add(archive, name, b"")
    for _ in range(2):  # scanned, and from the index
        opened = open_splits(at(shards))
        assert contents(opened) == whole
        assert (
            f"; left out: 2 {HIDDEN} and 22 files that are no images (20 .json, 1 without an ending, 1 .txt)"
            in opened.line
        )


def test_two_archives_in_one_file_are_refused(at, shards):
    path = shards / "imagenet1k-train-0000.tar"
    size = path.stat().st_size
    more = tar_of({"more.jpg": b"1", "more.cls": b"0"})
    path.write_bytes(path.read_bytes() + more)
    refused(rf"{path} continues after its end marker at byte [\d,]+, as archives joined by cat do", at(shards))
    os.truncate(path, size)
    open_splits(at(shards))


def test_a_gap_in_the_numbers_of_shards_is_refused(at, shards):
    for split in ("train", "validation"):
        first, second = (shards / f"imagenet1k-{split}-{number:04d}.tar" for number in range(2))
        second.rename(shards / f"imagenet1k-{split}-0002.tar")
        first.rename(second)  # 1 and 2
    open_splits(at(shards))
    (shards / "imagenet1k-train-0002.tar").rename(shards / "imagenet1k-train-0012.tar")
    refused(
        r"holds 2 shards such as .*, but of the numbers 1 … 12 these are missing: 2, 3, 4, 5 and 6 more", at(shards)
    )
    (shards / "imagenet1k-train-0001.tar").rename(shards / "imagenet1k-train-00001-of-00003.tar")
    (shards / "imagenet1k-train-0012.tar").rename(shards / "imagenet1k-train-00002-of-00003.tar")
    refused(r"of the numbers 1 … 3 these are missing: 3\.", at(shards))


def test_compressed_shards_are_refused(at, shards):
    (shards / "imagenet1k-train-0002.tar.gz").write_bytes(b"")
    refused(
        r"imagenet1k-train-0002.tar.gz is compressed, and images are read from shards in place: unpack it", at(shards)
    )


# Parquet


@pytest.fixture
def parquet(tree, tmp_path):
    return make("parquet", tree, tmp_path / "parquet")


def test_some_of_the_parquet_files_are_not_the_set(at, parquet):
    path = parquet / "data" / "train-00000-of-00001.parquet"
    for name in ("train-00000-of-00294.parquet", "train-00000-of-00294-a9b7c6.parquet"):
        path = path.rename(path.with_name(name))
        refused(
            r"holds 1 parquet files such as train-00000-of-00294.*of the numbers 0 … 293 these are missing: 1, 2, 3",
            at(parquet),
        )


def test_a_file_that_is_there_twice_is_refused(at, parquet):
    name = "train-00000-of-00001.parquet"
    shutil.copy(parquet / "data" / name, parquet / name)
    refused(rf"{name} is in {parquet} and {parquet}/data: its images would count twice", at(parquet))


def rewritten(path, change):
    """Write a parquet file anew with the names of its classes changed."""
    table = pyarrow.parquet.read_table(path)
    about = json.loads(table.schema.metadata[b"huggingface"])
    label = about["info"]["features"]["label"]
    label["names"] = change(label["names"])
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)


def test_splits_that_number_their_classes_differently_are_refused(at, parquet):
    val = parquet / "data" / "validation-00000-of-00001.parquet"
    rewritten(val, lambda names: [names[0], names[2], names[1], names[3]])
    refused(r"number their classes differently: 1 is 'chelsea' in the first and 'coffee' in the second", at(parquet))
    rewritten(val, lambda names: names[:3])
    refused(r"differently: 1 is 'chelsea' in the first and 'coffee'", at(parquet))
    rewritten(val, lambda names: ["astronaut", "chelsea", "coffee"])
    refused(r"differently: 3 is 'motorcycle_left' in the first and no name in the second", at(parquet))
    train = parquet / "data" / "train-00000-of-00001.parquet"
    rewritten(train, lambda names: names[:3])
    refused(r"go up to class 3, but name only 3 classes: labels are counted from 0", at(parquet))


IMAGE = {"bytes": pyarrow.binary(), "path": pyarrow.string()}
SCHEMAS = {
    "a path that is a number": [
        ("image", pyarrow.struct(IMAGE | {"path": pyarrow.int64()})),
        ("label", pyarrow.int64()),
    ],
    "bytes that are text": [("image", pyarrow.struct(IMAGE | {"bytes": pyarrow.string()})), ("label", pyarrow.int64())],
    "two labels": [("image", pyarrow.struct(IMAGE)), ("label", pyarrow.int64()), ("label", pyarrow.int64())],
    "two images": [("image", pyarrow.struct(IMAGE)), ("image", pyarrow.struct(IMAGE)), ("label", pyarrow.int64())],
    "a label in words": [("image", pyarrow.struct(IMAGE)), ("label", pyarrow.string())],
    "no struct": [("image", pyarrow.binary()), ("label", pyarrow.int64())],
}


@pytest.mark.parametrize("what", SCHEMAS)
def test_columns_of_other_types_are_a_sentence(what, at, parquet):
    path = parquet / "data" / "train-00000-of-00001.parquet"
    schema = pyarrow.schema(SCHEMAS[what])
    pyarrow.parquet.write_table(schema.empty_table(), path)
    refused(
        rf"{path} has the columns .*: what is read is one 'image', a struct of 'bytes' \(binary\) and 'path'",
        at(parquet),
    )


def test_a_row_group_is_bounded_before_it_is_read(at, parquet, monkeypatch):
    opened = open_splits(at(parquet))
    monkeypatch.setattr("largebatch.data.files._LARGEST_GROUP", 1000)
    with pytest.raises(OSError, match=r"row group 0 has [\d,]+ bytes, more than the 1,000 that are read at once"):
        opened.train.read(int(np.flatnonzero(opened.train.places[:, 0] == 0)[0]))
    (parquet / "largebatch-index.safetensors").unlink()
    refused(
        r"train-00000-of-00001.parquet cannot be read as parquet: row group 0 has .* fewer rows a group", at(parquet)
    )


# Rubbish


def test_what_systems_leave_behind_is_neither_image_nor_class(at, tree):
    whole = contents(open_splits(at(tree)))
    (tree / "train" / "coffee" / "._00000000.JPEG").write_bytes(b"of macOS")
    (tree / "train" / "coffee" / "Thumbs.db").write_bytes(b"of Windows")
    (tree / "train" / "coffee" / "notes.txt").write_text("no image")
    (tree / "train" / ".DS_Store").write_bytes(b"")
    for folder in (".ipynb_checkpoints", "lost+found", "@eaDir"):
        (tree / "val" / folder).mkdir()
        (tree / "val" / folder / "1.jpg").write_bytes(b"")
    opened = open_splits(at(tree))
    assert contents(opened) == whole
    assert opened.line.endswith(f"; left out: 6 {HIDDEN} and 1 files that are no images (1 .txt)")


def test_hidden_names_are_known_wherever_they_stand():
    hidden = ("._x.jpg", "a/.DS_Store", "__MACOSX/a.jpg", "@eaDir/a.jpg", "thumbs.db", "Desktop.ini", ".git/x.png")
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ("a.jpg", "./a.jpg", "../a.jpg", "a/b.jpg", "lost.jpg")))
    assert [kind_left_out(name) for name in ("a/b.TXT", "README", "._a", "a.tar.gz")] == [
        ".txt",
        "without an ending",
        HIDDEN,
        ".gz",
    ]


def test_every_ending_that_is_decoded_counts_in_any_case(at, tree):
    names = ("a.GIF", "b.jfif", "c.WebP", "d.avif", "e.TIF", "f.jpe", "g.Tiff", "h.JP2", "i.pbm")
    for name in names:
        (tree / "train" / "coffee" / name).write_bytes(b"")
    assert len(open_splits(at(tree)).train) == 12 + len(names)


# Classes


def labelled(root, train, val):
    for split, labels in (("train", train), ("val", val)):
        files = {}
        for number, label in enumerate(labels):
            files |= {f"{number}.jpg": b"JPEG", f"{number}.cls": str(label).encode()}
        tar_of(files, root / f"{split}-0.tar")


def test_classes_without_images_are_refused_by_name_for_shards_as_for_folders(at, tmp_path):
    labelled(tmp_path, [0, 1, 2], [0, 1, 2, 3])
    refused(r"hold no train images of the classes 3, of which there are val images: complete the copy", at(tmp_path))
    labelled(tmp_path, [1, 2, 3], [1, 2, 3])
    refused(r"hold no train images of the classes 0: labels are counted from 0, and these start at 1", at(tmp_path))
    labelled(tmp_path, [0, 3], [0, 3])
    refused(r"hold no train images of the classes 1, 2: complete the copy", at(tmp_path))
    labelled(tmp_path, [0, 1, 2], [0, 2])
    refused(r"hold no val images of the classes 1, of which there are train images", at(tmp_path))


def parquet_of(root, names, labels):
    image = {"bytes": b"JPEG", "path": "a.JPEG"}
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        [("image", pyarrow.struct(IMAGE)), ("label", pyarrow.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pyarrow.Table.from_pylist([{"image": image, "label": label} for label in labels], schema)
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")


def test_names_of_imagenet_classes_are_held_against_the_official_ones(compose, tmp_path):
    info = ImageNetInfo("imagenet-1k")
    synsets = sorted(info.label_names())
    words = ("dataset=imagenet", "dataset.train_images=null", "dataset.val_images=null", f"dataset.root={tmp_path}")
    config = compose(*words).dataset
    official = [info.label_name_to_description(synset) for synset in synsets]
    assert (official[0], official[1]) == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    for names in (official, synsets, [name.split(",")[0].replace(" ", "_") for name in official]):
        parquet_of(tmp_path, names, range(1000))
        assert open_splits(config).train.classes == synsets
    parquet_of(tmp_path, [official[1], official[0], *official[2:]], range(1000))
    refused(r"call class 0 'goldfish, Carassius auratus', which is n01440764, 'tench', where classes are numb", config)
    parquet_of(tmp_path, [*official, "a class more"], range(1000))
    refused(r"name 1001 classes, and ImageNet-1k has 1000", config)


def test_a_fifo_in_a_class_folder_does_not_wait_for_a_writer(at, tree):
    os.mkfifo(tree / "train" / "coffee" / "a.jpg")
    opened = open_splits(at(tree))
    row = next(row for row in range(len(opened.train)) if opened.train.names[row] == "coffee/a.jpg")
    with pytest.raises(OSError, match="this is no regular file"):
        opened.train.read(row)


def test_an_archive_may_be_padded_with_zeros_of_any_length():
    data = io.BytesIO(tar_of({"a.jpg": b"1"}) + bytes(3 * 2**20)).getvalue()
    from largebatch.data.tar import members

    assert [member.name for member in members(lambda at, size: data[at : at + size], 0, len(data), "a.tar")] == [
        "a.jpg"
    ]
