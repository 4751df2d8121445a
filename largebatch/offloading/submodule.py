"""Offloading by submodule: groups of weights take turns in a ring of two slots on the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.offloading import lockstep
from largebatch.offloading.flat import Group
from largebatch.offloading.groups import Grouping
from largebatch.offloading.inputs import Border
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.transport import Slot, Transport
from largebatch.offloading.watch import Watch


class Submodules:
    """Weights on the device only while their group computes.

    The order is learned from each model's first pass. From then on the next group is on its way while one computes;
    where a pass departs from that, weights are waited for, which is slower and as right.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        grouping: Grouping,
        transport: Transport,
        statistics: Statistics,
        prefetch: bool,
    ) -> None:
        self._models, self._grouping = models, grouping
        self._transport, self._statistics, self._prefetch = transport, statistics, prefetch
        self._groups = [Group(part.names, part.regions) for part in grouping.parts]
        self._kept = Group((), grouping.kept.regions)
        self._slots: list[Slot] = []
        self._kept_slots: list[Slot] = []  # one, or none where nothing is kept
        self._views: dict[tuple[Group, Slot], list[Tensor]] = {}
        self._where: dict[Group, Slot] = {}  # also groups that are on their way
        self._current: Group | None = None
        self._orders: dict[str, list[Group]] = {}  # of each model's first pass
        self._model: str | None = None  # that runs; None where a model's modules are called without it
        self._trace: list[Group] = []
        self._position = 0  # in the order: what should come next
        self._watch: Watch | None = None
        self._warned = False

    def start(self, stack: ExitStack) -> None:
        """Move the weights into flat buffers, and take hold of the models' calls; ``stack`` undoes it."""
        stack.callback(self._restore)
        if self._kept.size:
            self._keep(stack)
        for group in self._groups:
            group.move_in(self._transport)
        self._slots = [self._transport.allocate(self._grouping.slot_size) for _ in range(self._grouping.slots)]
        self._views = {(group, slot): group.views(slot.memory) for group in self._groups for slot in self._slots}
        border = Border(self._transport.device)
        for group, part in zip(self._groups, self._grouping.parts, strict=True):
            for name, module in part.modules:
                stack.callback(module.register_forward_pre_hook(self._entering(group, name), prepend=True).remove)
        for name, model in self._models.items():
            stack.callback(model.register_forward_pre_hook(self._beginning(name), prepend=True).remove)
            stack.callback(model.register_forward_hook(self._end).remove)
            stack.callback(model.register_forward_hook(self._leave, always_call=True).remove)
            border.guard(model, stack)

    def _keep(self, stack: ExitStack) -> None:
        self._kept.move_in(self._transport)
        slot = self._transport.allocate(self._kept.size)
        stack.callback(self._transport.release, slot)
        self._kept_slots.append(slot)
        self._transport.copy(slot, self._kept.host)
        self._transport.wait(slot)
        self._kept.point(self._kept.views(slot.memory))
        self._statistics.bytes_to_device += self._kept.size

    def _restore(self) -> None:
        self._stop_watching()
        self._views.clear()
        with ExitStack() as stack:  # last first; after an error of the device each fails, and weights still come home
            for group in (self._kept, *self._groups):
                stack.callback(group.move_out, self._transport)
            for slot in self._slots:
                stack.callback(self._transport.release, slot)
            stack.callback(self._transport.close)

    def _beginning(self, name: str) -> Any:
        def begin(module: nn.Module, args: Any) -> None:
            check_mode(name, module)
            if lockstep.current() is None:
                self._begin(name)

        return begin

    def _begin(self, name: str) -> None:
        self._clean_up()  # hooks that come last are not called after KeyboardInterrupt
        self._model, self._position = name, 0
        if name not in self._orders and self._groups:
            self._trace = []
            there = [slot.memory for slot in (*self._slots, *self._kept_slots)]
            self._watch = Watch(self._models, self._groups, there)
            self._watch.begin(name)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._statistics.passes += 1
        if lockstep.current() is None:
            self._finish()

    def _finish(self) -> None:
        self._stop_watching()
        assert self._model is not None
        self._orders.setdefault(self._model, self._trace)
        self._give_back()
        self._position = 0
        self._fetch_next()
        self._model = None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if lockstep.current() is None:
            self._clean_up()

    def _clean_up(self) -> None:
        """Leave nothing of a pass behind, also after an exception."""
        self._stop_watching()
        self._give_back()
        self._model = None

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _entering(self, group: Group, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            check_mode(name, module)
            if group is self._current:
                return
            turn = lockstep.current()
            if turn is not None:
                turn.ask(group)
            elif self._watch is not None:
                with self._watch.pause():
                    self._need(group)
            else:
                self._need(group)

        return enter

    def _need(self, group: Group) -> None:
        """Have a group on the device, and the next one on its way."""
        self._give_back()
        if self._watch is not None:
            self._trace.append(group)
        elif order := self._order():
            self._follow(order, group)
        slot = self._where.get(group) or self._upload(group)
        self._transport.wait(slot)
        self._current = group
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
        self._transport.copy(slot, group.host)
        self._where[group] = slot
        self._statistics.uploads += 1
        self._statistics.bytes_to_device += group.size
        return slot

    def _free_slot(self) -> Slot:
        """Return a slot that nobody reads: rather an empty one than one whose group was not asked for after all."""
        held = {slot: group for group, slot in self._where.items()}
        for slot in self._slots:
            if slot not in held:
                return slot
        slot = next(slot for slot, group in held.items() if group is not self._current)
        del self._where[held[slot]]
        return slot

    def _give_back(self) -> None:
        group, self._current = self._current, None
        if group is not None:
            group.point_home()
            self._transport.record(self._where.pop(group))

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
        if name not in self._orders:
            yield from (model(batch) for batch in islice(remaining, 1))
        while some := list(islice(remaining, together)):
            self._begin(name)
            try:
                outputs = lockstep.run(model, some, self._need, self._transport.device)
                self._finish()
            finally:
                self._clean_up()
            yield from outputs


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
