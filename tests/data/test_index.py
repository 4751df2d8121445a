"""The kept index: used while it holds, made anew when it does not, and never half written."""

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from images import make_tree
from layouts import make, pack_devkit, tar_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from largebatch.base.errors import UserError
from largebatch.data import index, layouts
from largebatch.data.index import NAME
from largebatch.data.layouts import open_splits


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    tree = make_tree(tmp_path_factory.mktemp("index") / "tree", train=3, val=2)
    return {layout: make(layout, tree, tree.parent / layout) for layout in ("official", "shards", "parquet")}


@pytest.fixture
def root(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(originals["official"], tmp_path / "official")


@pytest.fixture
def config(compose, root):
    return replace(compose("dataset=imagefolder").dataset, root=str(root))


TRAIN = "ILSVRC2012_img_train.tar"


def inode(root):
    return (root / NAME).stat().st_ino


def test_an_index_that_holds_is_used_and_another_is_not_made(config, root):
    first = open_splits(config)
    assert first.line.endswith(f"12 + 8 images; indexed in {root / NAME}")
    kept = inode(root)
    again = open_splits(config)
    assert again.line.endswith(f"12 + 8 images; index {root / NAME}")
    assert inode(root) == kept
    assert again.train.labels.tolist() == first.train.labels.tolist()
    assert again.train.places.tolist() == first.train.places.tolist()
    assert again.val.where(5) == first.val.where(5)
    open_splits(config, anew=True)
    assert inode(root) != kept
    assert not list(root.glob(".*"))


def test_an_archive_that_changed_is_indexed_again(config, root):
    open_splits(config)
    kept = inode(root)
    os.utime(root / TRAIN, ns=(0, 10**18))
    assert "indexed in" in open_splits(config).line
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").touch()
    assert "indexed in" in open_splits(config).line
    pack_devkit(root)
    assert "indexed in" in open_splits(config).line
    assert inode(root) != kept


def test_an_archive_that_shrank_since_is_refused_by_whoever_reads_it(config, root):
    opened = open_splits(config)
    archive = root / TRAIN
    size = archive.stat().st_size
    os.truncate(archive, size - 15_000)
    with pytest.raises(UserError) as caught:
        opened.train.read(0)
    assert str(caught.value).startswith(
        f"{archive} has changed since it was indexed ({size:,} bytes then, {size - 15_000:,} now)"
    )
    with pytest.raises(UserError, match=rf"{archive} is damaged at byte [\d,]+: '.*tar' claims"):
        open_splits(config)
    opened.val.read(0)
    os.truncate(root / "ILSVRC2012_img_val.tar", 700)  # under the reader's hands
    with pytest.raises(UserError, match=r"img_val.tar has changed since it was indexed"):
        opened.val.read(7)


def test_an_archive_that_changes_while_it_is_indexed_is_refused(config, root, monkeypatch):
    scan = layouts.list_official

    def slow(place):
        listing = scan(place)
        (root / TRAIN).touch()
        return listing

    monkeypatch.setattr(layouts, "list_official", slow)
    with pytest.raises(UserError, match="changed while they were indexed: start again when they are complete"):
        open_splits(config)
    assert not (root / NAME).exists()


@pytest.mark.parametrize("why", [errno.EROFS, errno.EACCES])
def test_beside_archives_that_cannot_be_written_the_cache_is_used(why, config, root, tmp_path, monkeypatch):
    write = index.write_atomically

    def refuse(path, data):
        if path.parent == root:
            raise OSError(why, os.strerror(why))
        write(path, data)

    monkeypatch.setattr(index, "write_atomically", refuse)
    first = open_splits(config)
    (kept,) = (tmp_path / "cache").iterdir()
    assert first.line.endswith(f"indexed in {kept}")
    assert first.problem == ""
    assert open_splits(config).line.endswith(f"index {kept}")


def test_the_cache_is_where_people_have_theirs(root, monkeypatch):
    monkeypatch.delenv("LARGEBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert index.places(root)[1].parent == Path("/elsewhere/largebatch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.places(root)[1].parent == Path.home() / ".cache" / "largebatch"


def test_a_full_disk_leaves_the_old_index_and_says_so(config, root):
    open_splits(config)
    old = (root / NAME).read_bytes()
    # A file may have no more bytes than the archives have headers: as on a full disk, a write fails on its way.
    program = (
        "import resource, sys; from largebatch.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "data", "index", f"root={root}", "anew=true"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"largebatch: the index could not be kept: {root / NAME}: File too large. What was there before is as it was.\n"
    )
    assert (root / NAME).read_bytes() == old
    assert not list(root.glob(".*"))


DAMAGES = {
    "no safetensors": lambda path: path.write_bytes(b"garbage"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "places outside": lambda path: change(path, "train.places", lambda array: array + 10**12),
    "negative places": lambda path: change(path, "train.places", lambda array: -array),
    "another container": lambda path: change(path, "val.files", lambda array: array + 7),
    "negative labels": lambda path: change(path, "val.labels", lambda array: array - 100),
    "fewer labels": lambda path: change(path, "val.labels", lambda array: array[1:]),
    "names that go back": lambda path: change(path, "train.ends", lambda array: array[::-1].copy()),
    "other kinds": lambda path: change(path, "train.ends", lambda array: array.astype("float64")),
}


def change(path, name, how):
    arrays = load_file(path)
    with safe_open(path, framework="np") as file:
        about = file.metadata()
    save_file({**arrays, name: how(arrays[name])}, path, about)


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_was_tampered_with_is_made_anew(damage, config, root):
    sound = open_splits(config)
    DAMAGES[damage](root / NAME)
    again = open_splits(config)
    assert "indexed in" in again.line
    assert again.train.places.tolist() == sound.train.places.tolist()


# What the archives hold


def refused(config, words):
    with pytest.raises(UserError, match=words) as caught:
        open_splits(config)
    assert "\n" not in str(caught.value)


def test_a_missing_archive_or_devkit_is_named(config, root):
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")
    refused(config, rf"official archives, but {root}/ILSVRC2012_devkit_t12.tar.gz is missing: .* for its labels")
    (root / TRAIN).unlink()
    refused(config, rf"but {root}/{TRAIN} and {root}/ILSVRC2012_devkit_t12.tar.gz is missing")


def test_a_devkit_that_does_not_fit_or_is_damaged_is_named(config, root):
    data = root / "ILSVRC2012_devkit_t12" / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    whole = truth.read_text()
    truth.write_text("1\n2\n")
    refused(config, "img_val.tar holds 8 images, and the devkit 2 labels")
    truth.write_text(whole.replace("1", "999"))
    refused(config, r"ground_truth.txt and meta.mat cannot be read \(KeyError\(999\)\): fetch the devkit again")
    truth.write_text(whole)
    (data / "meta.mat").write_bytes((data / "meta.mat").read_bytes()[:300])
    refused(config, r"ground_truth.txt and meta.mat cannot be read \(.*\): fetch the devkit again")
    packed = pack_devkit(root)
    packed.write_bytes(packed.read_bytes()[:-50])
    refused(config, "t12.tar.gz is cut short, or larger than")
    packed.write_bytes(b"no gzip")
    refused(config, "t12.tar.gz cannot be unpacked: .*Fetch it again")


def test_a_train_archive_of_other_members_is_refused(config, root):
    tar_of({"n01440764.tar": tar_of({"a.JPEG": b"1"}), "notes/readme.txt": b"2"}, root / TRAIN)
    refused(config, rf"{TRAIN} holds 'notes/readme.txt' at byte [\d,]+: only a .tar a class is known")
    tar_of({"n01440764.tar": b"no archive" * 100}, root / TRAIN)
    refused(config, rf"{TRAIN}, in n01440764.tar, is damaged at byte 512: this is no header")
    tar_of({"n01440764.tar": tar_of({"a.JPEG": b"1"})}, root / TRAIN)
    refused(config, rf"speaks of the class astronaut, of which {TRAIN} has no images")


SHARDS = {
    "no class": ({"a.jpg": b"1"}, r"holds 'a.jpg' at byte 512 without 'a.cls', the number of its class"),
    "two images": ({"a.jpg": b"1", "a.png": b"2", "a.cls": b"0"}, r"two images of the key 'a', at byte 1,536"),
    "a class in words": (
        {"a.jpg": b"1", "a.cls": b"cat"},
        r"'a.cls' at byte 1,536 does not hold the number of a class",
    ),
    "a negative class": ({"a.jpg": b"1", "a.cls": b"-1"}, r"'a.cls' at byte 1,536 does not hold the number"),
    "a huge class": ({"a.jpg": b"1", "a.cls": b"9" * 30}, r"'a.jpg' is of class 9{30}: classes are 0 … 1,048,575"),
    "two classes": (
        {"a.cls": b"1", "a.jpg": b"1", "a.CLS": b"0"},
        r"two classes of the key 'a', at byte 2,560: a key ends",
    ),
    "no image": (
        {"a.cls": b"0"},
        r"train-0.tar holds no image of the key 'a': shards take one image and one .cls a key",
    ),
    "an image that is not read": ({"a.cls": b"0", "a.heic": b"1"}, r"holds no image of the key 'a': "),
    "a version in the name": (
        {"photo.v2.cls": b"0", "photo.v2.jpg": b"1"},
        r"no image of the key 'photo', but 'photo.v2.jpg', which is no part that is read: .* at the first dot",
    ),
    "an input and a target": (
        {"a.input.jpg": b"1", "a.target.jpg": b"2", "a.cls": b"0"},
        r"no image of the key 'a', but 'a.target.jpg'",
    ),
}


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_without_what_it_must_hold_is_refused(what, compose, tmp_path):
    files, words = SHARDS[what]
    tar_of(files, tmp_path / "train-0.tar")
    tar_of({"a.jpg": b"1", "a.cls": b"0"}, tmp_path / "val-0.tar")
    refused(replace(compose("dataset=imagefolder").dataset, root=str(tmp_path)), words)


def test_a_row_group_is_read_once_for_neighbours_and_the_cache_is_bounded(compose, originals, tmp_path, monkeypatch):
    from largebatch.data import files

    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path))
    root = shutil.copytree(originals["parquet"], tmp_path / "parquet")
    config = replace(compose("dataset=imagefolder").dataset, root=str(root))
    contents, held = [], []
    for limit in (2**20, 1):
        monkeypatch.setattr(files, "_CACHED_BYTES", limit)
        train = open_splits(config).train
        contents.append([train.read(at) for at in range(12)])
        held.append(len(train._cache._held))
    assert held == [3, 1]  # of five, five and two images
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == 12
