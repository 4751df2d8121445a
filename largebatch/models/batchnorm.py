"""BatchNorm as k separate workers would compute it, for many workers in one process.

Every worker normalises its own n samples; statistics are never taken across workers. A forward pass over g·n
samples is cut into g groups, and computed in one of three ways that differ in their last digits and in their time:

- separate: PyTorch's own BatchNorm once a group, as each worker would call it;
- joint: one expression over all groups, for a compiler to fuse;
- fused: one pass of our GPU kernels (:mod:`largebatch.models.batchnorm_kernels`) over all groups.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from largebatch.base.errors import UserError
from largebatch.base.numbers import PairwiseSum


class Peers(Protocol):
    """The processes that share the k workers."""

    @property
    def size(self) -> int:
        """Return the number of groups."""

    def broadcast(self, values: Tensor) -> None:
        """Give all of them the first one's values."""


class PerWorker:
    """Mixed into a BatchNorm class: in a training pass, every group of n samples has its own statistics.

    ``momenta`` has one entry a group: by how much that group moves the running statistics, None for not at all.
    ``kernel`` is the way in which they are computed, and ``clamps`` says whether a ReLU is part of the module.
    """

    momenta: tuple[float | None, ...] = (None,)
    kernel: str = "separate"
    clamps: bool = False
    training: bool
    track_running_stats: bool
    momentum: float
    eps: float
    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised batch: shape (g · n, C, …) in and out."""
        return self.then_relu(x) if self.clamps else self._normalised(x)

    def then_relu(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return max(normalised batch + residual, 0), in one pass over memory where the kernel can."""
        if self.training and self.kernel == "fused":
            return self._fused(x, residual, True)
        normalised = self._normalised(x)
        return F.relu(normalised if residual is None else normalised + residual)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.training and self.kernel != "separate":
            return self._fused(x, None, False) if self.kernel == "fused" else self._joint(x)
        return self._separate(x)

    def _separate(self, x: Tensor) -> Tensor:
        # A single group needs no chunk, whose gradient is a copy, and `_count` has said already how it counts.
        if not self.training or len(self.momenta) == 1:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        # Section 2.3: with BatchNorm the loss of a sample depends on the n samples of its worker, so n is part of what
        # is optimised. One call over all g·n samples would take its statistics over them, and train another function.
        outputs = []
        for group, momentum in zip(x.chunk(len(self.momenta)), self.momenta, strict=True):
            self.follow(momentum)
            outputs.append(super().forward(group))  # type: ignore[misc]
        return torch.cat(outputs)

    def _joint(self, x: Tensor) -> Tensor:
        # Shape (g, n, C, …): under autocast the statistics are taken in float32, as cuDNN does.
        groups = x.view(len(self.momenta), -1, *x.shape[1:]).to(self.weight.dtype)
        within = [1, *range(3, groups.dim())]
        variance, mean = torch.var_mean(groups, within, correction=0, keepdim=True)
        channels = (1, 1, -1, *[1] * (groups.dim() - 3))
        scale = self.weight.view(channels) * torch.rsqrt(variance + self.eps)
        normalised = (groups - mean) * scale + self.bias.view(channels)
        self._track(mean.detach().flatten(1), variance.detach().flatten(1), x.numel() // mean.numel())
        return normalised.to(x.dtype).flatten(0, 1)

    def _fused(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        from largebatch.models.batchnorm_kernels import normalise

        groups = len(self.momenta)
        if x.numel() // groups >= 2**31:  # the kernels count in 32 bits
            raise UserError(
                f"bn.kernel=fused takes fewer than 2^31 values a worker, and a batch of {len(x) // groups} has "
                f"{x.numel() // groups:,} of them in one layer: use bn.kernel=separate."
            )
        y, mean, variance = normalise(x, self.weight, self.bias, groups, self.eps, residual, relu)
        self._track(mean, variance, x.numel() // mean.numel())
        return y

    @torch.no_grad()
    def _track(self, means: Tensor, variances: Tensor, count: int) -> None:
        """Move the running statistics by each group's, (g, C) over ``count`` values, in the order of the groups."""
        if self.running_mean is None or self.running_var is None or not any(self.momenta):
            return
        # PyTorch normalises by the variance over count, and keeps the one over count − 1 for evaluation.
        unbiased = count / (count - 1)
        for mean, variance, momentum in zip(means, variances, self.momenta, strict=True):
            if momentum is not None:
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * unbiased, momentum)

    def follow(self, momentum: float | None) -> None:
        """Let the group to come move the running statistics by ``momentum``, or not at all."""
        # Without tracking, a BatchNorm in training leaves its buffers alone; in evaluation it uses them all the same.
        self.track_running_stats = momentum is not None
        self.momentum = 0.0 if momentum is None else momentum


_classes: dict[str, type[Any]] = {}


def _per_worker_class(cls: type[nn.Module]) -> type[Any]:
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name not in _classes:
        _classes[name] = type(f"PerWorker{cls.__name__}", (PerWorker, cls), {})
    return _classes[name]


def convert(norm: nn.Module) -> None:
    """Give a BatchNorm its per-worker form in place; parameters, buffers and names stay."""
    if not isinstance(norm, PerWorker):
        norm.__class__ = _per_worker_class(type(norm))
        cast(PerWorker, norm).follow(None)


def choose_kernel(asked: str, device: str, compiled: bool, exact: bool, pays: bool = True) -> str:
    """Return the way in which BatchNorm is computed: separate, joint or fused.

    Args:
        asked: One of these, or auto: on a GPU joint for a compiled network, and fused for any other where that
            ``pays``; separate where there is no GPU, no means of making kernels for it, or every bit is to be
            PyTorch's (``exact``).
        device: cpu, cuda or mps.
        compiled: Whether the network is.
        exact: Whether the run is to have the same bits on any number of processes.
        pays: Whether a launch serves several workers, or launches are recorded. Ours take the processor longer than
            PyTorch's, which shows where a pass is one worker's.

    Raises:
        UserError: kernels that cannot be had here.
    """
    if asked == "auto":
        if device != "cuda" or exact:
            return "separate"
        return "joint" if compiled else "fused" if pays and not _lacking() else "separate"
    if asked == "fused" and compiled:
        raise UserError(
            "bn.kernel=fused is not for compile=true, which makes such kernels itself: use bn.kernel=joint."
        )
    if asked == "fused" and (device != "cuda" or _lacking()):
        raise UserError(
            f"bn.kernel=fused needs a GPU, Triton and a C compiler; there is {_lacking() or f'device={device}'}. Use "
            "bn.kernel=auto."
        )
    return asked


def _lacking() -> str:
    """Return what Triton lacks to make kernels on this machine, "" where nothing."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        return "no C compiler"
    return "" if Path(sysconfig.get_path("include"), "Python.h").exists() else "no Python.h (python3-dev)"


def _count(norm: nn.Module, momenta: tuple[float | None, ...]) -> None:
    # Setting a module's attribute takes longer than some of a small network's layers: only where it changes.
    worker = cast(PerWorker, norm)
    if worker.momenta != momenta:
        worker.momenta = momenta
        worker.follow(momenta[0])


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return every BatchNorm of the model, by type: subclasses with an activation of their own included."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def refuse_unknown(model: nn.Module) -> None:
    """Raise :class:`UserError` for a module with statistics over the batch that has no per-worker form here."""
    for name, module in model.named_modules():
        across = isinstance(module, nn.SyncBatchNorm)
        if across or (hasattr(module, "running_var") and not isinstance(module, _BatchNorm | _InstanceNorm)):
            raise UserError(
                f"the module '{name}' ({type(module).__name__}) takes statistics over the batch in a way that has no "
                "per-worker form here: use a network with BatchNorm, or with norms over single samples."
            )


def _alone(values: Tensor) -> Tensor:
    """Sum over one process."""
    return values


@dataclass
class RunningStatistics:
    """The written policy of whose statistics the running averages follow, the same on any hardware.

    worker0: the statistics of logical worker 0, wherever it runs (what one worker of the paper sees).
    mean: the mean of the k workers' statistics.

    Attributes:
        model: Its BatchNorms are converted in place; parameter and buffer names stay.
        policy: ``worker0`` or ``mean``.
        momentum: In PyTorch's convention, 0.1 for the paper's 0.9.
        groups: Workers in one forward pass.
        first: Whether logical worker 0 is this process's first.
        kernel: separate, joint or fused; BatchNorms with an activation of their own stay separate.
        compiled: Whether the network is. Its graph holds which groups count, so all passes count the same groups, and
            what a pass should have left alone is put back.
    """

    model: nn.Module
    policy: str
    momentum: float
    groups: int
    first: bool
    kernel: str = "separate"
    compiled: bool = False
    steps: int = 0
    _norms: list[_BatchNorm] = field(init=False)
    _buffers: list[Tensor] = field(init=False)
    _before: list[Tensor] = field(init=False, default_factory=list)
    _sum: PairwiseSum[Tensor] = field(init=False, default_factory=PairwiseSum)
    _passes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        refuse_unknown(self.model)
        self._norms = batchnorms(self.model)
        for norm in self._norms:
            plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and norm.affine
            convert(norm)
            cast(PerWorker, norm).kernel = self.kernel if plain else "separate"
        tracked = [norm for norm in self._norms if norm.running_mean is not None]
        self._buffers = [norm.running_mean for norm in tracked if norm.running_mean is not None]
        self._buffers += [norm.running_var for norm in tracked if norm.running_var is not None]

    @contextmanager
    def ignored_pass(self) -> Iterator[None]:
        """Within ``with``, let a pass leave the running statistics as they are."""
        before = [buffer.clone() for buffer in self._buffers]
        self.before_pass(0)
        yield
        self._before.clear()
        if before:
            torch._foreach_copy_(self._buffers, before)

    def before_pass(self, number: int) -> None:
        """Say which groups of this step's pass ``number`` move the running statistics, and by how much."""
        momenta: tuple[float | None, ...]
        if self.policy == "worker0":
            # Once a step, as a worker of the paper sees it. Ordinary gradient accumulation moves the running
            # statistics in each of its k passes: a momentum of 0.9 a step becomes 0.9^k.
            counts = number == 0 and self.first
            momenta = (self.momentum if counts or self.compiled else None,) + (None,) * (self.groups - 1)
            if self.compiled and not counts and not self._before:
                self._before = [buffer.clone() for buffer in self._buffers]
        else:
            # From zero, weights 1, 1/2, 1/3 … leave the plain mean of the pass's groups in the buffers.
            momenta = tuple(1 / group for group in range(1, self.groups + 1))
            if number == 0:
                self._before = [buffer.clone() for buffer in self._buffers]
            if self._buffers:
                torch._foreach_zero_(self._buffers)
        for norm in self._norms:
            _count(norm, momenta)

    def after_pass(self, number: int) -> None:
        """Keep what the pass measured."""
        if self.policy == "mean" and self._buffers:
            self._sum.add(self._flat(self._buffers))
            self._passes = number + 1

    def after_step(self, exchange: Callable[[Tensor], Tensor] = _alone, processes: int = 1) -> None:
        """Move the running statistics by one step.

        Args:
            exchange: Sums over the processes.
            processes: How many.
        """
        self.steps += 1
        if self.policy == "worker0" and self._before:
            torch._foreach_copy_(self._buffers, self._before)
            self._before.clear()
        # μ ← (1 − m) μ + m · the mean of k workers' statistics, likewise once a step.
        if self.policy == "mean" and self._buffers:
            total = exchange(self._sum.total())
            self._fill(
                self._flat(self._before) * (1 - self.momentum) + total * (self.momentum / (self._passes * processes))
            )

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    def _fill(self, flat: Tensor) -> None:
        for buffer, part in zip(self._buffers, torch.split(flat, [b.numel() for b in self._buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def synchronise(self, peers: Peers) -> None:
        """Give every process the policy's statistics: before an evaluation, a checkpoint, the end.

        The mean is every process's already; those of worker 0 are where worker 0 is.
        """
        for norm in self._norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(self.steps)
        if self.policy == "worker0" and peers.size > 1 and self._buffers:
            flat = self._flat(self._buffers)
            peers.broadcast(flat)
            self._fill(flat)


@contextmanager
def one_worker_at_a_time(model: nn.Module) -> Iterator[None]:
    """Let every pass in training be one worker's, normalised over itself, and leave the running statistics alone.

    PyTorch's own BatchNorm computes it, which can be differentiated twice.

    Args:
        model: With BatchNorms that :class:`RunningStatistics` has converted.
    """
    norms = batchnorms(model)
    before = [(cast(PerWorker, norm).momenta, cast(PerWorker, norm).kernel) for norm in norms]
    for norm in norms:
        _count(norm, (None,))
        cast(PerWorker, norm).kernel = "separate"
    try:
        yield
    finally:
        for norm, (groups, kernel) in zip(norms, before, strict=True):
            _count(norm, groups)
            cast(PerWorker, norm).kernel = kernel


@contextmanager
def recomputed(model: nn.Module, forward: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> Iterator[None]:
    """Put fresh statistics in the place of the running ones, and the running ones back afterwards.

    With a large minibatch the running averages are updated less often and lag behind (section 5.2 of the paper);
    plain means over some worker batches, with the weights as they are, do not.

    Args:
        model: With BatchNorms that :class:`RunningStatistics` has converted.
        forward: What makes the model see a batch.
        batches: Training images of one worker each.
    """
    norms = [norm for norm in batchnorms(model) if norm.running_mean is not None]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    was_training, momenta = model.training, [cast(PerWorker, norm).momenta for norm in norms]
    model.train()
    with torch.no_grad():
        for number, images in enumerate(batches, start=1):
            for norm in norms:
                _count(norm, (1 / number,))
            forward(images)
    for norm, groups in zip(norms, momenta, strict=True):  # also for what is compiled: it would be made anew
        _count(norm, groups)
    model.train(was_training)
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, before in zip(norms, kept, strict=True):
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(before[name])
