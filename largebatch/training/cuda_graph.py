"""Keep a GPU from waiting for its processor: record a step once, and copy batches on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from largebatch.data.source import Batch
from largebatch.training.learner import Learner
from largebatch.training.meter import count_replaced

# Ordinary steps before the recorded one: they choose algorithms, compile kernels and make the momentum.
WARM_UP = 3

Work = Callable[[], Tensor]


class CudaRecorder:
    """Records a CUDA graph: all of the work's kernels become one launch."""

    def __init__(self) -> None:
        # One for all: libraries make a handle a stream at its first use, which a capture would not survive.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def aside(self, work: Work) -> Tensor:
        """Do the work on the stream that will be captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            done = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return done

    def record(self, work: Work) -> Work:
        """Capture the work; its tensors live in memory of the graph's own."""
        graph = torch.cuda.CUDAGraph()
        # Loader and checkpoint threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            done = work()

        def replay() -> Tensor:
            graph.replay()
            return done

        return replay


@dataclass
class GraphedStep:
    """A training step that is recorded after a few ordinary ones, and repeated from then on.

    Its batches are copied to memory that stays, and its rate lies in a tensor on the device, which
    :func:`~largebatch.training.optimizer.set_rate` fills. What a step does must not depend on anything else that
    changes: one process, no dropout.

    Attributes:
        learner: Changed by every step, in place.
        step: A step of that learner.
        recorder: How it is recorded.
    """

    learner: Learner
    step: Callable[[Iterator[Batch], int], Tensor]
    recorder: CudaRecorder = field(default_factory=CudaRecorder)
    _inputs: list[Batch] = field(init=False, default_factory=list)
    _made: int = field(init=False, default=0)
    _repeat: Work | None = field(init=False, default=None)

    @property
    def recorded(self) -> bool:
        """Whether the step is recorded, and the next one repeats it."""
        return self._repeat is not None

    def __call__(self, batches: Iterator[Batch], iteration: int) -> Tensor:
        """Make one step, as ``train_step`` does; the rows are valid until the next one."""
        running = self.learner.running
        taken = [next(batches) for _ in range(self.learner.passes)]
        self._keep(taken)
        steps = running.steps + 1
        rows = self._make(lambda: self.step(iter(self._inputs), iteration))
        running.steps = steps  # whatever the recording counted
        count_replaced(rows, [batch.corrupt for batch in taken])
        return rows

    def _keep(self, taken: list[Batch]) -> None:
        if not self._inputs:
            self._inputs = [Batch(torch.empty_like(one.images), torch.empty_like(one.labels)) for one in taken]
        for mine, one in zip(self._inputs, taken, strict=True):
            mine.images.copy_(one.images)
            mine.labels.copy_(one.labels)

    def _make(self, work: Work) -> Tensor:
        if self._repeat is None:
            if self._made < WARM_UP:
                self._made += 1
                return self.recorder.aside(work)
            self.learner.optimizer.zero_grad(set_to_none=True)  # gradients are to lie in the recording's memory
            self._repeat = self.recorder.record(work)
        return self._repeat()


def copied_aside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Let batches come to a GPU on a stream of their own, so that copies pass during the computation before them.

    Args:
        batches: Whose tensors are made when they are asked for.
        device: On any but a GPU nothing is done.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(computing)
        yield batch
