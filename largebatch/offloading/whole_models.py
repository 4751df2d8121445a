"""Offloading by model: whole models take turns on the device, under a budget of bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.offloading.flat import Group
from largebatch.offloading.groups import Part, bears
from largebatch.offloading.guard import check_uncompiled
from largebatch.offloading.inputs import Border
from largebatch.offloading.passes import Passes, check_mode
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.transport import Slot, Transport


class Models(Passes):
    """Whole models on the device, the least recently used out first, the next one on its way while one computes.

    The order is that in which the models were named, until another one is seen. Nothing is brought after the last:
    where each is used for all batches before the next one is, K models are uploaded K times.

    A pass may run its branches in other threads, since all that they need is there.
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
        super().__init__(models, transport, statistics)
        self._parts, self._budget, self._prefetch = parts, budget, prefetch
        self._groups = [Group(part.names, part.regions) for part in parts]
        self._next = dict(zip(self._groups, self._groups[1:], strict=False))
        self._slots: dict[Group, Slot] = {}  # the least recently used first
        self._current: Group | None = None
        self._pointed: set[Group] = set()  # of them, those whose tensors are there
        self._alone = False  # a module within a model runs without it
        self._needs = 0  # so far: times that another group became current
        self._guests: dict[tuple[int, nn.Module], int] = {}  # by thread and module: what _needs was when it began

    def _groups_all(self) -> list[Group]:
        return self._groups

    def _memory_of(self, group: Group) -> Tensor | None:
        return self._slots[group].memory if group in self._pointed else None

    def _move_in(self) -> None:
        for group in self._groups:
            group.move_in(self._transport)

    def _move_out(self) -> None:
        with ExitStack() as stack:  # last first; after an error of the device each fails, and weights still come home
            for group in self._groups:
                stack.callback(group.move_out, self._transport)
            for group in self._slots:
                stack.callback(self._send_away, group)
            stack.callback(self._transport.close)

    def _take_hold(self, stack: ExitStack) -> None:
        border = Border(self._transport.device)
        tops = set(self._models.values())
        for group, part in zip(self._groups, self._parts, strict=True):
            for name, model in part.modules:
                enter = self._entering(group, name)
                # A component may be used by another method than forward, such as decode: its modules are called then.
                for module in model.modules():
                    if module is not model and module not in tops and bears(module, recurse=False):
                        stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                        stack.callback(module.register_forward_hook(self._leaving_module, always_call=True).remove)
                        border.take_in(module, stack)
                stack.callback(model.register_forward_pre_hook(enter, prepend=True).remove)

    def _begin(self, name: str) -> None:
        self._alone = False

    def _entering(self, group: Group, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            if self._gate.is_open:
                return
            check_mode(name, module)
            check_uncompiled(name, module)
            if not self._gate.is_mine():
                if group is self._current and self._gate.is_busy():
                    self._guests[threading.get_ident(), module] = self._needs
                    return
                if self._gate.enter(name, may_wait=False):
                    self._alone = True
            if group is not self._current:
                self._need(group)

        return enter

    def _leaving_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._alone and self._gate.ends():
            self._gate.leave()
        began = self._guests.pop((threading.get_ident(), module), None)
        if began not in (None, self._needs):
            raise UserError(
                f"a part of {self._modules[module] or 'the model'} was called by thread "
                f"{threading.current_thread().name} during a pass of the model in another thread, and continued after "
                "other weights had replaced its own: its output is wrong. Call whole models, which wait for each "
                "other."
            )

    def _need(self, group: Group) -> None:
        before, self._current = self._current, None  # until the weights are there
        if before is not None:
            self._next[before] = group
        self._needs += 1
        if group not in self._slots:
            self._make_room(group.size)
            self._upload(group)
        slot = self._slots[group] = self._slots.pop(group)
        if group not in self._pointed and group.changed_at_home():  # since it was sent for
            self._copy(slot, group)
        self._transport.wait(slot)
        if group not in self._pointed:
            group.point(group.views(slot.memory))
            self._pointed.add(group)
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
        if group in self._pointed:
            self._statistics.bytes_from_device += group.carry(self._slots[group].memory)
            self._pointed.discard(group)
            group.point_home()
        if torch.is_autocast_enabled(self._transport.device.type):
            torch.clear_autocast_cache()  # of casts of these weights, which would fill the device
        self._transport.release(self._slots.pop(group))

    def _upload(self, group: Group) -> None:
        with torch.inference_mode(False):
            slot = self._transport.allocate(group.size)
        group.changed_at_home()  # known from here on
        self._copy(slot, group)
        self._slots[group] = slot
        on_device = sum(one.size for one in self._slots)
        self._statistics.peak_bytes = max(self._statistics.peak_bytes, on_device)

    def _copy(self, slot: Slot, group: Group) -> None:
        self._transport.copy(slot, group.host)
        self._statistics.uploads += 1
        self._statistics.bytes_to_device += group.size
