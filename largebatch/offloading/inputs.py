"""Inputs that come to the device, and outputs that go back to where the inputs were."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Border:
    """A model that is offered tensors of another device takes them to its own, and answers in theirs.

    So a pipeline that believes its components to be on the CPU works unchanged. Where inputs are on the device
    already, nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: dict[int, torch.device] = {}  # of the call that each thread is in

    def guard(self, model: nn.Module, stack: ExitStack) -> None:
        """Stand at a model's entrance until ``stack`` ends."""
        stack.callback(model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(self._leave).remove)

    def take_in(self, module: nn.Module, stack: ExitStack) -> None:
        """Let a module within take a tensor to the device, where it was called without the model around it."""
        stack.callback(module.register_forward_pre_hook(self._take_in, prepend=True).remove)

    def _take_in(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        foreign = any(isinstance(value, Tensor) and value.device != self._device for value in args)
        return moved(args, self._device) if foreign else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._origin.pop(threading.get_ident(), None)
        if all(tensor.device == self._device for tensor in tensors):
            return None
        self._origin[threading.get_ident()] = tensors[0].device
        return moved((args, kwargs), self._device)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        origin = self._origin.pop(threading.get_ident(), None)
        return None if origin is None else moved(output, origin)


def moved(values: Any, device: torch.device) -> Any:
    """Return the same structure with its tensors on a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)
