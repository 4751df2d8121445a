import os
import threading

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from largebatch.base.errors import UserError
from largebatch.training import checkpoint
from largebatch.training.checkpoint import Snapshot, Writer
from largebatch.training.optimizer import make_optimizer, parameter_groups


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


def snapshot(iteration, **state):
    return Snapshot({"w": torch.full((50,), float(iteration))}, {"iteration": iteration, **state})


def write(directory, iteration, keep=2, prefix=""):
    return checkpoint.write(directory, snapshot(iteration), keep, prefix)


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_training_goes_on_with_the_same_bits(compose, tmp_path, name):
    config = compose(f"optimizer={name}").optimizer
    model = network()
    optimizer = make_optimizer(parameter_groups(model, config.weight_decay), config)
    descend(model, optimizer, range(3))
    tensors, scalars = checkpoint.pack(model, optimizer)
    checkpoint.write(tmp_path, Snapshot(tensors, {"iteration": 3, "optimizer": scalars}), keep=2)
    descend(model, optimizer, range(3, 6))

    resumed = network(seed=1)
    resumed_optimizer = make_optimizer(parameter_groups(resumed, config.weight_decay), config)
    checkpoint.unpack(checkpoint.newest(tmp_path), resumed, resumed_optimizer)
    descend(resumed, resumed_optimizer, range(3, 6))
    for key, value in model.state_dict().items():
        assert value.equal(resumed.state_dict()[key]), key


def test_momentum_comes_back_as_the_weights_lie(compose, tmp_path):
    config = compose().optimizer
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    optimizers = [make_optimizer(parameter_groups(model, config.weight_decay), config) for model in models]
    models[0](torch.ones(1, 3, 5, 5)).sum().backward()
    optimizers[0].step()
    tensors, scalars = checkpoint.pack(models[0], optimizers[0])
    checkpoint.write(tmp_path, Snapshot(tensors, {"iteration": 1, "optimizer": scalars}), keep=1)
    checkpoint.unpack(checkpoint.newest(tmp_path), models[1], optimizers[1])
    before, after = (one.state[model.weight]["momentum_buffer"] for one, model in zip(optimizers, models, strict=True))
    assert after.equal(before)
    assert after.stride() == models[1].weight.stride() != torch.empty_like(after).contiguous().stride()


@pytest.mark.parametrize(("keep", "kept"), [(1, [2000000000]), (2, [2000000000, 15]), (9, [2000000000, 15, 10, 5])])
def test_the_newest_is_found_and_as_many_are_kept(tmp_path, keep, kept):
    for iteration in (5, 10, 2000000000, 15):
        write(tmp_path, iteration, keep)
    found = checkpoint.newest(tmp_path)
    assert found.state["iteration"] == 2000000000
    assert found.tensors["w"].eq(2000000000.0).all()
    assert [checkpoint.iteration_of(path) for path in checkpoint.candidates(tmp_path)] == kept
    assert not list(tmp_path.glob(".*"))


def test_the_best_one_stays_beside_the_newest_until_a_better_one_comes(tmp_path):
    for iteration, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        write(tmp_path, iteration)
        if best:
            write(tmp_path, iteration, keep=1, prefix=checkpoint.BEST)
    names = [path.name.rpartition("-")[0] for path in checkpoint.candidates(tmp_path)]
    assert names == ["000000005", "000000004", "best-000000003"]
    for path in checkpoint.candidates(tmp_path)[:2]:
        path.write_bytes(b"torn")
    assert checkpoint.newest(tmp_path).state["iteration"] == 3


def test_other_files_are_no_checkpoints(tmp_path):
    path = write(tmp_path, 1)
    strangers = {f"copy-{path.name}", "1-x.safetensors", "notes.txt"}
    for name in {f".{path.name}.1.tmp", *strangers}:
        (tmp_path / name).write_bytes(path.read_bytes())
    assert checkpoint.candidates(tmp_path) == [path]
    checkpoint.sweep_up(tmp_path)
    assert {other.name for other in tmp_path.iterdir()} == {path.name, *strangers}


def test_the_clock_does_not_decide_which_is_newest(tmp_path):
    early, late = write(tmp_path, 1), write(tmp_path, 2)
    os.utime(early, (2e9, 2e9))
    os.utime(late, (0, 0))
    assert checkpoint.newest(tmp_path).state["iteration"] == 2


def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 99)
        path = write(tmp_path, 1)
    with pytest.raises(UserError, match="schema 99, and this version of largebatch reads schema"):
        checkpoint.newest(tmp_path)
    assert path.exists()


def writer(directory, complaints, before=lambda: None):
    return Writer(directory, 2, before, complaints.append)


def test_a_snapshot_is_the_run_at_that_moment(tmp_path):
    """The writer waits at a gate, while training changes what was copied."""
    gate, weight, state = threading.Event(), torch.zeros(3), {"iteration": 7, "errors": [1.0]}
    work = writer(tmp_path, [], before=gate.wait)
    work.submit(Snapshot({"w": weight}, state))
    weight += 1
    state["errors"].append(2.0)
    assert checkpoint.newest(tmp_path) is None
    gate.set()
    work.finish()
    found = checkpoint.newest(tmp_path)
    assert (found.tensors["w"].tolist(), found.state["errors"]) == ([0, 0, 0], [1.0])


def test_what_a_checkpoint_refers_to_is_on_the_disk_before_it(tmp_path):
    seen = []
    work = writer(tmp_path, [], before=lambda: seen.append(list(tmp_path.glob("*.safetensors"))))
    work.submit(snapshot(1))
    work.finish()
    assert seen == [[]]


def test_a_bug_in_the_background_comes_to_light(tmp_path):
    def fail():
        raise KeyError("a bug of ours")

    work = writer(tmp_path, [], before=fail)
    work.submit(snapshot(1))
    with pytest.raises(KeyError, match="a bug of ours"):
        work.finish()


def test_who_leaves_a_run_waits_for_what_is_still_written(tmp_path):
    begun, may_end = threading.Event(), threading.Event()

    def before():
        begun.set()
        may_end.wait()

    leaving = writer(tmp_path, [], before)
    leaving.submit(snapshot(1))
    begun.wait()
    threading.Timer(0.2, may_end.set).start()
    leaving.close()
    assert [checkpoint.iteration_of(path) for path in checkpoint.candidates(tmp_path)] == [1]


def test_a_bit_flipped_anywhere_falls_back_to_the_checkpoint_before(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        assert checkpoint.newest(tmp_path).state["iteration"] == 1, place
    path.write_bytes(whole)
    assert checkpoint.newest(tmp_path).state["iteration"] == 2


def test_a_file_torn_anywhere_falls_back_to_the_checkpoint_before(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert checkpoint.newest(tmp_path).state["iteration"] == 1, length


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None
    write(tmp_path, 1).write_bytes(b"")
    assert checkpoint.newest(tmp_path) is None


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    complaints = []
    work = writer(tmp_path, complaints)
    work.submit(snapshot(3))
    work.finish()
    monkeypatch.undo()
    assert complaints == ["no checkpoint of iteration 3 could be written: [Errno 28] No space left on device"]
    assert checkpoint.newest(tmp_path).state["iteration"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.newest(tmp_path).path.name]


def test_equal_weights_are_equal_bytes_and_load_in_torchvision(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    checkpoint.save_weights(model, tmp_path / "a.safetensors")
    theirs = torchvision.models.resnet18(num_classes=5)
    theirs.load_state_dict(load_file(tmp_path / "a.safetensors"))
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
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert other[1].weight.equal(model[0].weight)
