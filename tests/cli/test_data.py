"""``largebatch data``: what it prints and with which status it ends."""

import re

import pytest
from images import make_tree, spoil
from layouts import make

from largebatch.base.errors import UserError
from largebatch.cli.commands.data import VERBS, run
from largebatch.data import check


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Twelve images to train on, of which two are equal, and eight to validate with, of which one is corrupt."""
    root = make_tree(tmp_path_factory.mktemp("data") / "tree", train=3, val=2)
    spoil(root / "val" / "coffee" / "00000001.JPEG")
    twin = root / "train" / "chelsea"
    (twin / "00000002.JPEG").write_bytes((twin / "00000001.JPEG").read_bytes())
    return root


@pytest.fixture(scope="module")
def official(tree):
    return make("official", tree, tree.parent / "official")


def test_index_says_where_it_is(official, capsys):
    assert run(["index", f"root={official}"]) == 0
    assert run(["index", f"root={official}"]) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert first.endswith(f"12 + 8 images; indexed in {official}/largebatch-index.safetensors")
    assert again.endswith(f"12 + 8 images; index {official}/largebatch-index.safetensors")


def test_verify_names_what_is_corrupt_and_what_is_there_twice(official, capsys):
    assert run(["verify", f"root={official}", "processes=2"]) == 1
    out = capsys.readouterr().out
    corrupt = r"These are corrupt, .*:\n  ILSVRC2012_val_00000007.JPEG in \S+_img_val.tar, at byte [\d,]+: .+\n"
    twice = r"These are there several times:\n  chelsea_00000002.JPEG in .* repeats chelsea_00000001.JPEG in .*\n"
    assert re.search(corrupt, out)
    assert re.search(twice, out)
    assert out.endswith("20 images: 1 corrupt, 0 suspect, 0 wrong counts, 1 that repeat another.\n")


def test_verify_of_sound_images_ends_well(tmp_path, capsys):
    root = make_tree(tmp_path / "sound", train=1, val=1)
    assert run(["verify", f"root={root}", "processes=1"]) == 0
    assert capsys.readouterr().out.endswith("8 images: 0 corrupt, 0 suspect, 0 wrong counts, 0 that repeat another.\n")


def test_counts_are_held_against_imagenet(tree, monkeypatch):
    from largebatch.config.groups import DatasetConfig
    from largebatch.data.layouts import open_splits

    monkeypatch.setattr(check, "IMAGENET", {"train": (12, 3, 4), "val": (9, 3, 3)})
    config = DatasetConfig(
        *("imagefolder", str(tree), None, None, None, 3, 1, 1, "none", 0, False, None, (0.0,) * 3, (1.0,) * 3),
        *("pillow", "stop", None, 0),
    )
    opened = open_splits(config)
    assert list(check._wrong_counts("train", opened.train)) == []
    lines = list(check._wrong_counts("val", opened.val))
    assert lines[0] == "val: 8 images, where ImageNet-1k has 9"
    assert lines[1] == "val: 2 images of astronaut, where ImageNet-1k's classes have 3"
    assert len(lines) == 5


def test_stats_of_some_images(tree, capsys):
    assert run(["stats", f"root={tree}", "images=6", "processes=1"]) == 0
    out = capsys.readouterr().out
    assert "train: 12 images of 4 classes, 3 to 3 a class\n  of 6 of them:\n" in out
    assert re.search(r"width   mean \d+, 160 to \d+ pixels", out)
    assert "JPEG L 33.3 %" in out


def test_mistakes_are_sentences(tmp_path):
    for words, said in (
        (["verfy"], "data verfy is not known: it takes index, verify, stats. Did you mean 'verify'?"),
        (
            ["verify", "rot=x"],
            "'rot' is not a key of data verify: it takes dataset.root, dataset, layout, processes. Did",
        ),
        (["verify", f"root={tmp_path}", "processes=0"], "processes=0 is not a whole number of 1 or more."),
        (["stats", f"root={tmp_path}"], f"dataset=imagefolder: no images in {tmp_path}; {tmp_path} holds none."),
        (["index", "dataset=cifar10"], "dataset=cifar10 is not known: it takes imagefolder, imagenet"),
    ):
        with pytest.raises(UserError) as caught:
            run(words)
        assert str(caught.value).startswith(said)


def test_help_teaches_the_layouts_and_every_key(capsys):
    assert run([]) == 0
    out = capsys.readouterr().out
    assert "ILSVRC2012_devkit_t12.tar.gz" in out
    assert "parquet" in out
    for name, verb in VERBS.items():
        assert run([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(f"  {word.key}=" in out for word in verb.words.words)
