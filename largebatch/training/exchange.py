"""The exchange, which makes one gradient of those of k workers: averaged by DDP, or added in one fixed tree.

The paper's gradient is a sum over all kn samples divided by kn, once (remark 3). Losses are scaled before the backward
pass, so that here gradients are only added; ``factor`` undoes what an exchange divides by.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.base.numbers import PairwiseSum
from largebatch.config.groups import ExchangeConfig
from largebatch.runtime.world import World


class Averaging:
    """PyTorch's DDP where there are several processes: overlapped with the last pass's back-propagation.

    Attributes:
        net: What forward passes go through.
        factor: What each loss is multiplied by, as DDP divides by the number of processes.
        statistics: Sums running statistics over the processes.
    """

    def __init__(self, model: nn.Module, world: World, config: ExchangeConfig) -> None:
        self.net = model if world.size == 1 else _data_parallel(model, config)
        # DDP averages over P processes, and each of them holds the sum of k/P workers: without this factor the step
        # would shrink as processes are added.
        self.factor, self.statistics = world.size, world.sum

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Keep gradients local until the last pass."""
        if last or not isinstance(self.net, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.net.no_sync()  # one exchange a step, not one a pass

    def finish(self) -> None:
        """Do nothing: DDP's backward has waited already."""


def _data_parallel(model: nn.Module, config: ExchangeConfig) -> DistributedDataParallel:
    # The running statistics follow bn.running, not rank 0's latest pass: DDP must leave the buffers alone. The
    # option has a new name in later versions of torch, where the old one warns.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    net = DistributedDataParallel(
        model,
        bucket_cap_mb=config.bucket_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        **options,
    )
    if config.compress == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        net.register_comm_hook(None, bf16_compress_hook)
    return net


@dataclass
class _Bucket:
    """Parameters whose gradients travel together. ``waiting`` of them have none yet in this pass."""

    parameters: list[nn.Parameter]
    sum: PairwiseSum[Tensor] = field(default_factory=PairwiseSum)
    waiting: int = 0

    def take(self) -> None:
        """Add this pass's gradients to the sum, and clear them."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.sum.add(torch.cat([part.flatten() for part in parts]))
        for parameter in self.parameters:
            parameter.grad = None

    def give(self, total: Tensor) -> None:
        """Put a sum back as gradients."""
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(total, sizes), strict=True):
            parameter.grad = part.view_as(parameter)


class Tree:
    """The same bits for any power of two of processes.

    Worker by worker, a process adds its gradients pairwise; the processes combine by recursive doubling, bucket
    by bucket while the last back-propagation goes on. Together that is one binary tree over the k workers.

    Attributes:
        net: What forward passes go through.
        factor: 1: losses are not scaled.
        statistics: Sums running statistics over the processes.
    """

    def __init__(self, model: nn.Module, world: World, bucket_bytes: int) -> None:
        # Float addition is not associative: one tree over the workers gives the same bits for any P.
        self.net, self.factor, self._world = model, 1, world
        self.statistics = world.tree_sum
        self._buckets = _cut(model, bucket_bytes)
        self._last, self._next = False, 0
        self._totals: list[Future[Tensor]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="exchange")
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            bucket.waiting -= 1
            # In one order in all processes, whatever order gradients arrive in.
            while self._last and self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
                self._start_next()

        return arrived

    @contextlib.contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Take the pass's gradients; during the last one, send each bucket as soon as it is complete."""
        self._last, self._next = last, 0
        for bucket in self._buckets:
            bucket.waiting = len(bucket.parameters)
        yield
        if last:
            while self._next < len(self._buckets):  # parameters that this network does not use
                self._start_next()
        else:
            for bucket in self._buckets:
                bucket.take()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.take()
        ready = torch.cuda.current_stream().record_event() if self._stream else None
        self._totals.append(self._thread.submit(self._combine, bucket.sum.total(), ready))

    def _combine(self, total: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        if self._stream is None or ready is None:
            return self._world.tree_sum(total)
        with torch.cuda.device(self._world.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            total.record_stream(self._stream)
            return self._world.tree_sum(total)

    def finish(self) -> None:
        """Wait for all buckets, and put the sums back as gradients."""
        for bucket, total in zip(self._buckets, self._totals, strict=True):
            bucket.give(total.result())
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._totals.clear()


def _cut(model: nn.Module, bucket_bytes: int) -> list[_Bucket]:
    """Cut the parameters into buckets, last layer first, as back-propagation reaches them."""
    buckets: list[_Bucket] = []
    room = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        size = parameter.numel() * parameter.element_size()
        if not buckets or size > room or parameter.dtype != buckets[-1].parameters[0].dtype:
            buckets.append(_Bucket([]))
            room = bucket_bytes
        buckets[-1].parameters.append(parameter)
        room -= size
    return buckets


Exchange = Averaging | Tree
