"""dataset=python: data sets of the user's own, and every mistake that one can have."""

import pickle
import random

import pytest
import torch

from largebatch.base import user_code
from largebatch.base.errors import UserError
from largebatch.config.groups import LoaderConfig
from largebatch.data.source import MemorySource, Target, open_source
from largebatch.data.user_sets import open_sets

SETS = '''
import itertools
import random

import numpy as np
import torch
from PIL import Image


class Set:
    """Items of any kind, of 3 classes."""

    def __init__(self, size, kind="float", **mistakes):
        self.size, self.kind, self.mistakes, self.reads = size, kind, mistakes, itertools.count()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        pixels = np.full((2, 4, 5), index % 256, dtype=np.uint8)
        value = {
            "float": lambda: torch.full((6,), float(index)),
            "double": lambda: np.full(6, index / 3),
            "tokens": lambda: np.arange(7, dtype=np.int32) + index,
            "bytes": lambda: pixels,
            "picture": lambda: Image.fromarray(np.full((4, 5, 3), index % 256, dtype=np.uint8)),
            "grey": lambda: Image.fromarray(pixels[0]),
            "list": lambda: [1, 2, 3],
            "drawn": lambda: torch.rand(6) + random.random() + np.random.rand(),
        }[self.kind]()
        label = index % 3
        if index == self.mistakes.get("at"):
            if "fails" in self.mistakes:
                return {}[index]
            value = value[:-1] if "shape" in self.mistakes else value
            label = self.mistakes.get("label", label)
        if "counts" in self.mistakes:
            value = value + next(self.reads)
        return (value, label, 0) if "triple" in self.mistakes else (value, np.int64(label))


class Augmented(Set):
    def get(self, index, generator):
        value, label = self[index]
        return value + torch.rand(6, generator=generator) + random.random(), label


class Named(Set):
    classes = ["a", "b", "c", "d"]


def make(kind="float", size=12, **mistakes):
    return Set(size, kind, **mistakes), Set(5, kind)


def augmented(size=12):
    return Augmented(size), Set(5)


def named():
    return Named(12), Named(5)


def pair(labels=3, wide=False):
    images = torch.arange(12 * 2 * 4 * 4).view(12, 2, 4, 4).to(torch.uint8)
    return (images, torch.arange(12) % labels), (images[:5].numpy(), np.arange(5) % 3 + (9 if wide else 0))


def uneven():
    return (torch.zeros(4, 3), torch.zeros(5).long()), Set(5)


def one():
    return Set(5)


def iterable():
    return iter([]), Set(5)


def empty():
    return Set(0), Set(5)


def two_shapes():
    return Set(5, "float"), Set(5, "tokens")


def unseeded():
    return (torch.rand(6, 3), torch.arange(6) % 2), (torch.rand(4, 3), torch.arange(4) % 2)
'''
CPU = torch.device("cpu")


@pytest.fixture
def config(own_code, compose):
    own_code(sets=SETS)
    return lambda name, *words: compose("k=1", "n=1", "dataset=python", f"dataset.name='sets:{name}'", *words).dataset


@pytest.fixture
def source(config):
    def opened(name, *words, workers=0, seed=0, dtype=torch.float32):
        loader = LoaderConfig(workers=workers, prefetch=None)
        return open_source(config(name, *words), loader, seed, Target(CPU, dtype), cores=1)

    return opened


def first(source, epoch=0, indices=(0, 5)):
    return next(iter(source.train([(epoch, torch.tensor(indices))])))


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "fifth"),
    [
        ("float", (6,), torch.float32, 5.0),
        ("double", (6,), torch.float32, 5 / 3),
        ("tokens", (7,), torch.int64, 5),
        ("bytes", (2, 4, 5), torch.float32, 5 / 255),
        ("picture", (3, 4, 5), torch.float32, 5 / 255),
        ("grey", (1, 4, 5), torch.float32, 5 / 255),
    ],
)
def test_inputs_of_every_kind_arrive_as_a_network_takes_them(source, kind, shape, dtype, fifth):
    found = source("make", f"dataset.kwargs={{kind: {kind}}}", "dataset.classes=3")
    assert (found.train_images, found.val_images, found.classes) == (12, 5, 3)
    assert (tuple(found.sample.shape), found.sample.dtype) == (shape, dtype)
    batch = first(found)
    assert (batch.images.shape, batch.images.dtype) == ((2, *shape), dtype)
    assert batch.images[1].flatten()[0].item() == pytest.approx(fifth)
    assert batch.labels.tolist() == [0, 2]
    assert [len(one.labels) for one in found.validation([range(3), range(3, 5)])] == [3, 2]


def test_float64_keeps_the_bits_of_float64(source):
    batch = first(source("make", "dataset.kwargs={kind: double}", dtype=torch.float64))
    assert batch.images[1, 0].item() == 5 / 3


def test_classes_are_counted_named_or_given(source, capsys):
    assert source("make", "dataset.kwargs={size: 13}").classes == 3
    assert "all 13 items are read once to count the classes; dataset.classes=… spares it" in capsys.readouterr().err
    assert source("named").classes == 4
    assert source("named", "dataset.classes=7").classes == 7
    assert source("pair").classes == 3


def test_pairs_of_tensors_and_arrays_lie_in_memory_and_may_be_cropped(source):
    words = ("dataset.crop=pad", "dataset.pad=1", "dataset.flip=true", "dataset.mean=[0.1,0.2]", "dataset.std=[1,2]")
    found = source("pair", *words)
    assert isinstance(found, MemorySource)
    assert (found.classes, found.train_images, found.val_images) == (3, 12, 5)
    (plain,) = found.plain([torch.tensor([0])])
    assert plain.images[0, 1, 0, 1].item() == pytest.approx((17 / 255 - 0.2) / 2)
    assert not first(found).images.equal(first(found, epoch=1).images)


def test_augmentation_is_decided_by_seed_epoch_and_index_alone(source):
    found = source("augmented")
    before = random.getstate()
    alone = first(found, indices=(5,)).images[0]
    together = first(source("augmented", workers=1), indices=(0, 5, 7)).images[1]
    assert alone.equal(together)
    assert random.getstate() == before
    others = [first(found, 1, (5,)), first(found, 0, (6,)), first(source("augmented", seed=1), 0, (5,))]
    values = [
        alone[0].item() - 5,
        *(other.images[0, 0].item() - place for other, place in zip(others, (5, 6, 5), strict=True)),
    ]
    assert len({round(value, 4) for value in values}) == 4
    (plain,) = found.plain([torch.tensor([5])])
    assert plain.images.eq(5).all()


def test_random_numbers_drawn_without_a_generator_are_decided_too(source):
    found = source("make", "dataset.kwargs={kind: drawn}")
    assert first(found).images.equal(first(found).images)
    assert not first(found).images.equal(first(found, epoch=1).images)
    one, other = (
        next(iter(source("make", "dataset.kwargs={kind: drawn}", seed=seed).validation([range(5)]))) for seed in (0, 1)
    )
    assert one.images.equal(other.images)


def test_items_are_held_out_and_the_first_of_more_taken(config):
    found = open_sets(config("make", "dataset.holdout=4", "dataset.train_images=10"))
    assert sorted([*found.train.rows.tolist(), *found.val.rows.tolist()]) == list(range(10))
    assert (len(found.train), len(found.val)) == (6, 4)


def test_a_loader_process_that_shares_no_memory_makes_the_set_anew(config):
    part = open_sets(config("make", "dataset.kwargs={kind: tokens}", "dataset.holdout=4")).val
    again = pickle.loads(pickle.dumps(part))
    assert again.data is not part.data
    assert again.read(2, 0, 0, train=False)[0].equal(part.read(2, 0, 0, train=False)[0])
    assert (again.shape, again.classes, again.rows.tolist()) == (part.shape, part.classes, part.rows.tolist())


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("one", (), r"returned a Set: it is called with \(\), and has to return \(training set, validation set\)"),
        ("iterable", (), "training set: it is a list_iterator, and has to be a map-style data set, with __len__ and"),
        ("empty", (), "training set: it has 0 items, where at least one is wanted"),
        ("make", ("dataset.train_images=20",), "training set: it has 12 items, where 20 is wanted"),
        (
            "make",
            ("dataset.kwargs={triple: 1}",),
            r"item 0 is a tuple of 3, and every item is \(input, label\): a tensor",
        ),
        ("make", ("dataset.kwargs={kind: list}",), r"item 0 is \(a list of 3, …\), and every item is"),
        (
            "make",
            ("dataset.kwargs={at: 6, shape: 1}",),
            r"item 6 is of shape \(5,\), and the first one is of shape \(6,\)",
        ),
        ("make", ("dataset.kwargs={at: 0, label: -1}",), r"item 0 is \(…, -1\), and labels go from 0"),
        (
            "make",
            ("dataset.kwargs={at: 6, label: 3}", "dataset.classes=3"),
            r"item 6 is \(…, 3\), .* to 2, for 3 classes",
        ),
        ("make", ("dataset.kwargs={counts: 1}",), "item 0 is another each time that it is read"),
        (
            "pair",
            ("dataset.kwargs={labels: 4}", "dataset.classes=3"),
            "its labels go from 0 to 3, and those of 3 classes go",
        ),
        ("pair", ("dataset.kwargs={wide: 1}", "dataset.classes=3"), "validation set: its labels go from 9 to 11"),
        ("pair", ("dataset.mean=[1,1,1]",), "dataset.mean has 3 values for inputs of shape"),
        ("pair", ("dataset.height=9",), r"dataset.height=9, and the inputs are of shape \(2, 4, 4\): leave it out"),
        ("make", ("dataset.crop=pad",), "are for pairs of tensors|crop=pad is for images"),
        ("uneven", (), r"of shape \(4, 3\) and \(5,\)"),
        ("two_shapes", (), r"validation set: item 0 is of shape \(7,\), and the first one is of shape \(6,\)"),
    ],
)
def test_what_is_no_data_set_is_refused_at_the_start(source, name, words, said):
    with pytest.raises(UserError, match=said):
        source(name, *words)


@pytest.mark.parametrize(
    ("mistakes", "said"),
    [
        ("at: 8, shape: 1", r"training set: item 8 is of shape \(5,\), and the first one is of shape \(6,\)"),
        ("at: 8, label: 5", r"training set: item 8 is \(…, 5\), and labels go from 0 to 2, for 3 classes"),
        (
            "at: 8, fails: 1",
            r"training set, item 8: KeyError: 8. It is read by __getitem__, and has to be \(input, label\)",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_one_item_is_found_when_it_is_read(source, mistakes, said, workers):
    found = source("make", f"dataset.kwargs={{{mistakes}}}", "dataset.classes=3", workers=workers)
    with pytest.raises(UserError, match=said) as caught:
        first(found, indices=(1, 8))
    assert ("in __getitem__" in str(caught.value)) == ("fails" in mistakes)


def test_items_that_differ_are_taken_where_that_is_said(source):
    found = source("make", "dataset.kwargs={counts: 1}", "dataset.reproducible=false")
    assert not first(found).images.equal(first(found).images)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("make", "dataset.kwargs={size: 13}"), "13 train images now and were 12"),
        (("make", "dataset.kwargs={at: 11, label: 0}"), "train image 11 is another one now, and the contents differ"),
        (("named",), ""),
        (("unseeded",), "contents differ"),
    ],
)
def test_other_data_are_told_apart_by_their_identity(source, words, said):
    here = source(words[0] if words == ("unseeded",) else "make").identity
    again = source(words[0] if words == ("unseeded",) else "make").identity
    assert (here.digest == again.digest) == (words != ("unseeded",))
    assert said in here.difference(again if words == ("unseeded",) else source(*words).identity)


def test_a_data_set_has_names_of_its_own(config):
    assert list(open_sets(config("named")).names) == ["a", "b", "c", "d"]
    assert user_code.plugins("largebatch.no_such_group") == {}


def test_other_sets_take_no_arguments(compose):
    with pytest.raises(
        UserError, match=r"dataset\.kwargs is for dataset=python and dataset=huggingface, not for digits"
    ):
        compose("dataset.kwargs={a: 1}")
