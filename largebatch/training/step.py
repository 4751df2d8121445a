"""One large step: the paper's equation, whatever processes and passes its k workers are spread over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from torch import Tensor

from largebatch.data.source import Batch
from largebatch.training.cuda_graph import GraphedStep
from largebatch.training.learner import Learner
from largebatch.training.meter import worker_figures


def train_step(learner: Learner, batches: Iterator[Batch], iteration: int) -> Tensor:
    """Make one step of kn samples: ŵ_{t+1} = w_t − η̂ (1/kn) Σ_{j<k} Σ_{x∈B_j} ∇l(x, w_t)  (equation 4).

    Args:
        learner: Changed in place; its optimizer has the rate η̂ of this iteration already.
        batches: The next k/P / workers_per_pass of them are taken, workers_per_pass · n samples each.
        iteration: t, from 0.

    Returns:
        A row a worker of this process, (k/P, FIGURES) on the device.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    passes = []
    for number in range(learner.passes):  # Σ over j < k: all of them see the same weights w_t
        batch = next(batches)  # B_j, for each worker of the pass
        with learner.worker_pass(iteration, number):
            logits = learner.logits(batch.images)
            losses = learner.loss(logits, batch.labels)  # l(x, w_t)
            # Scaled by 1/kn before the backward pass: the mean over n that PyTorch takes by default, summed by k
            # workers, would be k times the paper's gradient (remark 3).
            (losses.sum() * learner.loss_factor).backward()  # type: ignore[no-untyped-call]
        passes.append((losses.detach(), logits.detach().argmax(1) == batch.labels, batch.corrupt))
    learner.exchange.finish()  # now every process has the gradient of all k workers
    learner.optimizer.step()
    learner.running.after_step(learner.exchange.statistics, learner.world.size)
    return worker_figures(passes, learner.config.n)


def make_step(learner: Learner) -> Callable[[Iterator[Batch], int], Tensor]:
    """Return :func:`train_step` for this learner, recorded and repeated where cuda_graphs=true."""
    step = functools.partial(train_step, learner)
    return GraphedStep(learner, step) if learner.config.cuda_graphs else step
