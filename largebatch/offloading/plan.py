"""Predict the cost of each offloading mode, before anything is evaluated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.offloading.context import Rehearsal, rehearse
from largebatch.offloading.flat import pages
from largebatch.offloading.groups import cut, whole
from largebatch.offloading.transport import Slot, Transport, make_transport

BUS_BYTES = 64 * 2**20  # of a copy that measures the bandwidth


@dataclass(frozen=True)
class Bus:
    """The way to a device: a copy of b bytes takes ``seconds_per_copy + b / bytes_per_second``."""

    bytes_per_second: float
    seconds_per_copy: float

    def seconds(self, sizes: Sequence[int]) -> float:
        """Return what copies of these many bytes take, one after the other."""
        return sum(self.seconds_per_copy + size / self.bytes_per_second for size in sizes)


@dataclass(frozen=True)
class Plan:
    """Predicted memory and traffic of a mode for some models and a number of batches.

    Attributes:
        mode: none, submodule or model.
        peak_bytes: Of weights on the device at most; activations come on top.
        moved_bytes: To the device, in all; nothing moves back.
        copy_seconds: What that takes on the bus.
        seconds: What it all takes, where computing is known, else what copies alone do: what the mode is aimed at,
            each copy beside computation but the first.
        fits: Whether the peak is within the budget.
    """

    mode: str
    peak_bytes: int
    moved_bytes: int
    copy_seconds: float
    seconds: float
    fits: bool


def plan_resident(sizes: Sequence[int], bus: Bus, compute: float, budget: int | None) -> Plan:
    """Plan ``none``: models of ``sizes`` bytes come once and stay.

    Args:
        sizes: Bytes of each model.
        bus: The way to the device.
        compute: Seconds that all computing takes with the weights at hand; 0 where that is not known.
        budget: Bytes; None for any number.
    """
    copy = bus.seconds([sum(sizes)])
    return _plan("none", sum(sizes), sum(sizes), copy, copy + compute, budget)


def plan_submodules(
    sizes: Sequence[int], kept: int, slots: int, loads: int, bus: Bus, compute: float, budget: int | None
) -> Plan:
    """Plan ``submodule``: groups of ``sizes`` bytes come ``loads`` times, beside computation; ``kept`` bytes once.

    See :func:`plan_resident` for the rest. With one slot, nothing happens beside a copy.
    """
    peak = kept + slots * max(sizes, default=0)
    once, copy = bus.seconds([kept] if kept else []), loads * bus.seconds(sizes)
    first = bus.seconds(sizes[:1])
    seconds = once + (first + max(copy - first, compute) if slots > 1 else copy + compute)
    return _plan("submodule", peak, kept + loads * sum(sizes), once + copy, seconds, budget)


def plan_models(sizes: Sequence[int], bus: Bus, compute: float, budget: int | None, prefetch: bool = True) -> Plan:
    """Plan ``model``: models of ``sizes`` bytes come one after the other, each for all of its batches.

    See :func:`plan_resident` for the rest. The next one comes while one computes, where ``prefetch`` is wanted and the
    budget has room for both; a larger budget keeps more of them there. Computing is shared out by bytes.
    """
    total = sum(sizes)
    room = sum(sorted(sizes)[-2 if prefetch else -1 :]) if budget is None else budget
    beside = prefetch and all(first + second <= room for first, second in pairwise(sizes))
    peak = max(_held(sizes[: last + 1], room) for last in range(len(sizes)))
    copies = [bus.seconds([size]) for size in sizes]
    computing = [compute * size / total for size in sizes]
    if beside:
        pairs = zip(computing, [*copies[1:], 0.0], strict=True)
        seconds = copies[0] + sum(max(pair) for pair in pairs)
    else:
        seconds = sum(copies) + compute
    return _plan("model", peak, total, sum(copies), seconds, budget)


def _held(sizes: Sequence[int], room: int) -> int:
    """Return the bytes of the last model and of those before it for which there is room as well."""
    return max(sizes[-1], *(held for held in accumulate(reversed(sizes)) if held <= room), 0)


def _plan(mode: str, peak: int, moved: int, copy: float, seconds: float, budget: int | None) -> Plan:
    return Plan(mode, peak, moved, copy, seconds, budget is None or peak <= budget)


def choose(plans: Sequence[Plan]) -> Plan | None:
    """Return the plan to follow within the budget; None where none fits.

    Of those that take no more than 5 % longer than the fastest, which is finer than a plan can be, it is the one that
    moves least, and then the plainest: none before model before submodule.
    """
    fitting = [plan for plan in plans if plan.fits]
    limit = 1.05 * min((plan.seconds for plan in fitting), default=0.0)
    plainest = ("none", "model", "submodule")
    as_fast = [plan for plan in fitting if plan.seconds <= limit]
    return min(as_fast, key=lambda plan: (plan.moved_bytes, plainest.index(plan.mode)), default=None)


def make_plans(
    models: Mapping[str, nn.Module],
    loads: int,
    bus: Bus,
    compute: float = 0.0,
    budget: int | None = None,
    groups: str = "bytes",
    prefetch: bool = True,
    examples: Mapping[str, Tensor] | None = None,
) -> list[Plan]:
    """Plan each mode for models on the CPU, as :func:`largebatch.offloading.offload` would cut them.

    Args:
        models: By name; several are an ensemble, used one after the other, each for all batches.
        loads: Times that a model's weights are needed: batches, or with ``batches_per_load`` fewer.
        bus: The way to the device, from :func:`measure_bus`.
        compute: Seconds that all computing takes with the weights at hand; 0 where that is not known.
        budget: Bytes of weights on the device; None for the least of each mode.
        groups: As for ``offload``.
        prefetch: As for ``offload``.
        examples: An input for each model, which is sent through it: its modules may read each other's weights, and
            then a first pass cuts it otherwise. Left out, they are taken to read their own.
    """
    sizes = [part.size for part in whole(models)]
    try:
        seen = _cut(models, groups, budget, prefetch, examples)
    except UserError:  # below the least: the plan gives that
        seen = _cut(models, groups, None, prefetch, examples)
    grouping, passes = seen.grouping, seen.passes if len(models) == 1 else 0
    parts = [part.size for part in grouping.parts]
    learned = plan_submodules(parts, grouping.kept.size, grouping.slots, max(loads - passes, 0), bus, compute, budget)
    learning = bus.seconds([seen.moved]) if seen.moved else 0.0
    return [
        plan_resident(sizes, bus, compute, budget),
        replace(
            learned,
            peak_bytes=seen.peak,
            fits=budget is None or seen.peak <= budget,
            moved_bytes=learned.moved_bytes + seen.moved,
            copy_seconds=learned.copy_seconds + learning,
            seconds=learned.seconds + learning,
        ),
        plan_models(sizes, bus, compute, budget, prefetch),
    ]


def _cut(
    models: Mapping[str, nn.Module],
    groups: str,
    budget: int | None,
    prefetch: bool,
    examples: Mapping[str, Tensor] | None,
) -> Rehearsal:
    if examples is None:
        grouping = cut(models, groups, budget, 2 if prefetch else 1)
        return Rehearsal(grouping, 0, 0, grouping.peak)
    return rehearse(models, examples, budget, groups, prefetch)


def measure_bus(device: torch.device | str, seconds: float = 2.0, transport: Transport | None = None) -> Bus:
    """Measure the way to a device with large copies and with small ones, in about ``seconds``.

    Raises:
        UserError: a device that is not here.
    """
    transport = transport or make_transport(torch.device(device))
    slot = transport.allocate(BUS_BYTES)
    host = pages(BUS_BYTES)
    host.zero_()
    transport.pin(host)
    small = _seconds_per_copy(transport, slot, host[:4096], seconds / 2)
    large = _seconds_per_copy(transport, slot, host, seconds / 2)
    transport.release(slot)
    transport.unpin(host)
    return Bus(BUS_BYTES / max(large - small, 1e-9), small)


def _seconds_per_copy(transport: Transport, slot: Slot, source: Tensor, seconds: float) -> float:
    """Return the time of a copy, the shortest of several rounds: what disturbs a copy only makes it longer."""
    best, copies, ends = float("inf"), 1, time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        started = time.perf_counter()
        for _ in range(copies):
            transport.copy(slot, source)
        transport.close()
        took = time.perf_counter() - started
        best = min(best, took / copies)
        copies = 2 * copies if took < seconds / 20 else copies
    return best
