"""Data sets of the user's own: items of a map-style data set, or pairs of tensors, made by a callable of hers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from largebatch.base.errors import UserError
from largebatch.base.user_code import DATASETS, calling, load
from largebatch.config.groups import DatasetConfig
from largebatch.data.augment import Transform, seeded
from largebatch.data.holdout import hold_out
from largebatch.data.identity import Identity, SplitIdentity, hashed_split, identity_of
from largebatch.data.loading import Loaded, tell
from largebatch.data.sets import ImageSet
from largebatch.data.stream import OWN, key

ITEM = "(input, label): a tensor, a numpy array or a PIL image, and a whole number"


@dataclass(frozen=True)
class Items:
    """A split of items, read one by one.

    Attributes:
        name: key=value and the split, for errors.
        data: The user's data set.
        made: The configuration that it was made from, and its place in what the callable returned.
        rows: int64 (N,), places of the split's items in it.
        classes: How many labels there are; None: not known yet.
        shape: Of an input; None: of any.
    """

    name: str
    data: Any
    made: tuple[DatasetConfig, int]
    rows: Tensor
    classes: int | None = None
    shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be made anew in a loader process that shares no memory: a user's data set may hold what cannot be sent."""
        return _made_anew, (self.name, *self.made, self.rows, self.classes, self.shape)

    def read(self, index: int, seed: int, epoch: int, train: bool) -> tuple[Tensor, int]:
        """Return an input, uint8, float or int64, and its label.

        Everything random in it begins at (seed, epoch, index): the generator that ``get`` is handed, and those of
        torch, random and numpy, which are put back afterwards.

        Raises:
            UserError: reading it fails, or it is not what a network can be trained on.
        """
        place, start = int(self.rows[index]), key(seed, OWN, epoch, index) >> 1
        generator = torch.Generator().manual_seed(start)
        augments = train and hasattr(self.data, "get")
        with (
            seeded(key(start)),
            calling(f"{self.name}, item {place}", f"read by {'get' * augments or '__getitem__'}, and has to be {ITEM}"),
        ):
            item = self.data.get(place, generator) if augments else self.data[place]
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise self._wrong(place, _kind(item), f"every item is {ITEM}")
        value, label = self._tensor(place, item[0]), self._label(place, item[1])
        if self.shape is not None and tuple(value.shape) != self.shape:
            raise self._wrong(place, f"of shape {tuple(value.shape)}", f"the first one is of shape {self.shape}")
        return value, label

    def _tensor(self, place: int, value: Any) -> Tensor:
        if hasattr(value, "getbands"):  # a PIL image
            pixels = np.array(value)
            value = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()
        elif isinstance(value, np.ndarray):
            value = torch.from_numpy(value.copy())
        if not isinstance(value, Tensor) or value.is_complex():
            raise self._wrong(place, f"({_kind(value)}, …)", f"every item is {ITEM}")
        return as_input(value.detach())

    def _label(self, place: int, label: Any) -> int:
        if isinstance(label, Tensor | np.ndarray) and label.shape == ():
            label = label.item()
        if not isinstance(label, int | np.integer) or label is True or label is False:
            raise self._wrong(place, f"(…, {_kind(label)})", "a label is a whole number from 0")
        if int(label) < 0 or (self.classes is not None and int(label) >= self.classes):
            above = "" if self.classes is None else f" to {self.classes - 1}, for {self.classes} classes"
            raise self._wrong(place, f"(…, {label})", f"labels go from 0{above}")
        return int(label)

    def _wrong(self, place: int, found: str, expected: str) -> UserError:
        return UserError(f"{self.name}: item {place} is {found}, and {expected}.")


def as_input(value: Tensor) -> Tensor:
    """Return a tensor in one of the types that inputs have: uint8 (pixels), float, or int64 for other whole numbers."""
    return value if value.is_floating_point() or value.dtype == torch.uint8 else value.long()


def _made_anew(name: str, config: DatasetConfig, place: int, *others: Any) -> Items:
    return Items(name, _as_map_style(name, _make(config)[place]), (config, place), *others)


class Pair:
    """Inputs (N, …) and labels (N,) as a map-style data set."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.targets = as_input(inputs), labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an input and its label."""
        return self.inputs[index], self.targets[index]


@dataclass(frozen=True)
class OwnSets:
    """Both splits of a data set of the user's own, and what was found of them.

    Attributes:
        train: Training items.
        val: Validation items.
        classes: How many there are.
        names: Theirs; empty: they have none.
        sample: Shape and type of a network's input, on the meta device.
        reproducible: Whether an item is the same each time that it is read.
    """

    train: Items
    val: Items
    classes: int
    names: Sequence[str]
    sample: Tensor
    reproducible: bool

    def identity(self) -> Identity:
        """Return what the data are: names of classes, labels where they are listed, and a few items."""

        def hashed(items: Items) -> tuple[SplitIdentity, str]:
            def read(index: int) -> bytes:
                value, label = items.read(index, 0, 0, train=False)
                whole = value.double() if value.dtype == torch.bfloat16 else value
                return f"{label} {value.dtype} {tuple(value.shape)}".encode() + whole.contiguous().numpy().tobytes()

            labels = labels_of(items)
            numbers = np.zeros(len(items), dtype=np.int64) if labels is None else labels.numpy()
            return hashed_split(numbers, lambda rows: b"", None, read if self.reproducible else None)

        return identity_of(self.names, hashed(self.train), hashed(self.val))

    def in_memory(self) -> tuple[ImageSet, ImageSet] | None:
        """Return both splits as tensors, where they are pairs of tensors."""
        if not (isinstance(self.train.data, Pair) and isinstance(self.val.data, Pair)):
            return None
        train, val = (
            ImageSet(part.data.inputs[part.rows], part.data.targets[part.rows].long())
            for part in (self.train, self.val)
        )
        return train, val


def open_sets(config: DatasetConfig) -> OwnSets:
    """Make the data set of ``dataset=python``.

    Raises:
        UserError: the callable is not there or fails, or what it returns is no data set: what was expected of it.
    """
    made, call = _make(config), f"dataset.name={config.name}"
    train = _items(f"{call}, training set", made[0], (config, 0), config.train_images)
    val = _items(f"{call}, validation set", made[1], (config, 1), config.val_images)
    if config.holdout:
        kept, held = hold_out(len(train), config.holdout, config.holdout_seed)
        train, val = replace(train, rows=train.rows[kept]), replace(train, rows=train.rows[held])
    names = _names(made[0]) or _names(made[1])
    classes = config.classes or len(names) or 1 + max(_largest_label(train), _largest_label(val))
    train, val = replace(train, classes=classes), replace(val, classes=classes)
    _check_labels(train)
    _check_labels(val)
    first = _look_at(train, config.reproducible)
    train, val = replace(train, shape=tuple(first.shape)), replace(val, shape=tuple(first.shape))
    _look_at(val, config.reproducible)
    kind = torch.int64 if first.dtype == torch.int64 else torch.float32
    return OwnSets(train, val, classes, names, torch.empty(first.shape, dtype=kind, device="meta"), config.reproducible)


def _make(config: DatasetConfig) -> Sequence[Any]:
    """Return what the user's callable returns: the training and the validation set."""
    call, kwargs = f"dataset.name={config.name}", config.kwargs or {}
    make = load("dataset.name", config.name, DATASETS)
    given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    expected = f"called with ({given}), and has to return (training set, validation set)"
    with calling(call, expected):
        made = make(**kwargs)
    if not (isinstance(made, tuple | list) and len(made) == 2):
        raise UserError(f"{call} returned {_kind(made)}: it is {expected}.")
    return made


def _items(name: str, part: Any, made: tuple[DatasetConfig, int], most: int | None) -> Items:
    """Return a split of what the user's callable has returned, the first ``most`` items of it."""
    data = _as_map_style(name, part)
    with calling(name, "a map-style data set, with __len__"):
        found = len(data)
    if not found or found < (most or 1):
        raise UserError(f"{name}: it has {found} items, where {most or 'at least one'} is wanted.")
    return Items(name, data, made, torch.arange(most or found))


def _as_map_style(name: str, part: Any) -> Any:
    """Return a map-style data set: the user's, or one of the user's pair of tensors."""
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        part = part.tensors
    if isinstance(part, tuple | list) and len(part) == 2 and all(isinstance(one, Tensor | np.ndarray) for one in part):
        inputs, labels = map(torch.as_tensor, part)
        if labels.shape != inputs.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"{name}: a pair of tensors is inputs (N, …) and labels (N,) of whole numbers, and these are of shape "
                f"{tuple(inputs.shape)} and {tuple(labels.shape)}, the labels {labels.dtype}."
            )
        return Pair(inputs, labels)
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) or isinstance(part, dict):
        raise UserError(
            f"{name}: it is {_kind(part)}, and has to be a map-style data set, with __len__ and __getitem__(index), or "
            "a pair of tensors."
        )
    return part


def _names(part: Any) -> list[str]:
    """Return the names of classes that a data set offers, as torchvision's do; none where it has none."""
    names = getattr(part, "classes", None)
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    return list(map(str, names)) if is_list and names else []


def labels_of(items: Items) -> Tensor | None:
    """Return all labels of a split, int64 (N,), where its data set lists them as torchvision's do; else None."""
    for name in ("targets", "labels"):
        listed = getattr(items.data, name, None)
        if listed is not None and not callable(listed) and len(listed) == len(items.data):
            return torch.as_tensor(np.asarray(listed)).long()[items.rows]
    return None


def _largest_label(items: Items) -> int:
    labels = labels_of(items)
    if labels is None:
        tell(f"{items.name}: all {len(items):,} items are read once to count the classes; dataset.classes=… spares it")
        return max(items.read(index, 0, 0, train=False)[1] for index in range(len(items)))
    return int(labels.max())


def _check_labels(items: Items) -> None:
    labels = labels_of(items)
    if labels is not None and (int(labels.min()) < 0 or int(labels.max()) >= (items.classes or 0)):
        raise UserError(
            f"{items.name}: its labels go from {int(labels.min())} to {int(labels.max())}, and those of "
            f"{items.classes} classes go from 0 to {(items.classes or 0) - 1}."
        )


def _look_at(items: Items, twice: bool) -> Tensor:
    """Return the first input, after having read a few items.

    Args:
        items: A split.
        twice: Whether they are read twice, and refused where they differ.

    Raises:
        UserError: an item differs from one look to the next, or is not what an item is.
    """
    first = items.read(0, 0, 0, train=False)[0]
    items = replace(items, shape=tuple(first.shape))
    for index in sorted({0, len(items) // 3, len(items) // 2, len(items) - 1}):
        for train in {False, hasattr(items.data, "get")}:
            value, label = items.read(index, 0, 0, train)
            if twice:
                again, label_again = items.read(index, 0, 0, train)
                if label != label_again or value.dtype != again.dtype or not _same(value, again):
                    raise UserError(
                        f"{items.name}: item {int(items.rows[index])} is another each time that it is read, so that no "
                        "run could be repeated or resumed. Draw random numbers from the generator of get(index, "
                        "generator), or from torch, random or numpy.random as they are; or use "
                        "dataset.reproducible=false, which the record keeps."
                    )
    return first


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"a {type(value).__name__}{shape}"


class Batches(Dataset[Loaded]):
    """Batches of items, given as (epoch, index); runs in loader processes.

    Args:
        items: The split.
        seed: The run's.
        train: Whether items are augmented.
        transform: What is done to training images; None: nothing.
    """

    def __init__(self, items: Items, seed: int, train: bool, transform: Transform | None) -> None:
        self._items, self._seed, self._train, self._transform = items, seed, train, transform

    def __getitems__(self, places: list[tuple[int, int]]) -> Loaded:
        """Return a batch: inputs (batch, …), labels int64 (batch,), and what was wrong."""
        try:
            read = [self._read(epoch, index) for epoch, index in places]
            return torch.stack([value for value, _ in read]), torch.tensor([label for _, label in read]), []
        except UserError as error:  # it cannot leave a loader process
            return torch.empty(0), torch.empty(0), [error]

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        value, label = self._items.read(
            index, self._seed if self._train else 0, epoch if self._train else 0, self._train
        )
        if self._train and self._transform:
            value = self._transform(value, self._seed, epoch, index)
        return value, label
