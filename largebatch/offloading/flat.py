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
        """Return its size in a flat buffer, in bytes."""
        return -(-max(self.stop - self.start, 1) // ALIGNMENT) * ALIGNMENT


def pages(size: int) -> Tensor:
    """Return ``size`` bytes in memory pages of their own, which become real when they are written to.

    Weights that move in region by region so need no room for a second copy, and pages can be pinned where they are,
    while PyTorch's pinned allocator rounds up to a power of two.
    """
    return torch.frombuffer(_map(size), dtype=torch.uint8)


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


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


@dataclass(frozen=True)
class _Place:
    """Position of a tensor in a flat buffer: its first byte there and in its region, and the type of those bytes."""

    start: int
    within: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    conjugate: bool
    negative: bool

    def view(self, memory: Tensor, start: int) -> Tensor:
        """Return the tensor as a view of ``memory``, from a byte of it on."""
        first = (int(memory.storage_offset()) + start) // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=memory.device)
        view.set_(memory.untyped_storage(), first, self.size, self.stride)
        view = view.conj() if self.conjugate else view
        return torch._neg_view(view) if self.negative else view


class Views(list[Tensor]):
    """A group's tensors as they are in some memory, with their addresses."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.addresses = [tensor.data_ptr() for tensor in self]

    def add(self, others: Views) -> None:
        """Append others."""
        self += others
        self.addresses += others.addresses

    def replaced(self, span: slice, others: Views) -> Views:
        """Return these with some of them replaced."""
        copy = Views([])
        copy.add(self)
        copy[span], copy.addresses[span] = others, others.addresses
        return copy


class Group:
    """Weights that travel together: one flat buffer in host memory, of which the model's own tensors are views.

    Attributes:
        names: The modules it belongs to.
        regions: Its memory.
        tensors: The model's tensors, region by region.
        size: Bytes.
        host: The flat buffer, uint8.
        always: Regions that are written in a way that no version counter shows.
    """

    def __init__(self, names: Sequence[str], regions: Sequence[Region]) -> None:
        self.names, self.regions = tuple(names), tuple(regions)
        self.size = sum(region.size for region in regions)
        self.host = torch.empty(0, dtype=torch.uint8)
        self.always: set[int] = set()
        self.tensors = [tensor for region in regions for tensor in region.tensors]
        self._offsets: list[int] = []
        self._places: list[_Place] = []
        self._region_of: list[int] = []  # each tensor's
        self._spans: list[slice] = []  # each region's tensors
        offset = 0
        for number, region in enumerate(regions):
            self._spans.append(slice(len(self._places), len(self._places) + len(region.tensors)))
            self._offsets.append(offset)
            self._places += [_place(tensor, region.start, offset) for tensor in region.tensors]
            self._region_of += [number] * len(region.tensors)
            offset += region.size
        self._home = Views([])  # of regions that live in the flat buffer
        self._homes: list[Tensor] = []  # those regions: each has a storage of its own, as a weight that is saved needs
        self._originals: list[Tensor | None] = []  # memory that somebody else sees too, and that is therefore kept
        self._pointed = Views([])  # what each tensor was last made to be
        self._versions: list[int] = []
        self._written: set[int] = set()
        self._pinned = False

    def move_in(self, transport: Transport) -> None:
        """Copy the weights into a flat buffer, region by region, so that no second copy builds up."""
        pages = _map(max(self.size, 1))
        self.host = torch.frombuffer(pages, dtype=torch.uint8, count=self.size) if self.size else self.host
        for region, offset in zip(self.regions, self._offsets, strict=True):
            count = region.stop - region.start
            home = torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=offset) if count > 0 else _nothing()
            original = _storage(region.tensors[0]) if _must_stay(region) else None
            home.copy_(_raw(region.tensors[0], region.start, count))
            self._homes.append(home)
            self._originals.append(original)
            span = self._spans[len(self._homes) - 1]
            views = Views(place.view(home, place.within) for place in self._places[span])
            self._home.add(views)
            self._pointed.add(views)
            _point(self.tensors[span], views)
        self._versions = [_version(tensor) for tensor in self.tensors]
        transport.pin(self.host)
        self._pinned = True

    @torch.inference_mode(False)
    def move_out(self, transport: Transport) -> None:
        """Give the weights memory of their own again, or the one they had where that is seen from elsewhere.

        Outside of inference_mode, whose tensors could not be trained afterwards.
        """
        for number, (home, original) in enumerate(zip(self._homes, self._originals, strict=True)):
            region, span = self.regions[number], self._spans[number]
            start = 0
            if original is None:
                own = torch.empty(len(home), dtype=torch.uint8).copy_(home)
            else:
                own, start = original, region.start
                if number in self._written:
                    original[start : start + len(home)].copy_(home)
            for tensor, address, place in zip(
                self.tensors[span], self._pointed.addresses[span], self._places[span], strict=True
            ):
                if tensor.data_ptr() == address:  # what was put elsewhere meanwhile stays there
                    tensor.data = place.view(own, start + place.within)
        self._homes, self._originals, self._pointed, self._home = [], [], Views([]), Views([])
        if self._pinned:
            transport.unpin(self.host)
        self._pinned = False
        self.host = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode(False)
    def views(self, memory: Tensor) -> Views:
        """Return the tensors as views of ``memory``: uint8, ``size`` or more of it.

        Outside of inference_mode, whose tensors have no version counter.
        """
        return Views(place.view(memory, place.start) for place in self._places)

    def point(self, views: Views) -> None:
        """Let the model's tensors be these, from :meth:`views`."""
        _point(self.tensors, views)
        self._pointed = views

    def point_home(self) -> None:
        """Let the model's tensors be those in host memory."""
        _point(self.tensors[: len(self._home)], self._home)
        self._pointed = self._home

    @torch.inference_mode(False)
    def lend(self, number: int, memory: Tensor | None) -> None:
        """Let one region's tensors be views of ``memory``, or those in host memory again."""
        span = self._spans[number]
        places = self._places[span]
        views = Views(self._home[span] if memory is None else (place.view(memory, place.within) for place in places))
        _point(self.tensors[span], views)
        self._pointed = self._pointed.replaced(span, views)

    def alias(self, tensor: Tensor, number: int, memory: Tensor) -> Tensor:
        """Return what a view of a region in host memory is where the region lies in ``memory``."""
        place = _place(tensor, self.regions[number].start, 0)
        shift = tensor.data_ptr() - self._homes[number].data_ptr()
        return place.view(memory, shift)

    def _mark(self, regions: Iterable[int]) -> None:
        for number in regions:
            span = self._spans[number]
            self._versions[span] = [_version(tensor) for tensor in self.tensors[span]]

    def changed(self) -> set[int]:
        """Return the regions that were written since they were last carried or read."""
        versions = zip(self.tensors, self._versions, self._region_of, strict=True)
        return {number for tensor, version, number in versions if _version(tensor) != version}

    def carry(self, memory: Tensor, only: int | None = None) -> int:
        """Copy the regions that were written on the device to host memory; return their bytes.

        Args:
            memory: The device's, where the whole group lies, or the one region ``only``.
            only: A region's number.
        """
        changed = (self.changed() | self.always) & ({only} if only is not None else set(range(len(self._homes))))
        for number in changed:
            start = 0 if only is not None else self._offsets[number]
            self._homes[number].copy_(memory[start : start + len(self._homes[number])])
        self._written |= changed
        self._mark(changed)
        return sum(len(self._homes[number]) for number in changed)

    def changed_at_home(self) -> bool:
        """Return whether the weights were written while they were in host memory; the next call answers anew."""
        changed = self.changed()
        self._written |= changed
        self._mark(changed)
        return bool(changed)

    def home(self, number: int) -> Tensor:
        """Return a tensor, by its number in ``tensors``, as it lies in host memory."""
        return self._home[number]

    def hosts(self) -> dict[int, int]:
        """Return the regions' numbers by the addresses of their storages in host memory."""
        return {home.untyped_storage().data_ptr(): number for number, home in enumerate(self._homes) if len(home)}

    def region_bytes(self, number: int) -> Tensor:
        """Return a region's part of the flat buffer."""
        return self.host[self._offsets[number] : self._offsets[number] + self.regions[number].size]

    def region_of(self, number: int) -> int:
        """Return the region of a tensor, both by their numbers."""
        return self._region_of[number]

    def always_tensors(self) -> list[Tensor]:
        """Return a tensor of each region in ``always``."""
        return [self.regions[number].tensors[0] for number in sorted(self.always)]

    def region_at(self, byte: int) -> int:
        """Return the region that has a byte of the flat buffer."""
        return max(number for number, offset in enumerate(self._offsets) if offset <= byte)

    def strayed(self) -> list[int]:
        """Return the numbers of tensors that were given other memory by somebody else."""
        found = [tensor.data_ptr() for tensor in self.tensors]
        expected = self._pointed.addresses
        if found == expected:
            return []
        return [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]

    def take(self, number: int, value: Tensor) -> bool:
        """Give a tensor, where it belongs now, another one's values; return whether it can hold them."""
        place, tensor = self._places[number], self.tensors[number]
        if (value.dtype, value.shape, value.layout) != (place.dtype, place.size, torch.strided):
            return False
        value = value.detach().clone()
        tensor.data = self._pointed[number]
        tensor.copy_(value)
        return True

    def name(self, number: int) -> str:
        """Return a tensor's name."""
        return [name for region in self.regions for name in region.names][number]


def own_copy(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of its own, with the strides it has, also where elements share memory."""
    _, start, stop = _span(tensor)
    memory = torch.empty(stop - start, dtype=torch.uint8, device=tensor.device)
    memory.copy_(_nothing(tensor.device).set_(tensor.untyped_storage(), start, (stop - start,), (1,)))
    return _place(tensor, start, 0).view(memory, _first_byte(tensor) - start)


def _place(tensor: Tensor, start: int, offset: int) -> _Place:
    within = _first_byte(tensor) - start
    stride = tuple(map(int, tensor.stride()))
    return _Place(
        offset + within, within, tensor.dtype, tensor.size(), stride, bool(tensor.is_conj()), bool(tensor.is_neg())
    )


def _must_stay(region: Region) -> bool:
    """Return whether memory that comes back another must be the same: others see it, or it is more than the region."""
    storage = region.tensors[0].untyped_storage()
    if storage.is_shared() or region.start or region.stop != storage.nbytes():
        return True
    if torch.cuda.is_available() and storage.is_pinned():
        return True
    seen = torch._C._storage_Use_Count(storage._cdata)
    return bool(seen > len(region.tensors) + 1)  # and the object that asks


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _nothing(device: torch.device | None = None) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)


def _storage(tensor: Tensor) -> Tensor:
    return _raw(tensor, 0, tensor.untyped_storage().nbytes())


def _raw(tensor: Tensor, start: int, count: int) -> Tensor:
    return _nothing().set_(tensor.untyped_storage(), start, (count,), (1,))


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view
