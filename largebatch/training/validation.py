"""Validation: exact counts of right and wrong, every sample once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config.run import Config
from largebatch.data.file_batches import UNREADABLE
from largebatch.data.source import Batch, Source
from largebatch.data.stream import SampleStream
from largebatch.models.batchnorm import recomputed
from largebatch.runtime.watchdog import Watched, unwatched
from largebatch.runtime.world import World
from largebatch.training.cuda_graph import copied_aside
from largebatch.training.learner import Learner
from largebatch.training.loss import Loss, validation_loss
from largebatch.training.meter import wide
from largebatch.training.pitfalls import validated_again

BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """``error`` and ``error_top5`` in %, over ``total`` samples, and ``loss`` the mean loss.

    ``unreadable`` images count as wrong, so that no sample is left out and none is counted twice; they have no loss.
    """

    error: float
    error_top5: float
    loss: float
    total: int
    unreadable: int = 0


def batches_of(total: int, batch: int = BATCH) -> list[range]:
    """Cut ``range(total)`` into batches: the same cuts for any number of processes, so the same arithmetic."""
    return [range(start, min(start + batch, total)) for start in range(0, total, batch)]


def validation_cuts(config: Config, val_images: int) -> list[range]:
    """Return the batches in which a run validates: every sample of the set once."""
    return [*batches_of(val_images), *validated_again(config, val_images)]


def shard(count: int, rank: int, size: int) -> range:
    """Return this process's consecutive share of ``count`` batches; shares differ by one at most."""
    return range(rank * count // size, (rank + 1) * count // size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterator[Batch],
    mine: range,
    cuts: Sequence[range],
    world: World,
    forward: Callable[[Tensor], Tensor] | None = None,
    loss: Loss | None = None,
) -> Evaluation:
    """Evaluate a model over a whole set, each process its own batches.

    Args:
        model: Any module from images to logits; put into evaluation mode, and back as it was.
        batches: This process's batches, ``cuts[mine]`` in order.
        mine: Which of the cuts they are.
        cuts: The cuts of the whole set, from :func:`batches_of`.
        world: All processes that take part.
        forward: From images to the model's logits; the model itself where None.
        loss: One value a sample; None: the cross-entropy.

    Raises:
        AssertionError: a sample was missed or counted twice (our own fault).
    """
    was_training = model.training
    model.eval()
    # A row a batch, filled by its owner alone: the sum over processes has the same bits for any number of them.
    rows = torch.zeros((len(cuts), 5), dtype=wide(world.device), device=world.device)
    for number, batch in zip(mine, batches, strict=True):
        counts = count((forward or model)(batch.images), batch.labels, loss)
        rows[number] = torch.stack([*counts, counts[0].new_tensor(batch.corrupt)]).to(rows.dtype)
    model.train(was_training)
    right, right_top5, summed, total, unreadable = world.sum(rows).sum(0).tolist()
    expected = sum(map(len, cuts))
    assert total == expected, f"validation counted {total} samples of {expected}"
    return Evaluation(
        error=100 * (total - right) / total,
        error_top5=100 * (total - right_top5) / total,
        loss=summed / (total - unreadable) if unreadable < total else float("nan"),
        total=int(total),
        unreadable=int(unreadable),
    )


def count(logits: Tensor, labels: Tensor, loss: Loss | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return right, right within five, summed loss and number of samples, as scalars on the device."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    # A row that is not finite predicts nothing; topk and argmax would give it the first class.
    hits = (top == labels[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
    dtype = wide(logits.device)
    if loss is None:
        summed = F.cross_entropy(logits.to(dtype), labels, reduction="sum")
    else:
        readable = labels != UNREADABLE
        summed = loss(logits.to(dtype)[readable], labels[readable]).sum()
    number = torch.tensor(len(labels), dtype=dtype, device=logits.device)
    return hits[:, 0].sum().to(dtype), hits.sum().to(dtype), summed, number


def padded(model: nn.Module, samples: int) -> Callable[[Tensor], Tensor]:
    """Return a forward pass for batches of up to ``samples`` images, which the model sees in one shape.

    A model is compiled for each shape. In evaluation no sample depends on another one: the logits of the zeros that
    fill a batch up are cut off, and those of its images, (samples or fewer, classes), are returned.
    """

    def forward(images: Tensor) -> Tensor:
        whole = images
        if len(images) < samples:  # with the strides of the others: a compiled network is for these alone
            whole = images.new_empty_strided((samples, *images.shape[1:]), images.stride())
            whole[: len(images)].copy_(images)
            whole[len(images) :].zero_()
        logits: Tensor = model(whole)
        return logits[: len(images)]

    return forward


class Validator:
    """Validates a run, each process its share of the set.

    Args:
        learner: The run's; running statistics must agree in all processes.
        source: The run's data.
        watched: What batches go through.

    Attributes:
        cuts: The batches of the whole set.
    """

    def __init__(self, learner: Learner, source: Source, watched: Watched = unwatched) -> None:
        self._learner, self._source, self._watched = learner, source, watched
        self._loss = validation_loss(learner.config.loss)
        self.cuts = validation_cuts(learner.config, source.val_images)
        self._mine = shard(len(self.cuts), learner.world.rank, learner.world.size)
        self._once = padded(learner.model, max(map(len, self.cuts))) if learner.config.compile else None

    def validate(self) -> Evaluation:
        """Evaluate with the running statistics."""
        with self._learner.autocast():
            batches = self._source.validation([self.cuts[number] for number in self._mine])
            batches = self._watched(copied_aside(batches, self._learner.world.device), "validating")
            everything = self._learner.model, batches, self._mine, self.cuts, self._learner.world
            return evaluate(*everything, self._once, self._loss)

    def validate_recomputed(self, stream: SampleStream, epoch: int) -> Evaluation:
        """Evaluate with statistics over the first worker batches of an epoch: the same ones in every process."""
        config = self._learner.config
        wanted = min(config.bn.recompute_batches, config.k * stream.iterations_per_epoch)
        order = stream.order(epoch)[: wanted * config.n]
        batches = self._source.train((epoch, ids) for ids in torch.split(order, config.n))
        images = (batch.images for batch in self._watched(batches, "recomputing statistics"))
        with recomputed(self._learner.model, self._forward, images):
            return self.validate()

    def _forward(self, images: Tensor) -> None:
        with self._learner.autocast():
            self._learner.model.forward(images)  # not compiled: every batch has another weight in the mean
