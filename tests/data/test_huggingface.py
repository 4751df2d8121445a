"""dataset=huggingface, on sets that the library datasets has written here."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from largebatch.base.errors import UserError
from largebatch.config.groups import LoaderConfig
from largebatch.data import huggingface
from largebatch.data.layouts import open_splits
from largebatch.data.source import Target, open_source, sizes_of


def encoded(row, size):
    pixels = np.full((*size, 3), 20 * row, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def table(rows, first=0, size=(12, 16), names=("cat", "dog", "eel")):
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"picture": datasets.Image(), "kind": label, "weight": datasets.Value("float32")})
    values = {
        "picture": [encoded(first + row, size) for row in range(rows)],
        "kind": [row % 3 for row in range(rows)],
        "weight": [0.5] * rows,
    }
    return datasets.Dataset.from_dict(values, features=features)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return the directory of a set that save_to_disk has written."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    parts = {"train": table(9), "test": table(4, first=5)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.fixture
def config(compose, saved):
    sizes = ("dataset.height=8", "dataset.width=8", "dataset.resize=null", "dataset.decoder=pillow")

    def configured(*words, root=saved):
        named = ("dataset=huggingface", "dataset.name=pets", f"dataset.root='{root}'")
        return compose("k=1", "n=1", *named, *sizes, *words).dataset

    return configured


def opened(config):
    target = Target(torch.device("cpu"), torch.float32)
    return open_source(config, LoaderConfig(workers=0, prefetch=None), 0, target, cores=1)


def test_a_set_of_save_to_disk_is_trained_and_validated_on(config):
    found = config()
    source = opened(found)
    assert (source.train_images, source.val_images, source.classes) == (9, 4, 3)
    (batch,) = source.validation([range(4)])
    assert batch.labels.tolist() == [0, 1, 2, 0]
    mean, std = found.mean[0], found.std[0]
    expected = [(20 * (5 + row) / 255 - mean) / std for row in range(4)]
    assert batch.images[:, 0, 4, 4].tolist() == pytest.approx(expected)
    train = next(iter(source.train([(0, torch.tensor([8, 1]))])))
    assert train.images.shape == (2, 3, 8, 8)
    assert train.labels.tolist() == [2, 1]
    assert source.identity.classes == ("cat", "dog", "eel")
    assert sizes_of(found).val_images == 4


def test_a_directory_of_parquet_files_is_a_set_too(config, tmp_path):
    (tmp_path / "parquet").mkdir()
    for split, part in (("train", table(6, names=None)), ("validation", table(3, names=None))):
        part.to_parquet(str(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"))
    cache = f"dataset.kwargs={{cache_dir: '{tmp_path}/cache'}}"
    source = opened(config("dataset.label_column=kind", cache, root=tmp_path / "parquet"))
    assert (source.train_images, source.val_images, source.classes) == (6, 3, 3)
    assert source.identity.classes == ()


def test_images_are_held_out_of_the_training_set(config):
    found = open_splits(config("dataset.holdout=2"))
    assert (len(found.train), len(found.val)) == (7, 2)
    assert found.val.read(0)[:4] == b"\x89PNG"
    assert "validated on 2 of the training images" in found.line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("dataset.image_column=picure",),
            r"=picure is none of picture, kind, weight\. Did you mean 'picture'\?",
        ),
        (("dataset.label_column=age",), "label_column=age is none of picture, kind, weight"),
    ],
)
def test_a_column_that_is_not_there_is_refused(config, words, said):
    with pytest.raises(UserError, match=said):
        open_splits(config(*words))


def test_columns_and_splits_must_be_clear(config, tmp_path):
    bare = {"train": table(3, names=None), "test": table(3, names=None)}
    datasets.DatasetDict(bare).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"has no columns of type ClassLabel among .*: name one with"):
        open_splits(config(root=tmp_path / "bare"))
    datasets.DatasetDict({"train": table(3)}).save_to_disk(str(tmp_path / "alone"))
    with pytest.raises(UserError, match="has the splits train: it needs train, and one of validation, val, test"):
        open_splits(config(root=tmp_path / "alone"))


def test_a_set_that_cannot_be_had_is_one_sentence(config, compose, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"dataset=huggingface dataset.name=pets cannot be opened: "):
        open_splits(config(root=tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"dataset=huggingface needs dataset\.name"):
        open_splits(compose("k=1", "n=1", "dataset=huggingface").dataset)
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the library datasets: pip install 'largebatch\[huggingface\]'"):
        open_splits(config())
