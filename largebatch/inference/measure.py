"""One evaluation: the validation set through every network, one network after another, and what that took."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from largebatch.base.errors import UserError
from largebatch.data.loading import is_lost_loader, lost_loader
from largebatch.data.source import Batch
from largebatch.inference.session import Session
from largebatch.offloading import Statistics, each, offload
from largebatch.runtime.world import World
from largebatch.training.learner import autocast
from largebatch.training.loop import is_out_of_memory
from largebatch.training.loss import Loss, validation_loss
from largebatch.training.validation import Evaluation, evaluate

ON_HOST = World(rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Measured:
    """Results, time and memory of one evaluation.

    Attributes:
        members: Each network's own figures, by its name.
        ensemble: Those of their mean; None for a network alone.
        traffic: Weights that were moved, one of each offloading that took place.
        seconds: From the first batch to the last figure; under offload=none the weights are there before.
        images: Images that were computed, those of every network counted.
        peak_device_bytes: The most memory that was allocated on the device at a time, activations included; None on
            the CPU, where nobody counts.
    """

    members: dict[str, Evaluation]
    ensemble: Evaluation | None
    traffic: list[Statistics]
    seconds: float
    images: int
    peak_device_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """Images of every network in a second."""
        return self.images / self.seconds


def measure(session: Session, mode: str, cuts: int | None = None) -> Measured:
    """Evaluate all networks of a session.

    Network by network, so that under offload=model each is brought to the device once.

    Args:
        session: What, where, on which images.
        mode: How the weights share the device: one of :data:`largebatch.inference.config.MODES`.
        cuts: Take the first so many batches alone, to warm up; None: all.

    Raises:
        UserError: the budget is too small, or the device's memory is.
        Fault: a loader process is gone.
    """
    try:
        return _measure(session, mode, session.cuts[:cuts])
    except UserError as error:
        raise UserError(str(error).replace("mode=", "offload=")) from None  # as the key is called here
    except Exception as error:
        if is_lost_loader(error):
            raise lost_loader(error) from error
        if not is_out_of_memory(error):
            raise
        wanted = "a smaller batch"
        if mode == "none" and session.asked.compare:
            wanted = "no compare=true, which keeps all weights there"
        elif mode != "submodule":
            wanted = f"offload={'model or ' * (mode == 'none')}submodule, or {wanted}"
        raise UserError(f"{session.placement.device} ran out of memory with offload={mode}: use {wanted}.") from error


def _measure(session: Session, mode: str, cuts: Sequence[range]) -> Measured:
    device, cuda = session.world.device, session.placement.device == "cuda"
    images, loss = sum(map(len, cuts)), validation_loss(session.subjects[0].config.loss)
    mean = _Mean(session.asked.combine, images, session.source.classes) if len(session.models) > 1 else None
    members, traffic, seconds = {}, list[Statistics](), 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    # Under submodule each network has the whole budget for itself, in its turn.
    turns = [{name: model} for name, model in session.models.items()] if mode == "submodule" else [session.models]
    with _bar(session, mode, len(cuts)) as bar, autocast(session.placement):
        for models in turns:
            with _on_device(session, models, mode, traffic):
                started = time.perf_counter()
                for name, model in models.items():
                    answers = _answers(model, session.source.validation(cuts), session.asked.batches_per_load, bar)
                    heard = answers if mean is None else mean.heard(answers)
                    # The answers are there already: what is left is to count them, as training does.
                    members[name] = evaluate(nn.Identity(), heard, range(len(cuts)), cuts, session.world, loss=loss)
                seconds += time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
    combined = mean.evaluate(cuts, loss) if mean else None
    return Measured(members, combined, traffic, seconds, images * len(members), peak)


@contextlib.contextmanager
def _on_device(
    session: Session, models: Mapping[str, nn.Module], mode: str, traffic: list[Statistics]
) -> Iterator[None]:
    """Have the weights on the device, all of them or those that are needed; what moves is added to ``traffic``."""
    asked, device = session.asked, session.world.device
    if mode != "none":
        with offload(
            models, device, mode=mode, budget=asked.budget_bytes, groups=asked.groups, prefetch=asked.prefetch
        ) as statistics:
            traffic.append(statistics)
            yield
        return
    try:  # as in training: not laid out in a buffer
        for model in models.values():
            model.to(device)
        yield
    finally:
        for model in models.values():
            model.to("cpu")


def _answers(model: nn.Module, batches: Iterator[Batch], at_once: int, bar: tqdm[NoReturn]) -> Iterator[Batch]:
    """Yield every batch with logits in place of its images."""
    on_the_way: deque[Batch] = deque()

    def images() -> Iterator[Tensor]:
        for batch in batches:
            on_the_way.append(batch)
            yield batch.images

    for logits in each(model, images(), at_once):
        yield replace(on_the_way.popleft(), images=logits)
        bar.update()


def _bar(session: Session, mode: str, cuts: int) -> tqdm[NoReturn]:
    total = cuts * len(session.models)
    # disable=None: only on a terminal.
    return tqdm(total=total, desc=f"offload={mode}", unit="batch", disable=None, leave=False, dynamic_ncols=True)


class _Mean:
    """The running sum of what the members of an ensemble say of every image, in float64 and in host memory."""

    def __init__(self, combine: str, images: int, classes: int) -> None:
        self.combine, self.members = combine, 0
        self.sum = torch.zeros((images, classes), dtype=torch.float64)
        self.batches: list[Batch] = []  # without what is in them

    def heard(self, answers: Iterator[Batch]) -> Iterator[Batch]:
        """Pass a member's logits on, and add them up."""
        self.members += 1
        place = 0
        for answer in answers:
            values = answer.images.cpu().double()
            rows = self.sum[place : place + len(values)]
            rows += values.softmax(1) if self.combine == "probabilities" else values
            place += len(values)
            if self.members == 1:
                self.batches.append(replace(answer, images=rows, labels=answer.labels.cpu()))
            yield answer

    def evaluate(self, cuts: Sequence[range], loss: Loss | None) -> Evaluation:
        """Evaluate the mean by the same counts as its members."""
        means = (batch.images / self.members for batch in self.batches)
        logits = (mean.log() if self.combine == "probabilities" else mean for mean in means)
        batches = (replace(batch, images=one) for batch, one in zip(self.batches, logits, strict=True))
        return evaluate(nn.Identity(), batches, range(len(cuts)), cuts, ON_HOST, loss=loss)
