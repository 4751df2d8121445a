"""What is held out of the training set is validated on, and never trained on."""

import json
from dataclasses import replace

import pytest
import torch
from images import make_tree, spoil

from largebatch.base.errors import UserError
from largebatch.cli.main import run
from largebatch.config.groups import LoaderConfig
from largebatch.data import sets
from largebatch.data.holdout import hold_out
from largebatch.data.layouts import open_splits
from largebatch.data.source import Target, open_source
from largebatch.training.validation import batches_of
from largebatch.verify.explain import as_text

SMALL = ("dataset.height=32", "dataset.width=32", "dataset.resize=40", "dataset.on_error=skip", "dataset.flip=false")


def opened(config):
    target = Target(torch.device("cpu"), torch.float64)
    return open_source(config, LoaderConfig(workers=0, prefetch=2), 3, target, cores=1)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_the_choice_depends_on_its_own_seed_alone():
    kept, held = hold_out(12, 4, seed=0)
    assert held.tolist() == [1, 3, 7, 9]
    assert kept.tolist() == [0, 2, 4, 5, 6, 8, 10, 11]
    assert hold_out(12, 4, seed=1)[1].tolist() != held.tolist()
    assert {*hold_out(12, 5, seed=0)[1].tolist()} > {*held.tolist()}


def test_the_two_parts_are_the_training_set_and_no_validation_image_is_in_them(compose):
    train, val = sets.load(compose().dataset)
    kept, held = sets.load(compose("dataset.holdout=300").dataset)
    assert (len(kept.labels), len(held.labels)) == (1137, 300)
    assert sorted(map(tuple, torch.cat([kept.images, held.images]).flatten(1).tolist())) == sorted(
        map(tuple, train.images.flatten(1).tolist())
    )
    assert not rows(held.images) & rows(val.images)
    where = hold_out(1437, 300, seed=0)[1]
    assert held.images.equal(train.images[where])
    assert held.labels.equal(train.labels[where])


def test_fewer_images_than_the_files_have_are_the_first_ones(compose):
    train, val = sets.load(compose().dataset)
    fewer, some = sets.load(compose("k=1", "dataset.train_images=100", "dataset.val_images=20").dataset)
    assert fewer.images.equal(train.images[:100])
    assert some.labels.equal(val.labels[:20])


def test_a_source_trains_on_one_part_and_validates_on_the_other(compose):
    config = compose("dataset.holdout=300", "dataset.crop=none").dataset
    source = opened(config)
    assert (source.train_images, source.val_images) == (1137, 300)
    trained = rows(torch.cat([batch.images for batch in source.train([(0, torch.arange(1137))])]))
    validated = rows(torch.cat([batch.images for batch in source.validation(batches_of(300, 64))]))
    assert (len(trained), len(validated)) == (1137, 300)
    assert not trained & validated


def test_a_corrupt_image_of_a_folder_gives_way_to_one_that_is_trained_on(compose, tmp_path):
    tree = make_tree(tmp_path)
    config = compose("dataset=imagefolder", f"dataset.root={tree}", *SMALL, "dataset.holdout=8").dataset
    splits = open_splits(config)
    assert (len(splits.train), len(splits.val)) == (16, 8)
    assert "validated on 8 of the training images" in splits.line
    held = {splits.val.where(index) for index in range(8)}
    assert not held & {splits.train.where(index) for index in range(16)}
    images = sorted((tree / "train").glob("*/*"))
    for path in images[1:]:  # neighbours of held-out ones among them
        if str(path) not in held and path != images[0]:
            spoil(path)
    source = opened(config)
    labels = torch.cat([batch.labels for batch in source.train([(0, torch.arange(16))])])
    whole = [splits.train.where(index) for index in range(16)]
    readable = {int(splits.train.labels[index]) for index in range(16) if whole[index] == str(images[0])}
    assert {*labels.tolist()} <= readable
    assert sum(batch.corrupt for batch in source.validation(batches_of(8, 4))) == 0


def test_nothing_left_to_train_on_is_refused(compose, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.holdout=1437 leaves nothing of the 1437 training images"):
        compose("dataset.holdout=1437")
    tree = make_tree(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.holdout=24 leaves nothing of the 24 training images"):
        open_splits(compose("dataset=imagefolder", f"dataset.root={tree}", *SMALL, "dataset.holdout=24").dataset)
    with pytest.raises(UserError, match=r"kn = 32 × 32 = 1024 is larger than the training set .*\(437 images\)"):
        compose("k=32", "dataset.holdout=1000")


def test_it_is_part_of_an_experiment_only_where_it_is_used(compose):
    usual, held = compose(), compose("dataset.holdout=300")
    assert not {"holdout", "holdout_seed"} & {*usual.experiment("fp32")["dataset"]}
    assert held.experiment("fp32")["dataset"]["holdout"] == 300
    other = compose("dataset.holdout=300", "dataset.holdout_seed=1")
    assert len({config.experiment_hash("fp32") for config in (usual, held, other)}) == 3


def test_explain_says_what_is_validated_on(capsys):
    assert run(["explain", "dataset.holdout=300", "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["train_images"], facts["val_images"], facts["holdout"]) == (1137, 300, 300)
    assert facts["iterations_per_epoch"] == 1137 // 256
    assert "1,137 training and 300 validation images, held out of the training set," in as_text(facts)


def test_a_run_is_evaluated_on_what_was_held_out(tmp_path):
    words = ("k=2", "n=32", "epochs=1", "lr.base_minibatch=64", "dataset.holdout=300", "threads=1", "device=cpu")
    assert run(["train", *words, f"run_dir={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["train_images"], summary["val_images"], summary["iterations"]) == (1137, 300, 17)
    assert run(["eval", f"run={tmp_path}", "threads=1"]) == 0
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    member = json.loads(line)["members"][0]
    assert member["error"] == member["recorded"]["error"] == summary["last_error"]


def test_made_up_images_are_counted_alike(compose):
    source = opened(replace(compose("dataset=synthetic_small").dataset, holdout=500))
    assert (source.train_images, source.val_images) == (49_500, 500)
