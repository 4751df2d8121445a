"""Cut a model into groups of weights that are copied together: by layers, blocks, or equal bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from largebatch.base.errors import UserError
from largebatch.offloading.flat import Region, regions_of

GROUPS = ("bytes", "leaf", "blocks")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# These compute with the weights of their children, whom they don't call.
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Part:
    """Modules whose weights travel together, by name; while one of them computes, the regions are on the device."""

    modules: tuple[tuple[str, nn.Module], ...]
    regions: tuple[Region, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(region.size for region in self.regions)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules' names."""
        return tuple(name or "the model" for name, _ in self.modules)


@dataclass(frozen=True)
class Grouping:
    """A model cut into parts.

    Attributes:
        parts: Those that travel, in the order in which the model registers them.
        kept: What stays on the device: parameters that a module with sub-modules owns itself, such as a position
            embedding, and as many parts as the budget leaves room for.
        slots: How many parts are on the device at a time.
    """

    parts: tuple[Part, ...]
    kept: Part
    slots: int

    @property
    def slot_size(self) -> int:
        """Bytes of a slot: those of the largest part."""
        return max((part.size for part in self.parts), default=0)

    @property
    def peak(self) -> int:
        """Bytes of weights on the device, at most."""
        return self.kept.size + self.slots * self.slot_size


@dataclass(frozen=True)
class Learned:
    """Weights that modules read without calling the owner, as learned in a pass.

    Attributes:
        readers: Modules that read weights below them: each is brought as a whole.
        resident: Weights that others read, with their names: they stay on the device.
    """

    readers: tuple[nn.Module, ...] = ()
    resident: tuple[tuple[str, Tensor], ...] = ()


NOTHING = Learned()


def cut(
    models: Mapping[str, nn.Module], kind: str, budget: int | None, slots: int, learned: Learned = NOTHING
) -> Grouping:
    """Cut models into parts for one ring of slots.

    Args:
        models: Modules on the CPU, by a name that theirs begin with: empty, or several.
        kind: ``leaf`` layers, each with the normalisation that follows it; ``blocks``, the elements of the innermost
            lists of composite modules; or ``bytes``, neighbouring layers up to the size of the largest one.
        budget: Bytes of weights on the device. What it leaves over keeps parts there, evenly spread; None keeps none.
        slots: Parts on the device at a time.
        learned: What earlier passes have shown.

    Raises:
        UserError: a budget that is below the least.
    """
    units: list[tuple[str, nn.Module]] = []
    own: list[tuple[str, Tensor]] = []
    for name, model in models.items():
        _collect(name, model, kind, learned.readers, units, own)
    own += learned.resident
    parts, kept = _joined(units, own, NORMS)
    if kind == "bytes":
        parts = _packed(parts)
    slots = min(slots, len(parts))
    least = Grouping(tuple(parts), kept, slots)
    if budget is None or not parts:
        return least
    if budget < least.peak:
        raise UserError(_too_small(least, budget, kind))
    return _keep(least, budget)


def _too_small(least: Grouping, budget: int, kind: str) -> str:
    largest = max(least.parts, key=lambda part: part.size)
    other = " Layer by layer, groups=leaf, it may be less." if kind == "blocks" else ""
    stay = f" and {least.kept.size:,} that stay" if least.kept.size else ""
    return (
        f"budget={budget:,} bytes is too small: the least for these weights is {least.peak:,}, {least.slots} × "
        f"{least.slot_size:,} for {' and '.join(largest.names[:2])}{stay}.{other}"
    )


def cut_for_readers(
    models: Mapping[str, nn.Module],
    kind: str,
    budget: int | None,
    slots: int,
    reads: Sequence[tuple[nn.Module | None, str, Tensor]],
) -> Grouping:
    """Cut models whose modules read the weights of others, in the way that takes less memory.

    Either a reader of weights below it is brought with all of them, or such weights stay on the device; what a module
    reads elsewhere stays there in any case.

    Args:
        models: See :func:`cut`.
        kind: See :func:`cut`.
        budget: See :func:`cut`.
        slots: See :func:`cut`.
        reads: The reader, the weight's name, and the weight.
    """
    below: dict[nn.Module, bool] = {}
    roots = set(models.values())
    for reader, _, tensor in reads:
        if reader is not None:
            inside = any(tensor is own for _, own in tensors_of(reader, ""))
            below[reader] = below.get(reader, reader not in roots) and inside
    readers = tuple(reader for reader, inside in below.items() if inside)
    elsewhere = tuple((name, tensor) for reader, name, tensor in reads if reader not in readers)
    everything = tuple((name, tensor) for _, name, tensor in reads)
    ways = Learned(readers, elsewhere), Learned((), everything)
    best = min(ways, key=lambda way: cut(models, kind, None, slots, way).peak)
    return cut(models, kind, budget, slots, best)


def whole(models: Mapping[str, nn.Module]) -> list[Part]:
    """Return a part for each model; models that share weights are one."""
    return _joined(list(models.items()), [], ())[0]


def tensors_of(module: nn.Module, prefix: str, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Return parameters and buffers with their names, tied ones more than once."""
    dot = f"{prefix}." if prefix else ""
    named: Iterator[tuple[str, Tensor]] = chain(
        module.named_parameters(recurse=recurse, remove_duplicate=False),
        module.named_buffers(recurse=recurse, remove_duplicate=False),
    )
    return ((dot + name, tensor) for name, tensor in named)


def bears(module: nn.Module, recurse: bool = True) -> bool:
    """Return whether a module has weights or buffers."""
    return any(True for _ in tensors_of(module, "", recurse))


def _is_block(parent: nn.Module, module: nn.Module) -> bool:
    composite = any(bears(child) for child in module.children())
    return composite and isinstance(parent, CONTAINERS) and not isinstance(module, CONTAINERS)


def _collect(
    prefix: str,
    model: nn.Module,
    kind: str,
    readers: Collection[nn.Module],
    units: list[tuple[str, nn.Module]],
    own: list[tuple[str, Tensor]],
) -> None:
    """Add the modules that are brought as a whole, and the tensors above them."""
    seen = {module for _, module in units}

    def walk(name: str, module: nn.Module, parent: nn.Module | None) -> None:
        if module in seen or not bears(module):
            return
        seen.add(module)
        block = kind == "blocks" and parent is not None and _is_block(parent, module)
        if block:
            block = not any(_is_block(inner, child) for inner in module.modules() for child in inner.children())
        together = block or isinstance(module, WHOLE) or module in readers
        if together or not any(bears(child) for child in module.children()):
            units.append((name, module))
            return
        own.extend(tensors_of(module, name, recurse=False))
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child, module)

    walk(prefix, model, None)


def _joined(
    units: Sequence[tuple[str, nn.Module]], own: Sequence[tuple[str, Tensor]], followers: tuple[type[nn.Module], ...]
) -> tuple[list[Part], Part]:
    """Join units that share memory, and modules of some types with the one before them."""
    tensors = {place: list(tensors_of(module, name)) for place, (name, module) in enumerate(units)}
    owners: dict[int, set[int]] = {}
    for place, named in [(-1, own), *tensors.items()]:
        for _, tensor in named:
            owners.setdefault(id(tensor), set()).add(place)
    regions = regions_of([*own, *(pair for named in tensors.values() for pair in named)])
    places = [set().union(*(owners[id(tensor)] for tensor in region.tensors)) for region in regions]
    leader = list(range(len(units)))

    def find(place: int) -> int:
        return place if leader[place] == place else find(leader[place])

    for shared in places:
        first, *others = sorted(shared - {-1}) or [-1]
        for other in others:
            leader[max(find(first), find(other))] = min(find(first), find(other))
    for place, (_, module) in enumerate(units[1:], 1):
        if isinstance(module, followers) and find(place) == place:
            leader[place] = find(place - 1)
    parts = []
    for head in sorted({find(place) for place in range(len(units))}):
        members = [place for place in range(len(units)) if find(place) == head]
        inside = [region for region, shared in zip(regions, places, strict=True) if _belongs(shared, members)]
        parts.append(Part(tuple(units[place] for place in members), tuple(inside)))
    kept = [region for region, shared in zip(regions, places, strict=True) if -1 in shared]
    return [part for part in parts if part.regions], Part((), tuple(kept))


def _belongs(shared: set[int], members: Sequence[int]) -> bool:
    return -1 not in shared and not shared.isdisjoint(members)


def _packed(parts: Sequence[Part]) -> list[Part]:
    """Join neighbours as long as they are no larger than the largest part: fewer copies in the same memory."""
    limit = max((part.size for part in parts), default=0)
    packed: list[Part] = []
    for part in parts:
        if packed and packed[-1].size + part.size <= limit:
            packed[-1] = Part(packed[-1].modules + part.modules, packed[-1].regions + part.regions)
        else:
            packed.append(part)
    return packed


def _keep(least: Grouping, budget: int) -> Grouping:
    """Keep parts on the device for what the budget leaves over, evenly spread: so copies have time in between."""
    total = sum(part.size for part in least.parts)
    room = budget - least.peak
    if least.kept.size + total <= budget:
        everything = tuple(region for part in least.parts for region in part.regions)
        return Grouping((), Part((), least.kept.regions + everything), 0)
    travel: list[Part] = []
    stay = list(least.kept.regions)
    credit = 0.0
    for part in least.parts:
        credit += part.size * (budget - least.peak) / total
        if part.size <= min(credit, room):
            credit -= part.size
            room -= part.size
            stay += part.regions
        else:
            travel.append(part)
    return Grouping(tuple(travel), Part((), tuple(stay)), min(least.slots, len(travel)))
