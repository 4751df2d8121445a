"""Offloading by submodule: groups of weights take turns in a ring of two slots on the device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from largebatch.base.errors import UserError
from largebatch.offloading import lockstep
from largebatch.offloading.flat import Group, Views, own_copy
from largebatch.offloading.groups import Grouping, bears, cut_for_readers
from largebatch.offloading.guard import check_uncompiled
from largebatch.offloading.passes import Passes, check_mode
from largebatch.offloading.resident import Kept
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.transport import Slot, Transport
from largebatch.offloading.watch import address


@dataclass(frozen=True)
class Cut:
    """Requested grouping: see :func:`largebatch.offloading.groups.cut`."""

    kind: str
    budget: int | None
    slots: int


class Submodules(Passes):
    """Weights on the device only while their group computes.

    The order is learned from each model's first pass. From then on the next group is on its way while one computes;
    where a pass departs from that, weights are waited for, which is slower and as right.

    A module that reads the weights of others, which it does not call, is found in the first pass too. In that pass
    they are lent to it; then the models are cut anew.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        grouping: Grouping,
        wanted: Cut,
        transport: Transport,
        statistics: Statistics,
    ) -> None:
        super().__init__(models, transport, statistics)
        self._wanted, self._grouping = wanted, grouping
        self._prefetch = wanted.slots > 1
        self._kept = Kept(transport, statistics)
        self._groups: list[Group] = []
        self._group_of: dict[nn.Module, Group] = {}
        self._hosts: dict[int, tuple[Group, int]] = {}  # regions in host memory, by their addresses
        self._slots: list[Slot] = []
        self._views: dict[tuple[Group, Slot], Views] = {}
        self._where: dict[Group, Slot] = {}  # also groups that are on their way
        self._current: Group | None = None
        self._lent: dict[tuple[Group, int], Slot] = {}
        self._borrowers: list[nn.Module | None] = []  # to whom
        self._reads: list[tuple[nn.Module | None, str, Tensor]] = []  # of weights that were lent
        self._known = 0  # of them, when the models were last cut
        self.spent = (0, 0)  # passes before that, and the bytes that they moved
        self._failure: UserError | None = None
        self._orders: dict[str, list[Group]] = {}  # of each model's first pass
        self._model: str | None = None  # that runs; None where a model's modules are called without it
        self._trace: list[Group] = []
        self._position = 0  # in the order: what should come next
        self._warned = False

    @property
    def grouping(self) -> Grouping:
        """Return the current cut of the models."""
        return self._grouping

    def is_learned(self, name: str) -> bool:
        """Return whether a model's first passes have shown all that they could."""
        return name in self._orders or not self._groups

    def _groups_all(self) -> list[Group]:
        return [self._kept.group, *self._groups]

    def _memory_of(self, group: Group) -> Tensor | None:
        if group is self._kept.group:
            return self._kept.memory
        return self._where[group].memory if group is self._current else None

    def _move_in(self) -> None:
        grouping = self._grouping
        self._groups = [Group(part.names, part.regions) for part in grouping.parts]
        self._kept.move_in(grouping.kept.regions)
        with torch.inference_mode(False):
            self._slots = [self._transport.allocate(grouping.slot_size) for _ in range(grouping.slots)]
        self._group_of = {}
        for group, part in zip(self._groups, grouping.parts, strict=True):
            group.move_in(self._transport)
            for _, unit in part.modules:
                self._group_of.update(dict.fromkeys(unit.modules(), group))
        self._hosts = {key: (group, number) for group in self._groups for key, number in group.hosts().items()}
        statistics = self._statistics
        statistics.groups = len(self._groups)
        statistics.kept_bytes = grouping.kept.size
        statistics.weight_bytes = grouping.kept.size + sum(part.size for part in grouping.parts)
        statistics.planned_peak_bytes = grouping.peak
        self._count()

    def _move_out(self) -> None:
        self._views.clear()
        with ExitStack() as stack:  # last first; after an error of the device each fails, and weights still come home
            stack.callback(self._kept.move_out)
            for group in self._groups:
                stack.callback(group.move_out, self._transport)
            for slot in self._slots:
                stack.callback(self._transport.release, slot)
            stack.callback(self._transport.close)
        self._slots.clear()
        self._where.clear()

    def _take_hold(self, stack: ExitStack) -> None:
        for module, name in self._modules.items():
            if bears(module):
                stack.callback(module.register_forward_pre_hook(self._entering(name), prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leaving_module, always_call=True).remove)

    def _begin(self, name: str) -> None:
        if self._failure is not None:
            raise self._failure
        self._model, self._position, self._trace = name, 0, []
        if name not in self._orders:
            self._seen.discard(name)  # is watched, again after a new cut

    def _end(self, name: str) -> None:
        self._give_back()
        if len(self._reads) > self._known:
            self._cut_anew()
            return
        self._orders.setdefault(name, self._trace)
        self._position = 0
        self._fetch_next()

    def _clean_up(self) -> None:
        self._give_back()
        self._model = None

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            group = self._group_of.get(module)
            if group is None or self._gate.is_open:
                return
            check_mode(name, module)
            check_uncompiled(name, module)
            turn = lockstep.current(self)
            if turn is not None:
                if group is not self._current:
                    turn.ask(group)
                return
            if not self._gate.is_mine():
                if not self._gate.enter(name, may_wait=False):
                    return  # the context has ended meanwhile
                self._model = None
            if group is not self._current:
                with self._watch.pause() if self._watch is not None else nullcontext():
                    self._need(group)

        return enter

    def _leaving_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._model is None and self._gate.ends():
            self._gate.leave()
        if type(output) is Tensor:
            return self._apart(output)
        if output is None or not any(
            isinstance(one, Tensor) and address(one) in self._addresses for one in pytree.tree_leaves(output)
        ):
            return None
        return pytree.tree_map_only(Tensor, lambda one: one if (own := self._apart(one)) is None else own, output)

    def _apart(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of a tensor that is a view of weights in a slot, which others take the place of."""
        return own_copy(tensor) if address(tensor) in self._addresses else None

    def _need(self, group: Group) -> None:
        """Have a group on the device, and the next one on its way."""
        self._give_back()
        if self._model is not None and self._model not in self._orders:
            self._trace.append(group)
        elif order := self._order():
            self._follow(order, group)
        self._take_strayed(group)
        slot = self._where.get(group)
        if slot is None:
            slot = self._upload(group)
        elif group.changed_at_home():  # since it was sent for
            self._copy(slot, group)
        self._transport.wait(slot)
        self._current = group
        if (group, slot) not in self._views:
            self._views[group, slot] = group.views(slot.memory)
        group.point(self._views[group, slot])
        self._fetch_next()

    def _order(self) -> list[Group]:
        return [] if self._model is None else self._orders.get(self._model, [])

    def _follow(self, order: Sequence[Group], group: Group) -> None:
        """Find the place in the order after a group, which should be the next one.

        After a departure that is its next place, else its first one; an unknown group takes the place of another.
        """
        if self._position >= len(order) or order[self._position] is not group:
            self._statistics.departures += 1
            self._warn(group)
            places = [place for place, one in enumerate(order) if one is group] or [self._position]
            self._position = next((place for place in places if place > self._position), places[0])
        self._position += 1

    def _warn(self, group: Group) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The model takes another way through its layers than on the first batch: {group.names[0]} comes "
                "unexpected. Its weights are waited for: results are right, but slower.",
                stacklevel=2,
            )

    def _fetch_next(self) -> None:
        order = self._order()
        if self._prefetch and order and order[self._position % len(order)] not in self._where:
            self._upload(order[self._position % len(order)])

    def _upload(self, group: Group) -> Slot:
        slot = self._free_slot()
        group.changed_at_home()  # known from here on
        self._copy(slot, group)
        self._where[group] = slot
        return slot

    def _copy(self, slot: Slot, group: Group) -> None:
        self._transport.copy(slot, group.host)
        self._statistics.uploads += 1
        self._statistics.bytes_to_device += group.size

    def _free_slot(self) -> Slot:
        """Return a slot that nobody reads: rather an empty one than one whose group was not asked for after all."""
        held = {slot: group for group, slot in self._where.items()}
        for slot in self._slots:
            if slot not in held:
                return slot
        if len(self._slots) < self._grouping.slots:
            with torch.inference_mode(False):
                self._slots.append(self._transport.allocate(self._grouping.slot_size))
            self._count()
            return self._slots[-1]
        slot = next(slot for slot, group in held.items() if group is not self._current)
        del self._where[held[slot]]
        return slot

    def _count(self) -> None:
        """Count the weights that are on the device now."""
        self._addresses = {address(slot.memory) for slot in self._slots}
        sizes = (slot.memory.numel() for slot in (*self._slots, *self._lent.values()))
        now = self._grouping.kept.size + sum(sizes)
        self._statistics.peak_bytes = max(self._statistics.peak_bytes, now)

    def _give_back(self) -> None:
        self._take_back()
        current, self._current = self._current, None
        if current is not None:
            slot = self._where.pop(current)
            try:
                self._take_strayed(current)
                self._statistics.bytes_from_device += current.carry(slot.memory)
            finally:
                current.point_home()
                self._transport.record(slot)
            if torch.is_autocast_enabled(self._transport.device.type):
                torch.clear_autocast_cache()  # of casts of these weights, which would fill the device

    def _take_back(self) -> None:
        """Take back what was lent."""
        lent, self._lent, self._borrowers = self._lent, {}, []
        for (group, number), slot in lent.items():
            self._take_strayed(group)
            self._statistics.bytes_from_device += group.carry(slot.memory, number)
            group.lend(number, None)
            self._transport.release(slot)

    def _left(self, module: nn.Module) -> None:
        if module in self._borrowers:
            self._take_back()

    def _read(self, tensor: Tensor, reader: nn.Module | None) -> Tensor:
        """Lend a weight to a module that reads it, although no module that has it computes."""
        found = self._hosts.get(address(tensor))
        if found is None:
            return tensor
        group, number = found
        slot = self._lent.get(found) or self._lend(group, number, reader)
        return tensor if id(tensor) in self._numbers else group.alias(tensor, number, slot.memory)

    def _lend(self, group: Group, number: int, reader: nn.Module | None) -> Slot:
        region = group.regions[number]
        for slot in [slot for slot in self._slots if self._current is None or slot is not self._where[self._current]]:
            self._drop(slot)
        budget = self._wanted.budget
        sizes = [slot.memory.numel() for slot in (*self._slots, *self._lent.values())]
        needed = self._grouping.kept.size + sum(sizes) + region.size
        if budget is not None and needed > budget:
            who = "" if reader is None else self._modules[reader]
            raise UserError(
                f"budget={budget:,} bytes is too small: {who or 'the model'} reads "
                f"{region.names[0]} itself, instead of calling the module that has it, and so {needed:,} bytes of "
                "weights are on the device together."
            )
        group.changed_at_home()
        with torch.inference_mode(False):
            slot = self._transport.allocate(region.size)
        self._lent[group, number] = slot
        self._borrowers.append(reader)
        self._count()
        self._transport.copy(slot, group.region_bytes(number))
        self._transport.wait(slot)
        self._statistics.bytes_to_device += region.size
        group.lend(number, slot.memory)
        self._reads += [(reader, name, one) for name, one in zip(region.names, region.tensors, strict=True)]
        return slot

    def _drop(self, slot: Slot) -> None:
        self._where = {group: one for group, one in self._where.items() if one is not slot}
        self._views = {key: views for key, views in self._views.items() if key[1] is not slot}
        self._slots.remove(slot)
        self._transport.release(slot)

    def _note(self, tensor: Tensor) -> None:
        super()._note(tensor)
        for (group, number), slot in self._lent.items():
            if address(slot.memory) == address(tensor):
                group.always.add(number)

    @torch.inference_mode(False)
    def _cut_anew(self) -> None:
        """Cut the models so that what their modules read of others is there when they compute."""
        self._orders.clear()
        self._carry()
        always = [tensor for group in self._groups_all() for tensor in group.always_tensors()]
        self._move_out()
        self._groups, self._group_of, self._hosts, self._numbers = [], {}, {}, {}
        self._known = len(self._reads)
        self.spent = (self._statistics.passes + 1, self._statistics.bytes_to_device)
        wanted = self._wanted
        try:
            self._grouping = cut_for_readers(self._models, wanted.kind, wanted.budget, wanted.slots, self._reads)
        except UserError as error:
            self._failure = error
            raise
        self._move_in()
        self._index()
        for tensor in always:
            group, number = self._numbers[id(tensor)]
            group.always.add(group.region_of(number))

    def has(self, model: nn.Module) -> bool:
        """Return whether this is one of the models, not a part of one."""
        return any(model is one for one in self._models.values())

    def each(self, model: nn.Module, batches: Iterable[Tensor], together: int) -> Iterator[Any]:
        """Yield the outputs of batches, ``together`` of them on one upload; the first batch alone, to be traced."""
        if together == 1 or not self._groups:
            yield from map(model, batches)
            return
        name = next(name for name, one in self._models.items() if one is model)
        remaining = iter(batches)
        while not self.is_learned(name):
            first = list(islice(remaining, 1))
            if not first:
                return
            yield model(first[0])
        while some := list(islice(remaining, together)):
            self._gate.enter(name, may_wait=True, frame=sys._getframe())
            try:
                self._start_pass(name)
                outputs = lockstep.run(self, model, some, self._need, self._transport.device)
                self._finish(name)
            finally:
                self._leave(name)
            yield from outputs
