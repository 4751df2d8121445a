"""Offloading by submodule: groups of weights take turns in a ring of two slots on the device."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.config import UserError
from largebatch.memory.flat import Group
from largebatch.memory.groups import Grouping
from largebatch.memory.statistics import Statistics
from largebatch.memory.transport import Slot, Transport

# The group used before, and the one in use: two, since a group may be used at more than one place of a pass.
Place = tuple[Group | None, Group | None]


class Submodules:
    """Weights on the device only while their group computes.

    What follows what is learned from the first pass. From then on the next group is on its way while one computes;
    where a pass departs from that, weights are waited for, which is slower and as right.
    """

    def __init__(
        self, model: nn.Module, grouping: Grouping, transport: Transport, statistics: Statistics, prefetch: bool
    ) -> None:
        self._model, self._transport, self._statistics, self._prefetch = model, transport, statistics, prefetch
        self._groups = [
            Group(number, [name for name, _ in part.modules], part.regions)
            for number, part in enumerate(grouping.parts)
        ]
        self._kept = Group(-1, (), grouping.kept.regions)
        self._all = [group for group in (self._kept, *self._groups) if group.size]
        self._grouping = grouping
        self._slots: list[Slot] = []
        self._views: dict[tuple[Group, Slot], list[Tensor]] = {}
        self._where: dict[Group, Slot] = {}  # also groups that are on their way
        self._before: Group | None = None
        self._current: Group | None = None
        self._next: dict[Place, Group] = {}
        self._traced = False
        self._warned = False

    def start(self, stack: ExitStack) -> None:
        """Move the weights into flat buffers, and take hold of the model's calls; ``stack`` undoes it."""
        stack.callback(self._restore)
        for group in self._all:
            group.move_in(self._transport)
        self._slots = [self._transport.allocate(self._grouping.slot_size) for _ in range(self._grouping.slots)]
        self._statistics.peak_bytes += self._grouping.peak
        self._views = {(group, slot): group.views(slot.memory) for group in self._groups for slot in self._slots}
        if self._kept.regions:
            self._slots.append(slot := self._transport.allocate(self._kept.size))
            self._bring(self._kept, slot)
            self._transport.wait(slot)
            self._kept.point(self._kept.views(slot.memory))
            self._slots.remove(slot)
            stack.callback(self._transport.release, slot)
        stack.callback(self._model.register_forward_pre_hook(self._begin, prepend=True).remove)
        for group, part in zip(self._groups, self._grouping.parts, strict=True):
            for name, module in part.modules:
                hook = _Enter(self, group, name)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        stack.callback(self._model.register_forward_hook(self._end, always_call=True).remove)

    def _restore(self) -> None:
        self._transport.close()
        for slot in self._slots:
            self._transport.release(slot)
        self._views.clear()
        for group in self._all:
            group.move_out(self._transport)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._give_back()
        self._before = None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._give_back()
        self._before, self._traced = None, True
        self._statistics.passes += 1
        self._fetch_next()

    def enter(self, group: Group, name: str, module: nn.Module) -> None:
        """Have a group on the device, and the next one on its way."""
        check_mode(name, module)
        if group is self._current:
            return
        place = (self._before, self._current)
        self._give_back()
        self._learn(place, group)
        slot = self._where.get(group) or self._bring(group, self._free_slot())
        self._transport.wait(slot)
        group.point(self._views[group, slot])
        self._before, self._current = place[1], group
        self._fetch_next()

    def _learn(self, place: Place, group: Group) -> None:
        expected = self._next.get(place)
        if expected is not group and (self._traced or expected is not None):
            self._statistics.departures += 1
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The model takes another way through its layers than on the first batch: {group.names[0]} comes "
                    "unexpected. Its weights are waited for; results are right, but slower.",
                    stacklevel=4,
                )
        self._next[place] = group

    def _fetch_next(self) -> None:
        following = self._next.get((self._before, self._current))
        if self._prefetch and following is not None and following not in self._where:
            self._bring(following, self._free_slot())

    def _free_slot(self) -> Slot:
        """Return a slot that nobody reads, rather one that holds nothing."""
        held = {slot: group for group, slot in self._where.items()}
        slot = next((slot for slot in self._slots if slot not in held), None)
        if slot is None:
            slot = next(slot for slot, group in held.items() if group is not self._current)
            del self._where[held[slot]]
        return slot

    def _bring(self, group: Group, slot: Slot) -> Slot:
        self._transport.copy(slot, group.host)
        if group is not self._kept:
            self._where[group] = slot
            self._statistics.uploads += 1
        self._statistics.bytes_to_device += group.size
        return slot

    def _give_back(self) -> None:
        if self._current is not None:
            self._current.point_home()
            self._transport.record(self._where.pop(self._current))
            self._current = None


class _Enter:
    """The hook before a module's forward."""

    def __init__(self, ring: Submodules, group: Group, name: str) -> None:
        self.ring, self.group, self.name = ring, group, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.ring.enter(self.group, self.name, module)


def check_mode(name: str, module: nn.Module) -> None:
    """Raise where weights would be lost: in training, or where a gradient would need them later.

    Raises:
        UserError: either of these.
    """
    if module.training:
        raise UserError(
            f"{name or 'the model'} is in training mode: what it learns on the device would be lost. Call model.eval() "
            "before offloading."
        )
    if torch.is_grad_enabled():
        raise UserError(
            "gradients are enabled, and weights that have left the device have none: call the model under "
            "torch.no_grad() or torch.inference_mode()."
        )
