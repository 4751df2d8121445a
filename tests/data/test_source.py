import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import make_tree, spoil
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from largebatch.base.errors import UserError
from largebatch.config.groups import LoaderConfig
from largebatch.data.file_batches import UNREADABLE
from largebatch.data.loading import _watched, fitting_prefetch, is_lost_loader
from largebatch.data.source import Target, _gathered, open_source
from largebatch.data.stream import SampleStream
from largebatch.runtime.world import World
from largebatch.training.validation import batches_of, evaluate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Four classes of real photographs: 24 to train on, 12 to validate with."""
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def folder(compose, tree):
    small = ("dataset.height=32", "dataset.width=32", "dataset.resize=40")
    return compose("dataset=imagefolder", f"dataset.root={tree}", *small).dataset


def opened(config, workers=0, seed=3):
    return open_source(config, LoaderConfig(workers=workers, prefetch=2), seed, Target(CPU, torch.float64), cores=1)


def epoch_of(source, first=0, workers=4, per_pass=2, epochs=(0,)):
    """Return all batches that one process reads of k = 4 workers of n = 3."""
    stream = SampleStream(source.train_images, 4, 3, seed=3)
    steps = stream.iterations_per_epoch
    passes = (batch for e in epochs for batch in stream.passes(e * steps, (e + 1) * steps, first, workers, per_pass))
    return list(source.train(passes))


def together(batches):
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        sum(batch.corrupt for batch in batches),
    )


def test_loader_processes_do_not_change_what_is_read(folder):
    images, labels, corrupt = together(epoch_of(opened(folder), epochs=(0, 1)))
    assert images.shape == (48, 3, 32, 32)
    assert corrupt == 0
    assert torch.bincount(labels).tolist() == [12, 12, 12, 12]
    val = [batch.images for batch in opened(folder).validation(batches_of(12, 5))]
    for workers in (1, 2):
        again = together(epoch_of(opened(folder, workers), epochs=(0, 1)))
        assert again[0].equal(images)
        assert again[1].equal(labels)
        again_val = [batch.images for batch in opened(folder, workers).validation(batches_of(12, 5))]
        assert all(one.equal(other) for one, other in zip(val, again_val, strict=True))
    seen = {tuple(image.flatten().tolist()) for image in images}
    assert len(seen) == 48  # another crop in the second epoch


def test_training_images_as_validation_sees_its_own(folder, tree):
    indices = [torch.tensor([5, 0, 23]), torch.tensor([7])]
    plain = [batch.images for batch in opened(folder).plain(indices)]
    again = [batch.images for batch in opened(folder, seed=9).plain(indices)]  # no seed draws anything
    assert [len(images) for images in plain] == [3, 1]
    assert all(one.equal(other) for one, other in zip(plain, again, strict=True))
    path = sorted((tree / "train").glob("*/*"))[7]
    pixels = pil_to_tensor(center_crop(resize(Image.open(path).convert("RGB"), [40]), [32, 32]))
    expected = (pixels.double() / 255 - torch.tensor(folder.mean).view(3, 1, 1)) / torch.tensor(folder.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(plain[1][0], expected, rtol=1e-6, atol=1e-6)


def test_small_training_images_without_augmentation(compose):
    source = opened(compose("dataset=digits").dataset)
    (plain,) = source.plain([torch.arange(9)])
    (augmented,) = source.train([(0, torch.arange(9))])
    assert plain.labels.equal(augmented.labels)
    assert not plain.images.equal(augmented.images)
    assert plain.images.equal(next(opened(compose("dataset=digits").dataset, seed=8).plain([torch.arange(9)])).images)


def test_processes_share_what_one_process_reads(folder):
    """Of every iteration's four workers' samples, process 0 of 2 reads the first half, process 1 the second."""
    alone = together(epoch_of(opened(folder)))[0].view(2, 2, 6, 3, 32, 32)
    for rank in (0, 1):
        mine = together(epoch_of(opened(folder), first=2 * rank, workers=2, per_pass=1))[0]
        assert mine.view(2, 6, 3, 32, 32).equal(alone[:, rank])


def test_validation_takes_the_centre_of_the_resized_image(folder, tree):
    batches = list(opened(folder).validation(batches_of(12, 5)))
    assert [len(batch.labels) for batch in batches] == [5, 5, 2]
    with Image.open(tree / "val" / "astronaut" / "00000000.JPEG") as file:
        image = file.convert("RGB")
    pixels = pil_to_tensor(center_crop(resize(image, [40]), [32, 32])) / 255.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (folder.mean, folder.std))
    assert torch.allclose(batches[0].images[0], ((pixels - mean) / std).double(), atol=1e-5)


def test_odd_files_are_read_as_rgb(folder, tree):
    found = []
    for number in range(3):
        with Image.open(tree / "train" / "coffee" / f"0000000{number}.JPEG") as image:
            found.append((image.format, image.mode))
    assert found == [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")]
    whole = replace(folder, crop="none")
    source = opened(whole)
    first = 2 * 6  # coffee's
    (batch,) = source.train([(0, torch.arange(first, first + 3))])
    grey, cmyk, png = batch.images * torch.tensor(whole.std).view(3, 1, 1) + torch.tensor(whole.mean).view(3, 1, 1)
    assert torch.allclose(grey[0], grey[2])
    assert not torch.allclose(png[0], png[2])
    assert (cmyk.mean() - png.mean()).abs() < 0.1  # much the same part of the photograph: not inverted


@pytest.fixture
def damaged(folder, tree, tmp_path):
    """A copy of the tree with two neighbours and the last image of training corrupt, and one of validation."""
    root = shutil.copytree(tree, tmp_path / "damaged")
    for name in ("chelsea/00000002", "chelsea/00000003", "motorcycle_left/00000005"):
        spoil(root / "train" / f"{name}.JPEG")
    spoil(root / "val" / "coffee" / "00000001.JPEG")
    return replace(folder, root=str(root), on_error="skip")


def test_a_corrupt_image_is_replaced_by_the_next_whoever_reads_it(folder, damaged):
    order = SampleStream(24, 4, 3, seed=3).order(0)
    whole, labels, _ = together(epoch_of(opened(folder)))
    images, new_labels, corrupt = together(epoch_of(opened(damaged)))
    assert corrupt == 3
    stands_in = {8: 10, 9: 10, 23: 0}  # round the end of the list
    place = {int(index): number for number, index in enumerate(order)}
    for index in range(24):
        source = place[stands_in.get(index, index)]
        assert images[place[index]].equal(whole[source])
        assert new_labels[place[index]] == labels[source]
    for workers in (1, 2):
        again, _, again_corrupt = together(epoch_of(opened(damaged, workers)))
        assert again.equal(images)
        assert again_corrupt == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_the_run_with_its_path(workers, damaged):
    source = opened(replace(damaged, on_error="stop"), workers)
    with pytest.raises(UserError, match=r"^corrupt image .*train/(chelsea|motorcycle_left)/0.*JPEG: .*on_error=skip"):
        epoch_of(source)
    with pytest.raises(UserError, match=r"^corrupt image .*val/coffee/00000001.JPEG: "):
        list(source.validation(batches_of(12, 5)))


class Oracle(torch.nn.Module):
    """Says the class that is next in ``labels``, surely."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def forward(self, images):
        mine, self.labels = self.labels[: len(images)], self.labels[len(images) :]
        return 20.0 * torch.nn.functional.one_hot(mine, 4).double()


def test_a_corrupt_validation_image_is_wrong_and_has_no_loss(damaged):
    """No sample is left out or counted twice: of 12, all named rightly but the one that cannot be seen."""
    cuts = batches_of(12, 5)
    batches = list(opened(damaged).validation(cuts))
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, UNREADABLE, 2, 3, 3, 3]
    found = evaluate(Oracle(labels.clamp(min=0)), iter(batches), range(3), cuts, World(0, 1, CPU))
    assert (found.total, found.unreadable) == (12, 1)
    assert found.error == pytest.approx(100 / 12)
    assert found.loss < 1e-7


def test_a_set_without_one_readable_image_ends_the_search(damaged):
    for path in Path(damaged.root, "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of this split can be read; the first problem: corrupt image"):
        epoch_of(opened(damaged))


def test_a_loader_process_leaves_signals_to_the_run(folder):
    source = opened(folder, workers=1)
    stream = SampleStream(24, 1, 1, seed=0)
    batches = source.train(stream.passes(0, 24 * 1000, 0, 1, 1))
    next(batches)
    loader = next(child for child in torch.multiprocessing.active_children())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(loader.pid, number)  # these are for the run to heed
    next(batches)
    assert loader.is_alive()
    batches.close()
    assert not loader.is_alive()


def test_a_process_that_ends_in_the_middle_takes_its_loaders_along(folder):
    """By an exception that nobody expected: what it holds on to is still there when Python waits for children."""
    program = (
        "import pickle, sys, torch\n"
        "from largebatch.config.groups import LoaderConfig\n"
        "from largebatch.data.source import Target, open_source\n"
        "target = Target(torch.device('cpu'), torch.float32)\n"
        "source = open_source(pickle.load(sys.stdin.buffer), LoaderConfig(workers=1, prefetch=2), 0, target, cores=1)\n"
        "batches = source.train([(0, torch.arange(3))] * 100)\n"
        "next(batches)\n"
        "raise KeyError('a bug')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(folder), capture_output=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, b"KeyError: 'a bug'")


def test_a_loader_that_is_busy_ends_with_a_run_that_is_killed(folder):
    program = (
        "import os, pickle, signal, sys, threading, time, torch\n"
        "from largebatch.config.groups import LoaderConfig\n"
        "from largebatch.data import source as module\n"
        "begun, begin = os.pipe()\n"
        "module.FileBatches.__getitems__ = lambda self, places: os.write(begin, b'.') and time.sleep(600)\n"
        "target = module.Target(torch.device('cpu'), torch.float32)\n"
        "loaders, folder = LoaderConfig(workers=2, prefetch=2), pickle.load(sys.stdin.buffer)\n"
        "batches = module.open_source(folder, loaders, 0, target, cores=1).train([(0, torch.arange(3))] * 100)\n"
        "threading.Thread(target=next, args=(batches,)).start()\n"
        "os.read(begun, 1)\n"
        "os.read(begun, 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Its output ends when the last process that could write to it is gone.
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(folder), capture_output=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("raised", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_pipe_that_breaks_is_a_lost_loader(raised):
    def broken():
        yield "batch"
        raise raised

    batches = _watched(broken())
    assert next(batches) == "batch"
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert is_lost_loader(caught.value)
    assert not is_lost_loader(RuntimeError("something else"))


def test_settings_that_folders_cannot_have_are_refused(folder):
    for change, words in (
        ({"channels": 1, "mean": (0.5,), "std": (0.5,)}, "read as RGB, 3 channels"),
        ({"crop": "pad"}, "dataset.crop=pad is not for dataset=imagefolder: image folders take resized or none"),
        ({"resize": 31}, "resize=31 is smaller than the crop of 32×32, which would get black borders"),
        ({"name": "imagefolders"}, "dataset.name=imagefolders is not known: it takes digits"),
    ):
        with pytest.raises(UserError, match=words):
            opened(replace(folder, **change))


def test_a_set_in_memory_gives_every_sample_its_own_crop(compose):
    config = compose().dataset
    source = opened(config)
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(0))[:64]
    (whole,) = source.train([(1, order)])
    parts = list(source.train((1, part) for part in order.split(7)))
    assert torch.cat([part.images for part in parts]).equal(whole.images)
    assert whole.images.dtype == torch.float64
    assert torch.cat([batch.labels for batch in source.validation(batches_of(360))]).shape == (360,)
    with pytest.raises(UserError, match=r"dataset.classes=9, but the labels go up to 9"):
        opened(replace(config, classes=9))


def test_passes_of_small_images_are_gathered_within_an_epoch_and_a_limit():
    passes = [
        (0, torch.arange(2)),
        (0, torch.arange(3)),
        (0, torch.arange(2)),
        (1, torch.arange(1)),
        (1, torch.arange(9)),
    ]
    gathered = [(epoch, [len(part) for part in parts]) for epoch, parts in _gathered(passes, images=5)]
    assert gathered == [(0, [2, 3]), (0, [2]), (1, [1]), (1, [9])]


def test_what_is_cut_together_is_what_is_cut_alone(compose):
    source = opened(compose("dataset=synthetic_small", "dataset.flip=true").dataset)
    stream = SampleStream(source.train_images, 4, 3, seed=3)
    steps = stream.iterations_per_epoch
    passes = list(stream.passes(steps - 2, steps + 2, 0, 4, 1))  # the end of one epoch and the start of the next
    assert len(list(_gathered(passes, 1000))) == 2
    alone = [batch for one in passes for batch in source.train([one])]
    for mine, other in zip(source.train(passes), alone, strict=True):
        assert mine.images.equal(other.images)
        assert mine.labels.equal(other.labels)


MB = 1_000_000


@pytest.mark.parametrize(
    ("wanted", "workers", "batch", "room", "found"),
    [
        (None, 4, 38 * MB, None, 4),  # 4 × 4 × 38 MB are less than 1 GiB
        (None, 12, 38 * MB, None, 2),  # 12 × 4 × 38 MB are more
        (None, 64, 38 * MB, None, 1),
        (7, 12, 38 * MB, None, 7),  # what was given stays
        (None, 2, 10 * MB, 64 * MB, 2),  # 2 × 4 batches and the one in use are 90 MB
        (4, 2, 10 * MB, 90 * MB, 4),
        (4, 2, 10 * MB, 89 * MB, 3),
    ],
)
def test_batches_that_are_kept_ready_fit_into_shared_memory(wanted, workers, batch, room, found):
    assert fitting_prefetch(wanted, workers, batch, room) == found


def test_too_little_shared_memory_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"room for 64 MB.* take 342 MB.*shm-size"):
        fitting_prefetch(None, 2, 38 * MB, 64 * MB)


def test_a_loader_looks_at_the_shared_memory_before_it_starts(compose, tmp_path, monkeypatch):
    make_tree(tmp_path)
    config = compose("dataset=imagefolder", f"dataset.root={tmp_path}", "dataset.height=224", "dataset.width=224")
    source = open_source(config.dataset, LoaderConfig(workers=2, prefetch=None), 0, Target(CPU, torch.float32), 2)
    monkeypatch.setattr("largebatch.data.loading._shared_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"shared memory \(/dev/shm\) has room for 0 MB"):
        next(source.train([(0, torch.arange(2))]))
