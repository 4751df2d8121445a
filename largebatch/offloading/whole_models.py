"""Offloading by model: whole models take turns on the device, under a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from largebatch.offloading.flat import Group
from largebatch.offloading.groups import Part, bears
from largebatch.offloading.inputs import Border
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.submodule import check_mode
from largebatch.offloading.transport import Slot, Transport


class Models:
    """Whole models on the device, the least recently used out first, the next one on its way while one computes.

    The order is that in which the models were named, until another one is seen. Nothing is brought after the last:
    where each is used for all batches before the next one is, K models are uploaded K times.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        parts: list[Part],
        budget: int,
        transport: Transport,
        statistics: Statistics,
        prefetch: bool,
    ) -> None:
        self._models, self._parts, self._budget = models, parts, budget
        self._transport, self._statistics, self._prefetch = transport, statistics, prefetch
        self._groups = [Group(part.names, part.regions) for part in parts]
        self._next = dict(zip(self._groups, self._groups[1:], strict=False))
        self._slots: dict[Group, Slot] = {}  # the least recently used first
        self._current: Group | None = None

    def start(self, stack: ExitStack) -> None:
        """Move the weights into flat buffers, and take hold of the models' calls; ``stack`` undoes it."""
        stack.callback(self._restore)
        for group in self._groups:
            group.move_in(self._transport)
        border = Border(self._transport.device)
        for group, part in zip(self._groups, self._parts, strict=True):
            for name, model in part.modules:
                enter = self._entering(group, name)
                # A component may be used by another method than forward, such as decode: its modules are called then.
                for module in model.modules():
                    if module is not model and bears(module, recurse=False):
                        stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                        border.take_in(module, stack)
                stack.callback(model.register_forward_pre_hook(enter, prepend=True).remove)
        for model in self._models.values():
            stack.callback(model.register_forward_hook(self._end).remove)
            border.guard(model, stack)

    def _restore(self) -> None:
        with ExitStack() as stack:  # last first; after an error of the device each fails, and weights still come home
            for group in self._groups:
                stack.callback(group.move_out, self._transport)
            for group in self._slots:
                stack.callback(self._send_away, group)
            stack.callback(self._transport.close)

    def _entering(self, group: Group, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            check_mode(name, module)
            if group is not self._current:
                self._need(group)

        return enter

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._statistics.passes += 1

    def _need(self, group: Group) -> None:
        before, self._current = self._current, None  # until the weights are there
        if before is not None:
            self._next[before] = group
        if group not in self._slots:
            self._make_room(group.size)
            self._upload(group)
        slot = self._slots[group] = self._slots.pop(group)
        self._transport.wait(slot)
        with torch.inference_mode(False):
            group.point(group.views(slot.memory))
        self._current = group
        following = self._next.get(group)
        if not self._prefetch or following is None or following in self._slots:
            return
        if group.size + following.size <= self._budget:
            self._make_room(following.size)
            self._upload(following)

    def _make_room(self, size: int) -> None:
        while self._slots and sum(one.size for one in self._slots) + size > self._budget:
            self._send_away(next(iter(self._slots)))

    def _send_away(self, group: Group) -> None:
        group.point_home()
        self._transport.release(self._slots.pop(group))

    def _upload(self, group: Group) -> None:
        with torch.inference_mode(False):
            slot = self._transport.allocate(group.size)
        self._transport.copy(slot, group.host)
        self._slots[group] = slot
        self._statistics.uploads += 1
        self._statistics.bytes_to_device += group.size
        on_device = sum(one.size for one in self._slots)
        self._statistics.peak_bytes = max(self._statistics.peak_bytes, on_device)
