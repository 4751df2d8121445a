"""The public way in: a context in which a model's weights visit the device only when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError, at_least, one_of
from largebatch.base.numbers import byte_count
from largebatch.offloading.groups import GROUPS, Grouping, Part, bears, cut, whole
from largebatch.offloading.guard import check_uncompiled
from largebatch.offloading.passes import Passes, check_mode
from largebatch.offloading.resident import Resident
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.submodule import Cut, Submodules
from largebatch.offloading.transport import Transport, make_transport
from largebatch.offloading.whole_models import Models

MODES = ("none", "submodule", "model")
_offloaded: WeakKeyDictionary[nn.Module, Passes] = WeakKeyDictionary()


@contextmanager
def offload(
    model: nn.Module | Mapping[str, nn.Module],
    device: torch.device | str,
    *,
    mode: str = "submodule",
    budget: int | str | None = None,
    groups: str = "bytes",
    prefetch: bool = True,
    transport: Transport | None = None,
) -> Iterator[Statistics]:
    """Evaluate a model on a device that need not hold all of its weights.

    Inside the context the model is called as usual, in evaluation mode; gradients are off. Its weights live in host
    memory (pinned for CUDA) and are copied to the device; a buffer or weight that a pass writes is copied back. Inputs
    on another device are taken there, and outputs returned to where they came from. When the context ends, also by an
    exception, the model is as it was, on the CPU: with what was written, and in the same memory where somebody else
    sees it.

    Threads that call a model wait for each other, but for ``none``. In ``submodule`` a pass stays in one thread.

        with offload(model.eval(), "cuda", budget="200MB") as statistics:
            logits = model(images)

    Args:
        model: A module on the CPU, or several by name: the components of a pipeline, or an ensemble.
        device: ``cuda``, ``cuda:1`` … or ``cpu``, which goes through the same motions where there is no GPU.
        mode: ``submodule``: groups of layers take turns in a ring of two slots: least memory. ``model``: whole models
            take turns, the least recently used out first: less traffic. ``none``: all weights stay on the device for
            as long as the context lasts.
        budget: Bytes of weights on the device, at most, or a size such as ``200MB`` (10⁶ bytes each) or ``1.5GiB``
            (2³⁰ bytes each): activations come on top. By default the least that works for ``submodule``, and the two
            largest models for ``model``.
        groups: What travels together in ``submodule``: ``bytes``, neighbouring layers up to the size of the largest
            one; ``leaf`` layers; or ``blocks`` of the network.
        prefetch: Upload the next group or model while this one computes. Without it, there is one slot.
        transport: What moves the weights, instead of the device's usual one: for tests and benchmarks.

    Yields:
        Statistics that are current at any time.

    Raises:
        UserError: a budget that is not a size or is below the least, a device that is not here, a model that is on a
            device already, in training mode, compiled, or offloaded already; but for ``model``, one that is a part of
            another. From inside: training mode or gradients switched on again; weights loaded, replaced, or changed in
            type; the model copied, pickled or compiled; in ``submodule`` a pass that runs in several threads, or whose
            modules read weights of others for which the budget has no room.
    """
    one_of("mode", mode, MODES)
    one_of("groups", groups, GROUPS)
    budget = byte_count("budget", budget) if isinstance(budget, str) else budget
    transport = transport or make_transport(torch.device(device))
    models = {"": model} if isinstance(model, nn.Module) else dict(model)
    for name, one in models.items():
        _check(name, one)
    if mode != "model":
        _check_apart(models)
    statistics = Statistics(mode)
    # Views that are made under inference_mode may not become parameters.
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        machine: Passes
        if mode == "none":
            machine = _none(models, budget, transport, statistics)
        elif mode == "model":
            machine = _turns(models, budget, transport, statistics, prefetch)
        else:
            machine = _ring(models, Cut(groups, budget, 2 if prefetch else 1), transport, statistics)
        stack.enter_context(_registered(models, machine))
        machine.start(stack)
        held = stack.pop_all()
    with held, torch.no_grad():
        yield statistics


def each(model: nn.Module, batches: Iterable[Tensor], batches_per_load: int = 1) -> Iterator[Any]:
    """Yield the model's outputs, batch by batch; inside :func:`offload`, several batches share an upload.

    In mode ``submodule``, ``batches_per_load`` batches go through the network side by side, each in a thread of its
    own that pauses where it needs the next group: their activations are on the device at the same time, and one
    upload of the weights serves them all. The first batch goes alone. In other modes this is a plain loop.

    Args:
        model: What was given to :func:`offload`, or one of several.
        batches: Inputs, one tensor a call.
        batches_per_load: How many share an upload.

    Raises:
        UserError: fewer than one batch a load, or a part of a model that is offloaded as a whole.
    """
    at_least("batches_per_load", batches_per_load, 1)
    machine = _offloaded.get(model)
    if isinstance(machine, Submodules):
        if not machine.has(model):
            raise UserError(
                "each takes a model as it was given to offload, and this is a part of one: call it as usual."
            )
        return machine.each(model, batches, batches_per_load)
    return map(model, batches)


@dataclass(frozen=True)
class Rehearsal:
    """Cut of models for ``submodule`` after their first passes.

    Attributes:
        grouping: The cut.
        passes: Passes before the last cut; 0 where the first one holds.
        moved: Bytes that went to the device in them.
        peak: Bytes on the device at most, in them too.
    """

    grouping: Grouping
    passes: int
    moved: int
    peak: int


def rehearse(
    models: Mapping[str, nn.Module], examples: Mapping[str, Tensor], budget: int | None, groups: str, prefetch: bool
) -> Rehearsal:
    """Send an example through each model on the CPU, as often as it takes to see how they would be cut.

    Args:
        models: See :func:`offload`.
        examples: An input for each, by the same names.
        budget: See :func:`offload`.
        groups: See :func:`offload`.
        prefetch: See :func:`offload`.

    Raises:
        UserError: the budget is below the least.
    """
    with offload(models, "cpu", budget=budget, groups=groups, prefetch=prefetch) as statistics:
        machine = _offloaded[next(iter(models.values()))]
        assert isinstance(machine, Submodules | Resident)
        if isinstance(machine, Resident):
            return Rehearsal(machine.grouping, 0, 0, statistics.peak_bytes)
        for name, model in models.items():
            while not machine.is_learned(name):
                model(examples[name])
        return Rehearsal(machine.grouping, *machine.spent, statistics.peak_bytes)


def _none(
    models: Mapping[str, nn.Module], budget: int | None, transport: Transport, statistics: Statistics
) -> Resident:
    regions = tuple(region for part in whole(models) for region in part.regions)
    grouping = Grouping((), Part((), regions), 0)
    if budget is not None and budget < grouping.peak:
        raise UserError(
            f"budget={budget:,} bytes is too small: with mode=none all {grouping.peak:,} bytes of weights stay on "
            "the device. Use mode=submodule."
        )
    return Resident(models, grouping, transport, statistics)


def _ring(
    models: Mapping[str, nn.Module], wanted: Cut, transport: Transport, statistics: Statistics
) -> Submodules | Resident:
    grouping = cut(models, wanted.kind, wanted.budget, wanted.slots)
    if not grouping.parts:
        return Resident(models, grouping, transport, statistics)
    return Submodules(models, grouping, wanted, transport, statistics)


def _turns(
    models: Mapping[str, nn.Module],
    budget: int | None,
    transport: Transport,
    statistics: Statistics,
    prefetch: bool,
) -> Models:
    parts = whole(models)
    sizes = sorted((part.size for part in parts), reverse=True)
    if budget is None:
        budget = sum(sizes[: 2 if prefetch else 1])
    if sizes and budget < sizes[0]:
        largest = max(parts, key=lambda part: part.size)
        raise UserError(
            f"budget={budget:,} bytes is too small: whole models take turns, and {' with '.join(largest.names)} alone "
            f"is {sizes[0]:,}, which is the least. Below that, use mode=submodule."
        )
    statistics.groups, statistics.weight_bytes = len(parts), sum(sizes)
    statistics.planned_peak_bytes = min(budget, sum(sizes))
    return Models(models, parts, budget, transport, statistics, prefetch)


@contextmanager
def _registered(models: Mapping[str, nn.Module], machine: Passes) -> Iterator[None]:
    modules = [module for model in models.values() for module in model.modules()]
    try:
        _offloaded.update(dict.fromkeys(modules, machine))
        yield
    finally:
        for module in modules:
            _offloaded.pop(module, None)


def _check_apart(models: Mapping[str, nn.Module]) -> None:
    """A pass through one model may not be a part of another one's: the order of groups is known by pass."""
    seen: dict[nn.Module, str] = {}
    for name, model in models.items():
        for module in model.modules():
            other = seen.setdefault(module, name)
            if other != name and (module is model or module is models[other]):
                inner, outer = (name, other) if module is model else (other, name)
                raise UserError(f"{inner} is a part of {outer}: offload {outer} alone, or use mode=model.")


def _check(name: str, model: nn.Module) -> None:
    shown = name or "the model"
    for path, module in model.named_modules(prefix=name):
        if module in _offloaded:
            raise UserError(f"{shown} is offloaded already, by a context around this one: one is enough.")
        check_uncompiled(path, module)
        if module is model or bears(module, recurse=False):  # Dropout alone may stay as it is
            with torch.no_grad():
                check_mode(path, module)
