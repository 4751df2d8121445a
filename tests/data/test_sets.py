import gzip
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from largebatch.base.errors import UserError
from largebatch.data import sets


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Look in no folder of this machine's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LARGEBATCH_DATA", raising=False)
    monkeypatch.setattr(sets, "DEBIAN_FASHION", tmp_path / "debian")


def bytes_of(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_digits_are_split_in_equal_shares(compose):
    train, val = sets.load(compose().dataset)
    assert train.images.shape == (1437, 1, 8, 8)
    assert val.images.shape == (360, 1, 8, 8)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert (train.images.min(), train.images.max()) == (0, 255)
    shares = torch.bincount(val.labels) / (torch.bincount(train.labels) + torch.bincount(val.labels))
    assert (shares - 0.2).abs().max() < 0.005
    together = torch.cat([train.images, val.images]).flatten(1).sum(1).sort().values
    again = torch.cat([part.images for part in sets.load(compose().dataset)]).flatten(1).sum(1).sort().values
    assert together.equal(again)


def test_digits_are_those_of_scikit_learn(compose):
    digits = load_digits()
    places = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    for part, rows in zip(sets.load(compose().dataset), places, strict=True):
        assert part.images.equal(pixels[rows, None])
        assert part.labels.equal(torch.from_numpy(digits.target)[rows])


def test_normalisation_is_that_of_the_digits(compose):
    config = compose().dataset
    pixels = sets.load(config)[0].images / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((config.mean[0], config.std[0]), abs=1e-3)


def test_a_size_that_the_set_does_not_have_is_refused(compose):
    with pytest.raises(UserError, match=r"train images are 1437×1×8×8, where .* say 1437×1×9×8"):
        sets.load(compose("dataset.height=9").dataset)


# Fashion-MNIST: idx files


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(head + values.numpy().tobytes())


@pytest.fixture
def fashion(compose):
    """Fashion-MNIST's configuration, but for a few images."""
    return replace(compose("dataset=fashion_mnist").dataset, train_images=5, val_images=3)


def write_fashion(folder, end=""):
    train, val = bytes_of(5, 28, 28, seed=1), bytes_of(3, 28, 28, seed=2)
    for name, values in {
        "train-images-idx3-ubyte": train,
        "train-labels-idx1-ubyte": torch.arange(5, dtype=torch.uint8),
        "t10k-images-idx3-ubyte": val,
        "t10k-labels-idx1-ubyte": torch.arange(3, dtype=torch.uint8) + 5,
    }.items():
        write_idx(folder / f"{name}{end}", values)
    return train, val


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("place", ["root", "root/FashionMNIST/raw", "variable", "debian"])
def test_fashion_mnist_is_found_and_read(place, end, fashion, tmp_path, monkeypatch):
    pixels, val_pixels = write_fashion(tmp_path / place, end)
    if place.startswith("root"):
        fashion = replace(fashion, root=str(tmp_path / "root"))
    if place == "variable":
        monkeypatch.setenv("LARGEBATCH_DATA", str(tmp_path / place))
    else:
        monkeypatch.setenv("LARGEBATCH_DATA", str(tmp_path / "holds nothing"))
    train, val = sets.load(fashion)
    assert train.images.equal(pixels[:, None])
    assert val.images.equal(val_pixels[:, None])
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert sets.locate(fashion) == str(tmp_path / place.split("/")[0])


def test_a_root_that_was_given_is_the_only_place_searched(fashion, tmp_path):
    write_fashion(tmp_path / "debian")
    assert sets.search_path(replace(fashion, root="~/sets")) == [tmp_path.home() / "sets"]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_file_that_is_cut_short_is_named(end, fashion, tmp_path):
    write_fashion(tmp_path / "data", end)
    path = tmp_path / "data" / f"t10k-images-idx3-ubyte{end}"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"data/{path.name} (is not a complete idx file|cannot be read).*again"):
        sets.load(fashion)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"\0\0\x0d\x01\0\0\0\1\0\0\0\0", b"GIF89a.."]
)
def test_a_file_of_another_format_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="is not a complete idx file"):
        sets.read_idx(tmp_path / "file")


def test_a_lacking_file_is_named(fashion, tmp_path):
    write_fashion(tmp_path / "data")
    (tmp_path / "data" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"lacks .*train-labels-idx1-ubyte"):
        sets.load(fashion)


def test_labels_that_do_not_fit_the_images_are_refused(fashion, tmp_path):
    write_fashion(tmp_path / "data")
    write_idx(tmp_path / "data" / "t10k-labels-idx1-ubyte", torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"val labels \(2\) are not one for each of the 3 images"):
        sets.load(fashion)


# CIFAR: the binary version


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_is_read_from_its_binary_version(name, label_bytes, compose, tmp_path):
    layout = {
        "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)], "test_batch.bin"),
        "cifar100": ("cifar-100-binary", ["train.bin"], "test.bin"),
    }
    folder, names, val_name = layout[name]
    (tmp_path / "root" / folder).mkdir(parents=True)
    rows = bytes_of(5 * 2, label_bytes + 3072)
    for file, part in zip([*names, val_name], [*rows.chunk(len(names)), rows[:3]], strict=True):
        (tmp_path / "root" / folder / file).write_bytes(part.numpy().tobytes())
    config = replace(compose(f"dataset={name}", "dataset.root=root").dataset, train_images=10, val_images=3)
    train, val = sets.load(config)
    for number, row in enumerate(rows.tolist()):
        # "<1 x label><3072 x pixel>": 1024 red bytes row by row, then green, then blue; CIFAR-100's fine label is 2nd.
        assert train.labels[number] == row[label_bytes - 1]
        assert train.images[number, 1, 2, 3] == row[label_bytes + 1024 + 2 * 32 + 3]
    assert val.images.equal(train.images[:3])
    assert sets.locate(config) == "root"

    path = tmp_path / "root" / folder / val_name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{val_name} is cut short"):
        sets.load(config)
    path.unlink()
    with pytest.raises(UserError, match=f"{val_name} is missing"):
        sets.load(config)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_without_a_network_the_message_says_what_to_do(name, compose, monkeypatch, tmp_path):
    from torchvision.datasets import FashionMNIST

    nowhere = "http://127.0.0.1:9/"  # the discard port: refused
    monkeypatch.setattr(FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(sets, "CIFAR_URL", nowhere)
    config = compose(f"dataset={name}").dataset
    with pytest.raises(UserError) as caught:
        sets.load(config)
    assert re.match(
        rf"dataset={name} was not found in .*data, and downloading it to data failed: .*Connection refused.*\. \S.+\.$",
        str(caught.value),
    )
    assert sets.locate(config).startswith("not found (")


def test_synthetic_images_have_any_shape(compose):
    train, val = sets.load(compose("dataset=synthetic", "dataset.height=5", "dataset.width=7").dataset)
    assert train.images.shape[1:] == val.images.shape[1:] == (3, 5, 7)
    assert len(np.unique(train.images)) == 256
