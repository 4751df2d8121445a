import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from largebatch.data.stream import SampleStream, hash_one, hashes, key, mix, permutation, uniform_one

words = st.integers(0, 2**64 - 1)
small = st.integers(1, 40)


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood's generator in numpy's modular arithmetic: an independent reference."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_mix_is_splitmix64():
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    assert mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4  # and the second


@given(words)
def test_mix_equals_the_reference(state):
    assert mix(state) == splitmix64(state)


@given(words, st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 50))
def test_loader_processes_and_tensors_draw_the_same(root, indices, draw):
    expected = [splitmix64(((index ^ root) + (draw + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 1 for index in indices]
    assert hashes(root, torch.tensor(indices), draw).tolist() == expected
    assert [hash_one(root, index, draw) for index in indices] == expected


def test_keys_depend_on_every_part_and_its_place():
    parts = [(0, 1, 2), (2, 1, 0), (0, 1), (0, 1, 2, 0), (1, 1, 2)]
    assert len({key(*p) for p in parts}) == len(parts)


def test_uniform_numbers_are_uniform():
    drawn = np.array([uniform_one(key(0, 1, 0), index) for index in range(20000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # χ² of 19 degrees of freedom: 60 is beyond 1 in 100,000


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 200))
def test_every_epochs_order_is_a_permutation(size, seed, epoch):
    assert permutation(size, seed, epoch).sort().values.equal(torch.arange(size))


def test_seed_and_epoch_give_other_orders():
    orders = {tuple(permutation(100, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_permutation_has_no_memory_of_position():
    # Where sample 0 … 9 of 10 lands over 5000 epochs: each place 500 times, ± 5 standard deviations.
    table = torch.stack([permutation(10, 7, epoch) for epoch in range(5000)])
    counts = torch.stack([(table == sample).sum(0) for sample in range(10)])
    assert (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5


@given(small, small, st.integers(0, 300), st.integers(0, 3))
def test_an_epoch_sees_every_sample_once_and_drops_the_tail(k, n, extra, epoch):
    size = k * n + extra
    stream = SampleStream(size, k, n, seed=5)
    start, stop = epoch * stream.iterations_per_epoch, (epoch + 1) * stream.iterations_per_epoch
    seen = torch.cat([ids for _, ids in stream.passes(start, stop, 0, k, 1)])
    assert seen.equal(permutation(size, 5, epoch)[: k * n * (size // (k * n))])


@given(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6]), st.integers(0, 30))
def test_placement_does_not_change_a_workers_samples(processes, per_pass, iteration):
    k, n = 6, 4
    order = permutation(100, 3, iteration // 4)
    for worker in range(k):  # worker j of iteration t: the j-th slice of n of the t-th slice of kn
        start = (iteration % 4) * k * n + worker * n
        assert SampleStream(100, k, n, 3).samples(iteration, worker, 1).equal(order[start : start + n])
    workers = k // processes
    if workers % per_pass:
        return
    spread = [
        SampleStream(100, k, n, 3).passes(iteration, iteration + 1, rank * workers, workers, per_pass)
        for rank in range(processes)
    ]
    ids = torch.cat([ids for passes in spread for _, ids in passes])
    assert ids.equal(SampleStream(100, k, n, 3).samples(iteration, 0, k))


def test_passes_name_the_epoch_that_decides_their_crops():
    stream = SampleStream(10, 2, 2, seed=0)  # 2 iterations an epoch
    assert [epoch for epoch, _ in stream.passes(1, 5, 0, 2, 2)] == [0, 1, 1, 2]


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_stream_can_start_anywhere(start):
    whole = list(SampleStream(20, 2, 3, seed=0).passes(0, 6, 0, 2, 1))
    rest = list(SampleStream(20, 2, 3, seed=0).passes(start, 6, 0, 2, 1))
    assert [ids.tolist() for _, ids in rest] == [ids.tolist() for _, ids in whole[2 * start :]]
