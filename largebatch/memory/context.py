"""The public way in: a context in which a model's weights visit the device only when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import nn

from largebatch.config import UserError, one_of
from largebatch.memory.groups import GROUPS, Grouping, Part, cut
from largebatch.memory.statistics import Statistics
from largebatch.memory.submodule import Submodules, check_mode
from largebatch.memory.transport import Transport, make_transport

MODES = ("none", "submodule", "model")
_offloaded: WeakSet[nn.Module] = WeakSet()


@contextmanager
def offload(
    model: nn.Module | Mapping[str, nn.Module],
    device: torch.device | str,
    *,
    mode: str = "submodule",
    budget: int | None = None,
    groups: str = "bytes",
    prefetch: bool = True,
    transport: Transport | None = None,
) -> Iterator[Statistics]:
    """Evaluate a model on a device that need not hold all of its weights.

    Inside the context the model is called as usual, in evaluation mode and without gradients. Its weights live in
    host memory (pinned for CUDA) and are copied to the device, never back. When the context ends, also by an
    exception, the model is as it was, on the CPU.

        with offload(model.eval(), "cuda", budget=200_000_000) as statistics:
            logits = model(images)

    Args:
        model: A module on the CPU; or several by name, of a pipeline or an ensemble, for ``mode="model"``.
        device: ``cuda``, ``cuda:1`` … or ``cpu``, which goes through the same motions where there is no GPU.
        mode: ``submodule``: groups of layers take turns in a ring of two slots: least memory. ``model``: whole models
            take turns: less traffic. ``none``: all weights stay on the device for as long as the context lasts.
        budget: Bytes of weights on the device, at most: activations come on top. By default the least that works
            for ``submodule``, and two models for ``model``.
        groups: What travels together in ``submodule``: ``bytes``, neighbouring layers up to the size of the largest
            one; ``leaf`` layers; or ``blocks`` of the network.
        prefetch: Upload the next group or model while this one computes. Without it, there is one slot.
        transport: What moves the weights, instead of the device's usual one: for tests and benchmarks.

    Yields:
        Statistics that are current at any time.

    Raises:
        UserError: a budget below the least, a device that is not here, a model that is on a device already, in
            training mode, compiled, or offloaded already.
    """
    one_of("mode", mode, MODES)
    one_of("groups", groups, GROUPS)
    transport = transport or make_transport(torch.device(device))
    models = {"": model} if isinstance(model, nn.Module) else dict(model)
    for name, one in models.items():
        _check(name, one)
    statistics = Statistics(mode)
    with ExitStack() as stack:
        for one in models.values():
            stack.enter_context(_marked(one))
        with torch.inference_mode(False):  # views that are made under inference_mode may not become parameters
            for name, one in models.items():
                grouping = cut(one, groups, budget, 2 if prefetch else 1)
                if mode != "submodule":
                    everything = tuple(region for part in grouping.parts for region in part.regions)
                    grouping = Grouping((), Part((), grouping.kept.regions + everything), 0)
                statistics.groups += len(grouping.parts)
                statistics.kept_bytes += grouping.kept.size
                statistics.weight_bytes += grouping.kept.size + sum(part.size for part in grouping.parts)
                statistics.planned_peak_bytes += grouping.peak
                Submodules(one, grouping, transport, statistics, prefetch).start(stack)
        stack.enter_context(torch.no_grad())
        yield statistics


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    _offloaded.update(modules)
    try:
        yield
    finally:
        _offloaded.difference_update(modules)


def _check(name: str, model: nn.Module) -> None:
    for module in model.modules():
        if module in _offloaded:
            raise UserError(f"{name or 'the model'} is offloaded already, in a context around this one: one is enough.")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise UserError(
                f"{name or 'the model'} is compiled, and compiled code does not wait for weights that travel: offload "
                "the model as it was before torch.compile."
            )
    with torch.no_grad():
        check_mode(name, model)
