import pytest
import torch
import torchvision
from torch import nn

from largebatch import checkpoint
from largebatch.optim import make_optimizer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def descend(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def write(directory, iteration):
    return checkpoint.write(directory, {"w": torch.full((50,), float(iteration))}, {"iteration": iteration})


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_training_goes_on_with_the_same_bits(compose, tmp_path, name):
    config = compose(f"optimizer={name}").optimizer
    model = network()
    optimizer = make_optimizer(model, config)
    descend(model, optimizer, range(3))
    tensors, scalars = checkpoint.pack(model, optimizer)
    checkpoint.write(tmp_path, tensors, {"iteration": 3, "optimizer": scalars})
    descend(model, optimizer, range(3, 6))

    resumed = network(seed=1)
    resumed_optimizer = make_optimizer(resumed, config)
    checkpoint.unpack(checkpoint.newest(tmp_path), resumed, resumed_optimizer)
    descend(resumed, resumed_optimizer, range(3, 6))
    for key, value in model.state_dict().items():
        assert value.equal(resumed.state_dict()[key]), key


def test_the_newest_is_found_and_two_are_kept(tmp_path):
    for iteration in (5, 10, 2000000000, 15):
        write(tmp_path, iteration)
    found = checkpoint.newest(tmp_path)
    assert found.state["iteration"] == 2000000000
    assert found.tensors["w"].eq(2000000000.0).all()
    assert len(checkpoint.candidates(tmp_path)) == checkpoint.KEEP
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.99])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path, place):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert checkpoint.newest(tmp_path).state["iteration"] == 1


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_torn_file_falls_back_to_the_checkpoint_before(tmp_path, length):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:length])
    assert checkpoint.newest(tmp_path).state["iteration"] == 1


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None
    write(tmp_path, 1).write_bytes(b"")
    assert checkpoint.newest(tmp_path) is None


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).state["iteration"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.newest(tmp_path).path.name]


def test_equal_weights_are_equal_bytes_and_load_in_torchvision(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    checkpoint.save_weights(model, tmp_path / "a.safetensors")
    theirs = torchvision.models.resnet18(num_classes=5)
    checkpoint.load_weights(theirs, tmp_path / "a.safetensors")
    assert all(value.equal(theirs.state_dict()[name]) for name, value in model.state_dict().items())
    checkpoint.save_weights(theirs, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_channels_last_weights_are_the_same_bytes(tmp_path):
    model = torchvision.models.resnet18(num_classes=5)
    checkpoint.save_weights(model, tmp_path / "a.safetensors")
    checkpoint.save_weights(model.to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tied_weights_are_written_twice(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    checkpoint.save_weights(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    checkpoint.load_weights(other, tmp_path / "a.safetensors")
    assert other[1].weight.equal(model[0].weight)
