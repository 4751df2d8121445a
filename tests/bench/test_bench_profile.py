"""A profile measured here is one that ``largebatch predict`` reads; its numbers are what a hand computes."""

import pytest
import torch
from images import make_tree

from largebatch.bench import profile as measured
from largebatch.config.build import build
from largebatch.cost_model.allreduce import exchange
from largebatch.cost_model.profile import Profile
from largebatch.data.loading import PREFETCH
from largebatch.data.source import Batch

CPU = torch.device("cpu")
TINY = ("dataset.height=8", "dataset.width=8", "model=resnet8", "n=4", "threads=1", "device=cpu")


@pytest.fixture(autouse=True)
def threads():
    """Give the tests that follow the threads back: a benchmark sets its own number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_link_comes_from_two_sizes():
    # Three processes: 4 messages of 50 µs, and 4/3 of 3 MB at 1 GB/s.
    found = measured.link(tiny=200e-6, message=200e-6 + 4e-3, processes=3, size=3_000_000)
    assert found == {
        "between": "gpus",
        "latency_us": pytest.approx(50),
        "gbit_per_second": pytest.approx(8),
    }


@pytest.mark.parametrize(
    ("both", "share"),
    [
        (0.110, 1.0),  # four messages of 10 ms, back-propagation of 100: all but the last are hidden
        (0.140, 0.0),  # one after the other
        (0.125, 0.5),
        (0.200, 0.0),  # they hold one another up
    ],
)
def test_the_share_that_is_hidden(both, share):
    seconds = {"message": 0.010, "backward": 0.100, "both": both}
    assert measured.overlap(seconds, messages=4) == pytest.approx(share)


def test_a_message_smaller_than_what_was_timed_takes_its_own_time():
    assert measured.time_of(1e6, {"tiny": 1e-3, "message": 5e-3}, 4e6) == pytest.approx(2e-3)


def test_the_share_that_is_hidden_is_the_one_that_predict_takes(profile_of):
    # Messages of 30 ms come every 25: the last one and three times 5 are not hidden at best, 120 at worst.
    seconds = {"message": 0.030, "backward": 0.100, "both": 0.180}
    share = measured.overlap(seconds, messages=4)
    link = measured.link(0.0, 0.030, 2, 1_000_000)
    told = profile_of(gradient_bytes=4_000_000, messages=4, overlap=share, links=[link])
    assert exchange(told, 2, 1, 0.100, "ring").exposed == pytest.approx(0.080)


@pytest.fixture
def profile_of():
    """Return a function that makes a profile of plain values, changed by its arguments."""
    values = {
        "schema": 1,
        "source": "",
        "machine": "",
        "device": "",
        "model": "",
        "images": "",
        "precision": "fp32",
        "n": 4,
        "train_images": 100,
        "val_images": 10,
        "update_ms": 0,
        "gradient_bytes": 1,
        "messages": 1,
        "overlap": 1,
        "loading_images_per_second": None,
        "gpus_per_node": 2,
        "links": [],
        "passes": [{"workers": 1, "mean_ms": 2, "std_ms": 0, "backward_ms": 1, "steps_ms": []}],
    }
    return lambda **changes: build(Profile, values | changes)


@pytest.mark.slow
def test_a_profile_of_two_processes(compose):
    config = compose(*TINY, "dataset=synthetic_small", "dataset.pad=1")
    values = measured.measure(config, repeats=4)
    assert "2 threads" in measured.as_lines(values | {"machine": "here", "device": "2 threads"})[0]
    profile = build(Profile, values | {"machine": "here"})
    (one,) = profile.passes
    assert len(one.steps_ms) == 4
    assert one.mean_ms + profile.update_ms == pytest.approx(sum(one.steps_ms) / 4)
    parameters = sum(p.numel() for p in measured.build_model(config.model, config.dataset.classes, 3).parameters())
    assert (profile.gradient_bytes, profile.messages) == (4 * parameters, 1)
    assert profile.link("gpus") is not None
    assert (profile.n, profile.loading_images_per_second, profile.device) == (4, None, "1 thread of a CPU")


def test_loading_is_timed_when_it_is_on_its_way(compose, tmp_path, monkeypatch):
    """Starting the loader's processes takes 10 s a batch here, and then every batch 0.5 s."""
    make_tree(tmp_path)
    config = compose(*TINY, "n=2", "dataset=imagefolder", f"dataset.root={tmp_path}", "loader.workers=1")
    clock = [0.0]
    images = len(list((tmp_path / "train").rglob("*.*")))

    class Slow:
        train_images = images

        def train(self, passes):
            for number, (_, indices) in enumerate(passes):
                clock[0] += 10.0 if number < PREFETCH else 0.5
                yield Batch(indices, indices)

    monkeypatch.setattr(measured, "open_data", lambda *_: Slow())
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])
    assert measured.loading_speed(config) == pytest.approx(2 / 0.5)
    assert measured.loading_speed(compose(*TINY, "dataset=imagefolder")) is None
