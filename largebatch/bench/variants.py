"""The ways in which this machine can make our step, and what people use instead, all in turn."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from largebatch.bench.compare import Timings, take_turns
from largebatch.bench.config import SIDES
from largebatch.bench.limits import Work, limit_sides, work_of
from largebatch.bench.step import Ours, Plain, make_ours, make_plain, side
from largebatch.config.groups import DatasetConfig
from largebatch.config.run import Config
from largebatch.data import sets
from largebatch.data.source import upload
from largebatch.runtime.placement import place
from largebatch.runtime.world import hardware

# What each of our sides changes in the configuration; "micro" is one worker a pass.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "separate": {"kernel": "separate"},
    "compiled": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "micro": {"workers_per_pass": 1},
    "micro_graphs": {"workers_per_pass": 1, "cuda_graphs": True},
}
FIRST_ONLY = ("separate", "micro", "micro_graphs")  # at the first k alone
PLAIN = ("plain", "plain_compiled", "dataloader")


@dataclass(frozen=True)
class Measured:
    """Times of all sides, the samples of each side's step, and the work of an image."""

    timings: Timings
    minibatch: dict[str, int]
    work: Work


def sides_here(dataset: DatasetConfig, device: str, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the sides that are measured: those asked for, or on a GPU all that exist for the data, else none."""
    if asked is not None:
        return asked
    if device != "cuda":
        return ()
    return tuple(name for name in SIDES if name != "dataloader" or dataset.crop == "pad")


def time_variants(config: Config, ks: tuple[int, ...], names: tuple[str, ...], repeats: int, steps: int) -> Measured:
    """Time the sides in turn, with a plain matrix product and a plain copy among them.

    Args:
        config: Network, images in memory, n and precision.
        ks: Workers; plain loops have the first one's minibatch.
        names: Of :data:`largebatch.bench.config.SIDES`.
        repeats: Timed turns.
        steps: Of a turn at the first k; fewer at a larger one, for about as many images.

    Returns:
        Sides ``plain``, ``k8``, ``k8_compiled`` and so on, ``matmul`` and ``copy``.
    """
    first = _ours(replace(config, k=ks[0]), {})
    minibatch = first.learner.config.minibatch
    made: dict[str, tuple[Callable[[], None], int]] = {}
    for name in names:
        if name == "dataloader":
            made[name] = (from_loader(make_plain(first, minibatch), first), minibatch)
        elif name in PLAIN:
            made[name] = (make_plain(first, minibatch, compiled=name == "plain_compiled").step, minibatch)
        else:
            for k in ks[:1] if name in FIRST_ONLY else ks:
                ours = _ours(replace(config, k=k), OURS[name])
                ours.warm_up()
                made[f"k{k}" if name == "ours" else f"k{k}_{name}"] = (ours.step, ours.learner.config.minibatch)
    turns = {
        name: side(step, max(1, steps * minibatch // images), images, first) for name, (step, images) in made.items()
    }
    counted = make_plain(first, config.n, compiled=False)
    work = work_of(counted.model, *counted.batches[0], counted.autocast)
    bf16 = first.learner.placement.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else next(counted.model.parameters()).dtype
    limits = limit_sides(first.learner.world.device, dtype)
    timings = take_turns(turns | limits, repeats, "steps, a product and a copy")
    return Measured(timings, {name: images for name, (_, images) in made.items()}, work)


def _ours(config: Config, changes: dict[str, Any]) -> Ours:
    changes = dict(changes)
    kernel = changes.pop("kernel", config.bn.kernel)
    config = replace(config, **changes, bn=replace(config.bn, kernel=kernel))
    return make_ours(config, place(config, hardware()))


def as_facts(measured: Measured, ks: tuple[int, ...]) -> dict[str, Any]:
    """Return speeds, ratios and shares of this machine's limits, with stable keys."""
    timings, work = measured.timings, measured.work
    speeds = {name: timings.speed(name) for name in measured.minibatch}
    peaks = {name: timings.speed(name) for name in ("matmul", "copy")}
    ours = [name for name in speeds if name not in PLAIN]
    pairs = list(itertools.product(ours, [name for name in PLAIN if name in speeds]))
    micro = (f"k{ks[0]}_micro_graphs", f"k{ks[0]}_micro")
    if speeds.keys() >= set(micro):
        pairs.append(micro)
    shares = {}
    for name, speed in speeds.items():
        images = measured.minibatch[name]
        moved = work.step_bytes(images) * speed / images
        shares[name] = {"of_matmul": work.operations * speed / peaks["matmul"], "of_copy": moved / peaks["copy"]}
    return {
        "images_per_second": speeds,
        "ratios": {f"{one}_vs_{other}": asdict(timings.ratio(one, other)) for one, other in pairs},
        "shares": shares,
        "limits": {
            "matmul_operations_per_second": peaks["matmul"],
            "copy_bytes_per_second": peaks["copy"],
            "operations_per_image": work.operations,
            "bytes_per_image": work.bytes,
            "weight_bytes": work.weight_bytes,
        },
        "seconds": {name: statistics.median(timings.seconds[name]) for name in speeds},
    }


def as_lines(facts: dict[str, Any]) -> list[str]:
    """Return the table of :func:`as_facts` for people."""
    limits = facts["limits"]
    product, copy = limits["matmul_operations_per_second"], limits["copy_bytes_per_second"]
    lines = [
        "",
        f"a plain matrix product makes {product / 1e12:.3g} TFLOP/s here, a plain copy moves {copy / 1e9:.4g} GB/s; an "
        f"image takes {limits['operations_per_image'] / 1e9:.3g} GFLOP and {limits['bytes_per_image'] / 1e6:.3g} MB",
        f"{'side':<22} {'images/s':>10} {'ms a turn':>10} {'TFLOP/s':>8} {'of product':>10} {'GB/s':>8} {'of copy':>8}",
    ]
    for name, speed in facts["images_per_second"].items():
        of_product, of_copy = facts["shares"][name]["of_matmul"], facts["shares"][name]["of_copy"]
        lines.append(
            f"{name:<22} {speed:>10,.0f} {1e3 * facts['seconds'][name]:>10.2f} {of_product * product / 1e12:>8.3g}"
            f" {of_product:>10.1%} {of_copy * copy / 1e9:>8.4g} {of_copy:>8.1%}"
        )
    return lines


class _Photographs(Dataset[tuple[Tensor, int]]):
    """A set in memory as tutorials read one: an image at a time, through torchvision's transforms."""

    def __init__(self, config: DatasetConfig) -> None:
        self._set, _ = sets.load(config)
        self._length = config.trained_images or len(self._set.labels)
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop((config.height, config.width), padding=config.pad),
                *([transforms.RandomHorizontalFlip()] if config.flip else []),
                transforms.ToTensor(),
                transforms.Normalize(config.mean, config.std),
            ]
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = index % len(self._set.labels)
        image: Tensor = self._transform(functional.to_pil_image(self._set.images[row]))
        return image, int(self._set.labels[row])


def from_loader(plain: Plain, ours: Ours) -> Callable[[], None]:
    """Let a plain loop read its batches through PyTorch's DataLoader, as tutorials do, instead of finding them ready.

    Args:
        plain: A loop of one batch a step.
        ours: Whose data, device and loader processes it uses: as many as cores, up to 8, where no number is given.
    """
    config, place, device = ours.learner.config, ours.learner.placement, ours.learner.world.device
    workers = min(place.cores, 8) if config.loader.workers is None else config.loader.workers
    loader = DataLoader(
        _Photographs(config.dataset),
        batch_size=config.minibatch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()
    dtype = plain.batches[0][0].dtype

    def step() -> None:
        images, labels = (upload(values, device) for values in next(batches))
        if place.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        plain.batches = [(images.to(dtype), labels)]
        plain.step()

    return step
