"""Weights laid out in one flat buffer: one copy moves them all, and every tensor is a view of it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.base.errors import UserError
from largebatch.offloading.transport import Transport

ALIGNMENT = 256  # bytes: what the device's own allocator gives, so that kernels find what they would find without us


@dataclass(frozen=True)
class Region:
    """Bytes ``start`` to ``stop`` of one storage, and the tensors in them: several where weights are tied."""

    start: int
    stop: int
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """What it takes in a flat buffer, in bytes."""
        return -(-max(self.stop - self.start, 1) // ALIGNMENT) * ALIGNMENT


def pages(size: int) -> Tensor:
    """Return ``size`` bytes in memory pages of their own, which become real when they are written to.

    Weights that move in region by region so need no room for a second copy, and pages can be pinned where they are,
    while PyTorch's pinned allocator rounds up to a power of two.
    """
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def regions_of(named: Iterable[tuple[str, Tensor]]) -> list[Region]:
    """Gather tensors by the memory they occupy, in order of first appearance; overlapping ones share a region.

    Raises:
        UserError: a tensor that is not on the CPU, or that no flat buffer can hold.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named:
        _check(name, tensor)
        tensors.setdefault(id(tensor), (name, tensor))
    order = {key: place for place, key in enumerate(tensors)}
    spans = sorted((*_span(tensor), order[key], key) for key, (_, tensor) in tensors.items())
    found: list[tuple[int, int, int, list[int]]] = []  # storage, start, stop, keys
    for storage, start, stop, _, key in spans:
        if found and storage == found[-1][0] and start < found[-1][2]:
            last = found[-1]
            found[-1] = (storage, last[1], max(last[2], stop), [*last[3], key])
        else:
            found.append((storage, start, stop, [key]))
    found.sort(key=lambda one: min(order[key] for key in one[3]))
    return [
        Region(start, stop, tuple(tensors[key][0] for key in keys), tuple(tensors[key][1] for key in keys))
        for _, start, stop, keys in found
    ]


def _check(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise UserError(
            f"{name} is on {tensor.device} already: offloading takes a model that is on the CPU. Leave out .to(device)."
        )
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise UserError(
            f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, which cannot be laid into a flat buffer: "
            "offloading takes dense tensors and parameters."
        )


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Return storage, first byte and last byte + 1; gaps and repetitions of strides are inside."""
    start = _first_byte(tensor)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    stop = start + (int(reach) * tensor.element_size() if tensor.numel() else 0)
    # Whole steps of 16 bytes: views of different types, each aligned, stay so.
    return tensor.untyped_storage().data_ptr(), start - start % 16, stop


class Group:
    """Weights that travel together: one flat buffer in host memory, of which the model's own tensors are views.

    Attributes:
        names: The modules it belongs to.
        regions: What it holds.
        size: Bytes.
    """

    def __init__(self, names: Sequence[str], regions: Sequence[Region]) -> None:
        self.names, self.regions = tuple(names), tuple(regions)
        self.size = sum(region.size for region in regions)
        self.host = torch.empty(0, dtype=torch.uint8)
        self._home: list[Tensor] = []
        self._offsets = []
        offset = 0
        for region in regions:
            self._offsets.append(offset)
            offset += region.size
        # The tensors' shapes in that order, kept before anything moves: first byte, type, size and stride.
        self._tensors = [tensor for region in regions for tensor in region.tensors]
        self._places = [
            (offset + _first_byte(tensor) - region.start, tensor.dtype, tensor.size(), tuple(map(int, tensor.stride())))
            for region, offset in zip(regions, self._offsets, strict=True)
            for tensor in region.tensors
        ]
        self._moved = 0  # regions that live in the flat buffer
        self._pinned = False

    def move_in(self, transport: Transport) -> None:
        """Copy the weights into a flat buffer, region by region, so that no second copy builds up."""
        self.host = pages(self.size)
        self._home = self.views(self.host)
        first = 0
        for region, offset in zip(self.regions, self._offsets, strict=True):
            source = _raw(region.tensors[0], region.start, region.stop - region.start)
            self.host[offset : offset + len(source)].copy_(source)
            del source
            self._moved += 1
            last = first + len(region.tensors)
            _point(self._tensors[first:last], self._home[first:last])
            first = last
        transport.pin(self.host)
        self._pinned = True

    @torch.inference_mode(False)
    def move_out(self, transport: Transport) -> None:
        """Give the weights memory of their own again, with the strides they had.

        Outside of inference_mode, whose tensors could not be trained afterwards.
        """
        first = 0
        for region, offset in zip(self.regions[: self._moved], self._offsets, strict=False):
            last = first + len(region.tensors)
            own = self.host[offset : offset + region.size].clone()
            views = [
                _view(own, place - offset, dtype, size, stride)
                for place, dtype, size, stride in self._places[first:last]
            ]
            _point(self._tensors[first:last], views)
            first = last
        self._moved = 0
        self._home = []
        if self._pinned:
            transport.unpin(self.host)
        self._pinned = False
        self.host = torch.empty(0, dtype=torch.uint8)

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return the tensors as views of ``memory``: uint8, ``size`` or more of it."""
        return [_view(memory, *place) for place in self._places]

    def point(self, views: Sequence[Tensor]) -> None:
        """Let the model's tensors be these, from :meth:`views`."""
        _point(self._tensors, views)

    def name_at(self, tensor: Tensor) -> str:
        """Return the name of the weight that begins where a view of the host's buffer does, or before it."""
        start = _first_byte(tensor)
        names = [name for region in self.regions for name in region.names]
        starts = [place for place, *_ in self._places]
        return max((place, name) for place, name in zip(starts, names, strict=True) if place <= start)[1]

    def point_home(self) -> None:
        """Let the model's tensors be those in host memory."""
        _point(self._tensors[: len(self._home)], self._home)


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _raw(tensor: Tensor, start: int, count: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (count,), (1,))


def _view(memory: Tensor, place: int, dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    start = (int(memory.storage_offset()) + place) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), start, size, stride)


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view
