"""Weights that stay on the device for as long as the context lasts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from largebatch.offloading.flat import Group, Region
from largebatch.offloading.groups import Grouping
from largebatch.offloading.passes import Passes
from largebatch.offloading.statistics import Statistics
from largebatch.offloading.transport import Slot, Transport


class Kept:
    """Regions that are brought to the device once, and stay.

    Attributes:
        group: The regions.
        memory: The device's; None where there are none.
    """

    def __init__(self, transport: Transport, statistics: Statistics) -> None:
        self._transport, self._statistics = transport, statistics
        self._slot: Slot | None = None
        self.group = Group((), ())
        self.memory: Tensor | None = None

    @torch.inference_mode(False)
    def move_in(self, regions: Sequence[Region]) -> None:
        """Bring them."""
        self.group = Group((), regions)
        if not self.group.size:
            return
        self.group.move_in(self._transport)
        self._slot = self._transport.allocate(self.group.size)
        self._transport.copy(self._slot, self.group.host)
        self._transport.wait(self._slot)
        self.memory = self._slot.memory
        self.group.point(self.group.views(self.memory))
        self._statistics.bytes_to_device += self.group.size

    def move_out(self) -> None:
        """Give them memory of their own again."""
        slot, self._slot, self.memory = self._slot, None, None
        try:
            if slot is not None:
                self._transport.release(slot)
        finally:
            self.group.move_out(self._transport)


class Resident(Passes):
    """All weights on the device. Several threads may compute at a time.

    Attributes:
        grouping: How the models are cut: nothing travels.
    """

    shared = True

    def __init__(
        self, models: Mapping[str, nn.Module], grouping: Grouping, transport: Transport, statistics: Statistics
    ) -> None:
        super().__init__(models, transport, statistics)
        self.grouping = grouping
        self._kept = Kept(transport, statistics)
        self._tally = threading.RLock()
        size = grouping.kept.size
        statistics.kept_bytes = statistics.weight_bytes = size
        statistics.planned_peak_bytes = statistics.peak_bytes = size

    def _groups_all(self) -> list[Group]:
        return [self._kept.group]

    def _memory_of(self, group: Group) -> Tensor | None:
        return self._kept.memory

    def _move_in(self) -> None:
        self._kept.move_in(self.grouping.kept.regions)

    def _move_out(self) -> None:
        try:
            self._transport.close()
        finally:
            self._kept.move_out()

    def _carry(self) -> None:
        with self._tally:
            super()._carry()

    def _settle(self) -> None:
        with self._tally:
            super()._settle()
