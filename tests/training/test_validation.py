import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from largebatch.data.source import Batch
from largebatch.runtime.world import World
from largebatch.training.validation import batches_of, count, evaluate, padded, shard

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@given(st.integers(1, 5000), st.integers(1, 9))
def test_every_sample_has_one_batch_and_every_batch_one_process(total, processes):
    cuts = batches_of(total)
    shared = [list(shard(len(cuts), rank, processes)) for rank in range(processes)]
    assert [number for share in shared for number in share] == list(range(len(cuts)))
    assert max(map(len, shared)) - min(map(len, shared)) <= 1
    assert [index for cut in cuts for index in cut] == list(range(total))


def test_counts_by_hand():
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    labels = torch.tensor([0, 1, 4, 6])  # first, second, fifth, seventh
    right, right_top5, loss, number = (value.item() for value in count(logits, labels))
    normaliser = math.log(sum(math.exp(z) for z in range(1, 8)))
    assert (right, right_top5, number) == (1, 3, 4)
    assert loss == pytest.approx(4 * normaliser - (7 + 6 + 3 + 1))


def test_with_fewer_than_five_classes_all_are_within_five():
    _, right_top5, _, _ = count(torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert right_top5 == 6


class Indices(nn.Module):
    """Predicts class ``index % 10`` for the image of that index; refuses training mode."""

    def forward(self, images):
        assert not self.training
        return nn.functional.one_hot(images.long() % 10, 10).float()


def batches(cuts, labels):
    return (Batch(torch.arange(cut.start, cut.stop), labels[cut.start : cut.stop]) for cut in cuts)


def test_errors_are_exact_over_a_whole_set_and_a_short_last_batch():
    labels = torch.arange(1003) % 10
    labels[torch.tensor([0, 500, 1002])] += 1
    model, cuts = Indices().train(), batches_of(1003)
    measured = evaluate(model, batches(cuts, labels), range(len(cuts)), cuts, ALONE)
    assert measured.total == 1003
    assert measured.error == 100 * 3 / 1003
    loss = math.log(math.e + 9)
    assert measured.loss == pytest.approx((1000 * (loss - 1) + 3 * loss) / 1003)
    assert model.training  # back as it was


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_padded_pass_shows_one_shape_and_returns_the_logits_of_the_images_alone(layout):
    seen, images = set(), torch.rand(10, 1, 3, 3).contiguous(memory_format=layout)

    def model(batch):
        seen.add((batch.shape, batch.stride()))
        return batch.sum((2, 3)) / len(batch)

    forward = padded(model, 4)
    found = torch.cat([forward(part) for part in images.split(4)])
    assert found.equal(images.sum((2, 3)) / 4)
    assert seen == {((4, 1, 3, 3), images.stride())}


def test_a_batch_that_lacks_a_sample_is_noticed():
    cuts = batches_of(300)
    short = [cuts[0], range(256, 299)]
    with pytest.raises(AssertionError, match=r"counted 299.* samples of 300"):
        evaluate(Indices(), batches(short, torch.zeros(300, dtype=torch.long)), range(2), cuts, ALONE)
